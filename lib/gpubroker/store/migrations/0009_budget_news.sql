-- What was told of a budget: once for each period and limit, so that a limit that was raised may be told of again.

CREATE TABLE budget_news (
    agent_id     text NOT NULL REFERENCES agent,
    what         text NOT NULL CHECK (what IN ('threshold', 'exhausted')),
    limit_micro  bigint NOT NULL,
    period_start timestamptz NOT NULL,
    at           timestamptz NOT NULL DEFAULT instant(),
    PRIMARY KEY (agent_id, what)
);
GRANT SELECT, INSERT, UPDATE, DELETE ON budget_news TO gpubroker_worker;
