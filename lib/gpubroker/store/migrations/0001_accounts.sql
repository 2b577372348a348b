-- Who there is: the installation, organisations, agents as a tree, their credentials.

CREATE EXTENSION IF NOT EXISTS btree_gist;

-- The only clock of billing. A simulation replaces it in its own database.
CREATE FUNCTION instant() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT clock_timestamp()';

-- The same ids as gpubroker.ids makes: prefix, then the 26 Crockford base32 characters of a UUIDv7.
CREATE FUNCTION new_id(p_prefix text) RETURNS text LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    alphabet CONSTANT text := '0123456789abcdefghjkmnpqrstvwxyz';
    random   bit(128) := ('x' || replace(gen_random_uuid()::text, '-', ''))::bit(128);
    bits     bit(130);
    id       text := p_prefix || '_';
BEGIN
    bits := B'00' || (extract(epoch FROM clock_timestamp()) * 1000)::bigint::bit(48)
            || B'0111' || substring(random FROM 53);
    FOR place IN 0..25 LOOP
        id := id || substr(alphabet, substring(bits FROM place * 5 + 1 FOR 5)::int + 1, 1);
    END LOOP;
    RETURN id;
END $$;

CREATE TABLE installation (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    owner      text NOT NULL CHECK (owner ~ '^[a-z0-9]{8}$'),  -- in every reference; must equal GPUBROKER_OWNER
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE org (
    id         text PRIMARY KEY,
    name       text NOT NULL UNIQUE,
    plan       text NOT NULL DEFAULT 'free' CHECK (plan IN ('free', 'pro', 'enterprise')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE agent (
    id            text PRIMARY KEY,
    org_id        text NOT NULL REFERENCES org,
    parent_id     text,
    path          text[] NOT NULL CHECK (path[cardinality(path)] = id),  -- root first, this agent last
    name          text NOT NULL DEFAULT '',
    scopes        text[] NOT NULL,
    metadata      jsonb NOT NULL DEFAULT '{}',
    may_act       text[] NOT NULL DEFAULT '{}',
    grants        text[] NOT NULL DEFAULT '{}',
    max_pods      integer CHECK (max_pods >= 0),
    max_micro_h   bigint CHECK (max_micro_h >= 0),
    max_creates_min integer CHECK (max_creates_min >= 0),
    approval_above_micro bigint,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    UNIQUE (org_id, id),
    FOREIGN KEY (org_id, parent_id) REFERENCES agent (org_id, id)
);
CREATE UNIQUE INDEX agent_root ON agent (org_id) WHERE parent_id IS NULL;  -- its budget and limits are the organisation's

-- The subtree of an agent by btree: `path @> …` is not leakproof and would use no index under row-level security.
CREATE TABLE agent_path (
    org_id      text NOT NULL,
    ancestor_id text NOT NULL REFERENCES agent,
    agent_id    text NOT NULL REFERENCES agent,
    PRIMARY KEY (ancestor_id, agent_id)
);
CREATE INDEX agent_path_up ON agent_path (agent_id);

CREATE TABLE key (
    id          text PRIMARY KEY,
    org_id      text NOT NULL,
    agent_id    text NOT NULL,
    name        text NOT NULL,
    start       text NOT NULL,            -- the first characters, for people to recognise it by
    hash        bytea NOT NULL UNIQUE,    -- SHA-256 of the whole key, which has 256 random bits
    scopes      text[] NOT NULL,
    replaced_by text REFERENCES key,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    used_at     timestamptz,
    expires_at  timestamptz,
    revoked_at  timestamptz,
    FOREIGN KEY (org_id, agent_id) REFERENCES agent (org_id, id)
);
CREATE INDEX key_agent ON key (agent_id, id);

CREATE TABLE signing_key (
    kid            text PRIMARY KEY,
    alg            text NOT NULL,
    public_jwk     jsonb NOT NULL,
    private_sealed bytea,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    signs_until    timestamptz NOT NULL,
    shown_until    timestamptz NOT NULL
);

-- A JWT is checked by its signature and then here, by its jti: revocation and its own budget live on the server.
CREATE TABLE token (
    jti             text PRIMARY KEY,
    org_id          text NOT NULL,
    agent_id        text NOT NULL REFERENCES agent,    -- the subject, who pays
    actor_id        text NOT NULL REFERENCES agent,    -- who holds it
    actors          text[] NOT NULL,                   -- the chain of delegation: the subject first, who holds it last
    key_id          text REFERENCES key,
    parent_jti      text REFERENCES token ON DELETE CASCADE,
    scopes          text[] NOT NULL,
    limit_micro     bigint,
    committed_micro bigint NOT NULL DEFAULT 0 CHECK (committed_micro >= 0),
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at      timestamptz NOT NULL,
    revoked_at      timestamptz,
    CHECK (committed_micro <= limit_micro)
);
CREATE INDEX token_agent ON token (agent_id);
CREATE INDEX token_parent ON token (parent_jti);

-- No bodies: they hold secrets. `body_mac` is keyed, so that a guess at a body cannot be checked here.
CREATE TABLE idempotency (
    agent_id    text NOT NULL,
    key         text NOT NULL,
    org_id      text NOT NULL,
    route       text NOT NULL,
    body_mac    bytea NOT NULL,
    resource_id text NOT NULL,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (agent_id, key)
);
CREATE INDEX idempotency_old ON idempotency (at);
