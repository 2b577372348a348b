-- Events as outbox and inbox in one: an event is written with a delivery row for each declared consumer.

CREATE TABLE event (
    id           text PRIMARY KEY,
    type         text NOT NULL,
    subject      text NOT NULL,
    tenant       text,
    agent_id     text,
    traceparent  text,
    data         jsonb NOT NULL,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    published_at timestamptz,        -- the Broker took it; until then the tick publishes it again
    tries        integer NOT NULL DEFAULT 0,
    next_at      timestamptz NOT NULL DEFAULT clock_timestamp() + interval '10 seconds'
);
CREATE INDEX event_subject ON event (subject, at);
CREATE INDEX event_unpublished ON event (next_at) WHERE published_at IS NULL;
CREATE INDEX event_old ON event (at);

-- The guard of a consumer sets done_at in the transaction of its effect. No row: 204 and no effect.
CREATE TABLE delivery (
    event_id text NOT NULL REFERENCES event ON DELETE CASCADE,
    consumer text NOT NULL,
    tenant   text,
    done_at  timestamptz,
    next_at  timestamptz NOT NULL DEFAULT clock_timestamp() + interval '60 seconds',
    tries    integer NOT NULL DEFAULT 0,
    failure  text,                   -- why the last try failed, as the dead letter said
    PRIMARY KEY (event_id, consumer)
);
CREATE INDEX delivery_due ON delivery (next_at) WHERE done_at IS NULL;

-- Schedules come twice, late and overlapping: one bucket of time is worked once.
CREATE TABLE tick (
    name   text NOT NULL,
    bucket timestamptz NOT NULL,
    PRIMARY KEY (name, bucket)
);

-- The Broker took these events. Callers may say so of their own organisation's events only, workers of all.
CREATE FUNCTION mark_published(p_ids text[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    UPDATE event SET published_at = clock_timestamp() WHERE id = ANY (p_ids) AND published_at IS NULL
$$;

-- A pod that is due, and whose events nobody acts on, has its last one published again, at most once in two seconds.
CREATE FUNCTION wake(p_pod text) RETURNS SETOF event
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    WITH last AS (
        SELECT d.event_id FROM delivery d JOIN event e ON e.id = d.event_id JOIN pod p ON p.id = e.subject
         WHERE e.subject = p_pod AND d.consumer = 'provisioning' AND p.due_at <= instant()
           AND p.org_id = current_setting('gpubroker.org', true)
         ORDER BY e.id DESC LIMIT 1
    ), locked AS (  -- of callers at once, the second sees what the first wrote
        SELECT e.id FROM last JOIN event e ON e.id = last.event_id
         WHERE e.next_at <= clock_timestamp() + interval '8 seconds'  -- an event of the last two seconds is on its way
           FOR UPDATE OF e
    ), armed AS (
        UPDATE delivery d SET done_at = NULL, next_at = clock_timestamp() + interval '60 seconds'
          FROM locked WHERE d.event_id = locked.id AND d.consumer = 'provisioning'
        RETURNING d.event_id
    )
    UPDATE event e SET next_at = clock_timestamp() + interval '10 seconds' FROM armed WHERE e.id = armed.event_id RETURNING e.*
$$;
