-- What was told of a budget: once for each period and limit, so that a limit that was raised may be told of again.

CREATE TABLE budget_news (
    agent_id     text NOT NULL REFERENCES agent,
    org_id       text NOT NULL,
    what         text NOT NULL CHECK (what IN ('threshold', 'exhausted')),
    limit_micro  bigint NOT NULL,
    period_start timestamptz NOT NULL,
    at           timestamptz NOT NULL DEFAULT instant(),
    PRIMARY KEY (agent_id, what)
);
ALTER TABLE budget_news ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON budget_news TO gpubroker_public USING (org_id = current_setting('gpubroker.org', true));
CREATE POLICY every ON budget_news TO gpubroker_worker USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON budget_news TO gpubroker_worker;
GRANT SELECT ON budget_news TO gpubroker_public;
