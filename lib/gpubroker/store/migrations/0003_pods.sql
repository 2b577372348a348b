-- What is wanted and what there is: pods, attempts at providers, instances, listings.

CREATE TABLE pod (
    id             text PRIMARY KEY,
    org_id         text NOT NULL,
    agent_id       text NOT NULL,
    token_jti      text REFERENCES token,
    name           text,
    version        bigint NOT NULL DEFAULT 1,   -- counts what a client can see change
    state          text NOT NULL CHECK (state IN ('awaiting_approval', 'requested', 'creating', 'starting', 'running',
                       'stopping', 'stopped', 'terminating', 'terminated', 'failed', 'interrupted', 'unreachable')),
    state_reason   text,
    billing        text NOT NULL DEFAULT 'none' CHECK (billing IN ('full', 'storage', 'none', 'unknown')),
    wanted         text NOT NULL DEFAULT 'running' CHECK (wanted IN ('running', 'stopped', 'gone')),
    wanted_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    charge_until   timestamptz,                 -- set once the end is wanted: no second after it is the customer's
    due_at         timestamptz,                 -- when it must be looked at again: the delay queue that Knative lacks
    turn           bigint NOT NULL DEFAULT 0,   -- counts claims: a driver whose turn is over commits nothing
    failures       integer NOT NULL DEFAULT 0,  -- steps that failed in a row, for the backoff
    ends_at        timestamptz NOT NULL,
    hard_stop_at   timestamptz NOT NULL,
    spec           jsonb NOT NULL,
    candidates     jsonb NOT NULL DEFAULT '[]', -- the offers it may use, best first, with the prices quoted then
    env_sealed     bytea,                       -- env and registry_auth; erased at the end
    seal_key       text,
    price_micro_h  bigint NOT NULL DEFAULT 0,   -- the dearest of the candidates: what counts against max_usd_per_hour
    budget_micro   bigint,
    quote_id       text,
    body_mac       bytea,
    restart_requested_at timestamptz,
    restart_done_at timestamptz,
    expiring_told_at timestamptz,               -- pod.expiring was written
    idle_seconds   integer,                     -- its end when its agent makes no call about it for so long
    touched_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    exit_code      integer,
    ends_because   text,
    approval       jsonb,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    running_at     timestamptz,
    terminated_at  timestamptz,
    UNIQUE (org_id, id),
    FOREIGN KEY (org_id, agent_id) REFERENCES agent (org_id, id),
    CHECK (hard_stop_at >= ends_at)
);
CREATE UNIQUE INDEX pod_name ON pod (agent_id, name) WHERE wanted <> 'gone';
CREATE INDEX pod_due ON pod (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX pod_ends ON pod (ends_at) WHERE wanted <> 'gone';
CREATE INDEX pod_idle ON pod (touched_at) WHERE idle_seconds IS NOT NULL AND wanted <> 'gone';
CREATE INDEX pod_page ON pod (org_id, agent_id, id DESC);
CREATE INDEX pod_same ON pod (agent_id, body_mac, created_at) WHERE body_mac IS NOT NULL;
CREATE INDEX pod_live ON pod (agent_id) WHERE wanted <> 'gone';
CREATE INDEX pod_created ON pod (agent_id, created_at);

ALTER TABLE quote ADD FOREIGN KEY (pod_id) REFERENCES pod;

CREATE TABLE pod_label (
    org_id text NOT NULL,
    pod_id text NOT NULL REFERENCES pod,
    k      text NOT NULL,
    v      text NOT NULL,
    PRIMARY KEY (pod_id, k)
);
CREATE INDEX pod_label_kv ON pod_label (org_id, k, v, pod_id);

CREATE TABLE pod_log (
    pod_id    text PRIMARY KEY REFERENCES pod,
    org_id    text NOT NULL,
    starts_at bigint NOT NULL,
    tail      bytea NOT NULL CHECK (octet_length(tail) <= 1048576),
    taken_at  timestamptz NOT NULL
);

-- Never deleted: an instance that turns up with the reference of a rejected or abandoned attempt is ended on sight.
CREATE TABLE attempt (
    id            text PRIMARY KEY,
    org_id        text NOT NULL,
    pod_id        text NOT NULL REFERENCES pod,
    n             integer NOT NULL,
    account_id    text NOT NULL REFERENCES provider_account,
    provider      text NOT NULL,
    offer_id      text NOT NULL,
    offer         jsonb NOT NULL,
    gpu           text,
    gpu_count     integer NOT NULL DEFAULT 0,
    price_micro_h bigint NOT NULL CHECK (price_micro_h >= 0),
    ref           text NOT NULL UNIQUE CHECK (ref ~ '^[a-z0-9-]{1,50}$'),
    send_before   timestamptz NOT NULL,       -- no create is sent after this
    over_at       timestamptz NOT NULL,       -- by then the call has ended, whatever became of it
    state         text NOT NULL CHECK (state IN ('open', 'created', 'rejected', 'ambiguous', 'abandoned')),
    code          text,
    detail        text,
    looked_up     integer NOT NULL DEFAULT 0,
    at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    settled_at    timestamptz,
    hold_until    timestamptz,                -- abandoned: a birth is possible until then, so the hold stays
    UNIQUE (pod_id, n)
);
CREATE UNIQUE INDEX attempt_open ON attempt (pod_id) WHERE state IN ('open', 'ambiguous');

CREATE TABLE instance (
    id                   text PRIMARY KEY,
    org_id               text,
    attempt_id           text REFERENCES attempt,
    pod_id               text REFERENCES pod,
    account_id           text NOT NULL REFERENCES provider_account,
    provider_instance_id text NOT NULL,
    ref                  text,
    role                 text NOT NULL CHECK (role IN ('live', 'stray')),
    life                 text NOT NULL DEFAULT 'unknown',
    provider_status      text,
    endpoints            jsonb NOT NULL DEFAULT '[]',
    known_at             timestamptz NOT NULL,
    seen_at              timestamptz,          -- when it was last asked for and answered: billed no further
    commanded_at         timestamptz,          -- what was asked before this says nothing about the present
    started_at           timestamptz,          -- first seen running
    billed_until         timestamptz NOT NULL,
    hard_stop_at         timestamptz,          -- as the provider was told
    misses               integer NOT NULL DEFAULT 0,
    missed_since         timestamptz,
    terminate_sent_at    timestamptz,
    terminal_seen_at     timestamptz,
    ended_at             timestamptz,          -- the last moment that it can be billed for
    gone_at              timestamptz,
    gone_evidence        jsonb,
    UNIQUE (account_id, provider_instance_id),
    CHECK ((gone_at IS NULL) = (gone_evidence IS NULL)),
    CHECK (role = 'stray' OR pod_id IS NOT NULL)
);
CREATE UNIQUE INDEX instance_live ON instance (pod_id) WHERE role = 'live' AND gone_at IS NULL;
CREATE INDEX instance_pod ON instance (pod_id);
CREATE INDEX instance_present ON instance (account_id) WHERE gone_at IS NULL;
CREATE INDEX instance_attempt ON instance (attempt_id);

CREATE TABLE listing (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id text NOT NULL REFERENCES provider_account,
    began_at   timestamptz NOT NULL,
    ended_at   timestamptz,
    complete   boolean NOT NULL,
    instances  integer,
    error      text
);
CREATE INDEX listing_account ON listing (account_id, began_at DESC);
