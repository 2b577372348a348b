-- Commands that came as events: each is carried out once, by its agent, source and id, for ever.

CREATE TABLE command (
    agent_id text NOT NULL REFERENCES agent,
    source   text NOT NULL,
    event_id text NOT NULL,
    org_id   text NOT NULL,
    body_mac bytea NOT NULL,        -- the same source and id with something else in it is an error of the sender's
    at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    status   text CHECK (status IN ('done', 'refused')),  -- null between the effect and its answer
    pod_id   text,
    code     text,
    detail   text,
    PRIMARY KEY (agent_id, source, event_id)
);
ALTER TABLE command ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON command TO gpubroker_public USING (org_id = current_setting('gpubroker.org', true));
CREATE POLICY every ON command TO gpubroker_worker USING (true);
GRANT SELECT, INSERT ON command TO gpubroker_public;
GRANT UPDATE (status, pod_id, code, detail) ON command TO gpubroker_public;
GRANT SELECT ON command TO gpubroker_worker;
