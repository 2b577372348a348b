-- What can be rented: accounts at providers, their offers as last refreshed, price history, quotes.

-- `identity` is the provider's own name of the account, never our key: evidence from another account is none.
CREATE TABLE provider_account (
    id              text PRIMARY KEY,
    provider        text NOT NULL,
    identity        text NOT NULL,
    capabilities    jsonb NOT NULL DEFAULT '{}',
    distrust_until  timestamptz,      -- too much vanished at once: until then no absence is believed
    last_listing_at timestamptz,
    refreshed_at    timestamptz,      -- when its last complete refresh of offers began
    stale_after_s   integer NOT NULL DEFAULT 900,
    last_error      text,
    unhealthy_since timestamptz,
    listing_until   timestamptz,      -- a sweep of this account is under way until then
    version         bigint NOT NULL DEFAULT 1,
    UNIQUE (provider, identity)
);

CREATE TABLE refresh (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  text NOT NULL REFERENCES provider_account,
    began_at    timestamptz NOT NULL,
    ended_at    timestamptz,
    complete    boolean NOT NULL DEFAULT false,
    seen        integer,
    changed     integer,
    quarantined integer,
    error       text
);
CREATE INDEX refresh_account ON refresh (account_id, began_at DESC);

-- Written only when it changed: `observed_at` is that of the account's last complete refresh.
CREATE TABLE offer (
    id                text PRIMARY KEY,
    account_id        text NOT NULL REFERENCES provider_account,
    provider          text NOT NULL,
    provider_offer_id text NOT NULL,
    gpu               text,
    gpu_count         integer NOT NULL CHECK (gpu_count >= 0),
    vram_gb           integer,
    vcpus             numeric(6,2) NOT NULL,
    ram_gb            numeric(8,1) NOT NULL,
    disk_gb           integer NOT NULL,                 -- the most that it can have
    disk_base_gb      integer NOT NULL DEFAULT 0,       -- what the price covers
    disk_micro_gb_h   bigint NOT NULL DEFAULT 0,        -- each GB above that, micro-USD per hour
    region            text NOT NULL,
    country           text,
    spot              boolean NOT NULL DEFAULT false,
    price_micro_h     bigint NOT NULL CHECK (price_micro_h BETWEEN 1 AND 100000000000),  -- up to $100,000 an hour
    stopped_micro_h   bigint,
    min_billing_s     integer NOT NULL,
    increment_s       integer NOT NULL CHECK (increment_s > 0),
    supports          text[] NOT NULL,
    reliability       real,
    availability      text NOT NULL CHECK (availability IN ('none', 'low', 'medium', 'high')),
    per_gpu           bigint GENERATED ALWAYS AS (price_micro_h / greatest(gpu_count, 1)) STORED,
    per_vram          bigint GENERATED ALWAYS AS (           -- an offer without GPU comes last
                          CASE WHEN vram_gb * gpu_count > 0 THEN price_micro_h / (vram_gb * gpu_count)
                               ELSE 4611686018427387904 END) STORED,
    value             bigint GENERATED ALWAYS AS (           -- per GB of VRAM, and dearer the less reliable it is
                          CASE WHEN vram_gb * gpu_count > 0
                               THEN (price_micro_h / (vram_gb * gpu_count) / greatest(coalesce(reliability, 0.9), 0.1))::bigint
                               ELSE 4611686018427387904 END) STORED,
    quarantined       text,
    changed_at        timestamptz NOT NULL,
    gone_at           timestamptz,
    UNIQUE (account_id, provider_offer_id, region, spot)
);
CREATE INDEX offer_price_i ON offer (price_micro_h, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_gpu ON offer (gpu, gpu_count, price_micro_h, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_per_gpu ON offer (per_gpu, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_per_vram ON offer (per_vram, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';
CREATE INDEX offer_value ON offer (value, id)
    WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none';

-- The combinations that offers ever had. Within one, the price says nothing of the other filters, so the first 20 by index
-- are soon found: along the price alone, a search for eight H100s would read every cheaper offer first.
CREATE TABLE offer_shape (
    gpu       text NOT NULL,
    gpu_count integer NOT NULL,
    vram_gb   integer NOT NULL,
    PRIMARY KEY (gpu, gpu_count, vram_gb)
);

-- An account's version moves with every change of it or of its offers, in the same transaction: what was read under one sum
-- of versions may be shown until the next.
CREATE FUNCTION move_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := OLD.version + 1;
    RETURN NEW;
END $$;
CREATE TRIGGER version BEFORE UPDATE ON provider_account FOR EACH ROW EXECUTE FUNCTION move_version();

CREATE FUNCTION offers_version() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT d.oid || '.' || (SELECT coalesce(sum(version), 0) FROM provider_account)
      FROM pg_database d WHERE d.datname = current_database()
$$;

CREATE FUNCTION touch_accounts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE provider_account SET version = version WHERE id IN (SELECT account_id FROM changed);
    RETURN NULL;
END $$;
CREATE TRIGGER inserted AFTER INSERT ON offer REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION touch_accounts();
CREATE TRIGGER updated AFTER UPDATE ON offer REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION touch_accounts();
CREATE TRIGGER deleted AFTER DELETE ON offer REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION touch_accounts();

CREATE TABLE offer_price (
    offer_id      text NOT NULL REFERENCES offer,
    at            timestamptz NOT NULL,
    price_micro_h bigint NOT NULL,
    PRIMARY KEY (offer_id, at)
);

CREATE TABLE quote (
    id            text PRIMARY KEY,
    org_id        text NOT NULL,
    agent_id      text NOT NULL REFERENCES agent,
    offer_id      text NOT NULL,
    offer         jsonb NOT NULL,
    price_micro_h bigint NOT NULL,
    seconds       integer NOT NULL CHECK (seconds > 0),
    expires_at    timestamptz NOT NULL,
    pod_id        text UNIQUE
);
