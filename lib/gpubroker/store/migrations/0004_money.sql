-- Budgets, holds, phases, billed intervals, the ledger. DESIGN 8 explains.
-- LOCK ORDER: idempotency, pod, attempt, instance, hold, token, budget leaf → root; COMMIT is the next statement after budget.

-- Every agent has a row, with or without a limit of its own: so a limit set later finds what was committed before it.
CREATE TABLE budget (
    agent_id        text PRIMARY KEY REFERENCES agent,
    org_id          text NOT NULL,
    period          text NOT NULL DEFAULT 'total' CHECK (period IN ('total', 'day', 'month')),
    period_start    timestamptz NOT NULL DEFAULT '-infinity',
    limit_micro     bigint CHECK (limit_micro >= 0),
    committed_micro bigint NOT NULL DEFAULT 0 CHECK (committed_micro >= 0)  -- open holds + spent; written by functions below only
) WITH (fillfactor = 20);

-- Money set aside for a pod's whole life. `cause` is 'create' or 'extend:<n>'.
CREATE TABLE hold (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id       text NOT NULL,
    pod_id       text NOT NULL REFERENCES pod,
    cause        text NOT NULL,
    amount_micro bigint NOT NULL CHECK (amount_micro > 0),
    drawn_micro  bigint NOT NULL DEFAULT 0,
    taken_at     timestamptz NOT NULL,
    closed_at    timestamptz,
    UNIQUE (pod_id, cause),
    CHECK (drawn_micro BETWEEN 0 AND amount_micro)
);
CREATE INDEX hold_open ON hold (pod_id) WHERE closed_at IS NULL;
CREATE INDEX hold_open_of ON hold (org_id) WHERE closed_at IS NULL;

CREATE TABLE hold_budget (
    hold_id      bigint NOT NULL REFERENCES hold,
    agent_id     text NOT NULL REFERENCES budget,
    org_id       text NOT NULL,
    period_start timestamptz NOT NULL,
    PRIMARY KEY (hold_id, agent_id)
);
CREATE INDEX hold_budget_of ON hold_budget (agent_id, period_start, hold_id);

-- What an instance costs from a moment on, and who pays; written in the transaction that changes its state.
CREATE TABLE phase (
    instance_id   text NOT NULL REFERENCES instance,
    seq           integer NOT NULL,
    org_id        text,
    from_at       timestamptz NOT NULL CHECK (date_trunc('second', from_at) = from_at),
    billing       text NOT NULL CHECK (billing IN ('full', 'storage', 'none')),
    price_micro_h bigint NOT NULL CHECK (price_micro_h >= 0),
    payer         text NOT NULL CHECK (payer IN ('customer', 'operator')),
    PRIMARY KEY (instance_id, seq)
);

-- Each second of each instance once: PostgreSQL refuses overlap. `charged_micro` is what the holds paid of the amount.
CREATE TABLE usage_interval (
    id            text NOT NULL UNIQUE,
    org_id        text,
    pod_id        text,
    instance_id   text NOT NULL,
    phase_seq     integer NOT NULL,
    during        tstzrange NOT NULL,
    month         date NOT NULL,             -- the one whose statement it is on
    amount_micro  bigint NOT NULL CHECK (amount_micro >= 0),
    charged_micro bigint NOT NULL CHECK (charged_micro BETWEEN 0 AND amount_micro),
    payer         text NOT NULL CHECK (payer IN ('customer', 'operator')),
    FOREIGN KEY (instance_id, phase_seq) REFERENCES phase,
    EXCLUDE USING gist (instance_id WITH =, during WITH &&),
    CHECK (NOT isempty(during) AND lower_inc(during) AND NOT upper_inc(during)
           AND upper(during) < 'infinity' AND lower(during) > '-infinity')
);
CREATE INDEX usage_interval_pod ON usage_interval (pod_id, lower(during));
CREATE INDEX usage_interval_page ON usage_interval (org_id, id DESC);
CREATE INDEX usage_interval_month ON usage_interval (org_id, month);

CREATE TABLE ledger (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id       text,
    agent_id     text,
    pod_id       text,
    instance_id  text,
    hold_id      bigint REFERENCES hold,
    account      text NOT NULL CHECK (account IN ('usage', 'minimum', 'loss')),
    amount_micro bigint NOT NULL,
    month        date NOT NULL,
    source       text NOT NULL,
    reverses     bigint UNIQUE REFERENCES ledger,
    at           timestamptz NOT NULL DEFAULT instant(),
    UNIQUE NULLS NOT DISTINCT (source, account, hold_id),
    CHECK (account = 'loss' OR (hold_id IS NOT NULL AND pod_id IS NOT NULL)),
    CHECK ((amount_micro < 0) = (reverses IS NOT NULL))
);
CREATE INDEX ledger_month ON ledger (org_id, month, agent_id);
CREATE INDEX ledger_pod ON ledger (pod_id);

CREATE TABLE month_closed (
    month     date PRIMARY KEY,
    closed_at timestamptz NOT NULL
);

-- Billing never goes back, whoever writes.
CREATE FUNCTION keep_watermark() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.billed_until < OLD.billed_until THEN
        RAISE EXCEPTION 'billed_until of % would go back from % to %', OLD.id, OLD.billed_until, NEW.billed_until;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER watermark BEFORE UPDATE OF billed_until ON instance FOR EACH ROW EXECUTE FUNCTION keep_watermark();

-- The ledger and the intervals are append-only, for every role: a correction is a reversing entry.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME;
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON ledger FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON usage_interval FOR EACH ROW EXECUTE FUNCTION refuse_change();

-- When the present period of a budget began.
CREATE FUNCTION start_of(p_period text, p_at timestamptz) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE p_period WHEN 'total' THEN '-infinity'::timestamptz ELSE date_trunc(p_period, p_at, 'UTC') END
$$;

-- Set money aside on every budget from the agent up to its root, or raise GB001 with the agent whose limit is in the way.
CREATE FUNCTION take_hold(p_pod text, p_cause text, p_agent text, p_amount bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_now     timestamptz := instant();
    v_org     text;
    v_jti     text;
    v_hold    bigint;
    v_start   timestamptz;
    v_limit   bigint;
    v_limited boolean := false;
    v_root    text;
    b         record;
BEGIN
    SELECT org_id, token_jti INTO STRICT v_org, v_jti FROM pod
     WHERE id = p_pod AND org_id = coalesce(nullif(current_setting('gpubroker.org', true), ''), org_id);
    INSERT INTO hold (org_id, pod_id, cause, amount_micro, taken_at) VALUES (v_org, p_pod, p_cause, p_amount, v_now)
    RETURNING id INTO v_hold;
    WHILE v_jti IS NOT NULL LOOP
        UPDATE token SET committed_micro = committed_micro + p_amount
         WHERE jti = v_jti AND (limit_micro IS NULL OR committed_micro + p_amount <= limit_micro)
        RETURNING parent_jti INTO v_jti;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'GB001', MESSAGE = p_agent, DETAIL = 'token';
        END IF;
    END LOOP;
    FOR b IN
        SELECT u.id FROM agent a CROSS JOIN unnest(a.path) WITH ORDINALITY u(id, depth)
         WHERE a.id = p_agent AND a.org_id = v_org ORDER BY u.depth DESC
    LOOP
        v_root := b.id;
        UPDATE budget
           SET period_start = greatest(period_start, start_of(period, v_now)),
               committed_micro = CASE WHEN period_start >= start_of(period, v_now) THEN committed_micro ELSE 0 END + p_amount
         WHERE agent_id = b.id
           AND (limit_micro IS NULL
                OR CASE WHEN period_start >= start_of(period, v_now) THEN committed_micro ELSE 0 END + p_amount <= limit_micro)
        RETURNING period_start, limit_micro INTO v_start, v_limit;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'GB001', MESSAGE = b.id;
        END IF;
        v_limited := v_limited OR v_limit IS NOT NULL;
        INSERT INTO hold_budget (hold_id, agent_id, org_id, period_start) VALUES (v_hold, b.id, v_org, v_start);
    END LOOP;
    IF NOT v_limited THEN  -- nobody spends without a limit somewhere above him
        RAISE EXCEPTION USING ERRCODE = 'GB001', MESSAGE = coalesce(v_root, p_agent);
    END IF;
    RETURN v_hold;
END $$;

-- Give back what a hold did not spend. Only once its instances are gone and billed to their end.
CREATE FUNCTION close_hold(p_hold bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_back bigint;
    v_jti  text;
    b      record;
BEGIN
    UPDATE hold h SET closed_at = instant() FROM pod p
     WHERE h.id = p_hold AND h.closed_at IS NULL AND p.id = h.pod_id
    RETURNING h.amount_micro - h.drawn_micro, p.token_jti INTO v_back, v_jti;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    WHILE v_jti IS NOT NULL LOOP
        UPDATE token SET committed_micro = committed_micro - v_back WHERE jti = v_jti RETURNING parent_jti INTO v_jti;
    END LOOP;
    FOR b IN
        SELECT hb.agent_id FROM hold_budget hb JOIN agent a ON a.id = hb.agent_id
         WHERE hb.hold_id = p_hold ORDER BY cardinality(a.path) DESC
    LOOP
        PERFORM FROM budget WHERE agent_id = b.agent_id FOR UPDATE;  -- set_budget may have moved the hold's period
        UPDATE budget u SET committed_micro = u.committed_micro - v_back FROM hold_budget hb
         WHERE u.agent_id = b.agent_id AND hb.hold_id = p_hold AND hb.agent_id = b.agent_id AND hb.period_start = u.period_start;
    END LOOP;
END $$;

-- Set an agent's own limit and period. What is held or was spent in the period counts, whenever the limit is set.
CREATE FUNCTION set_budget(p_agent text, p_limit bigint, p_period text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    b       budget;
    v_start timestamptz;
    v_sum   bigint;
BEGIN
    SELECT * INTO STRICT b FROM budget
     WHERE agent_id = p_agent AND org_id = coalesce(nullif(current_setting('gpubroker.org', true), ''), org_id) FOR UPDATE;
    IF b.period = p_period THEN
        UPDATE budget SET limit_micro = p_limit WHERE agent_id = p_agent;
        RETURN;
    END IF;
    v_start := start_of(p_period, instant());
    UPDATE hold_budget hb SET period_start = v_start FROM hold h
     WHERE hb.agent_id = p_agent AND h.id = hb.hold_id AND h.taken_at >= v_start;
    SELECT coalesce(sum(CASE WHEN h.closed_at IS NULL THEN h.amount_micro ELSE h.drawn_micro END), 0) INTO v_sum
      FROM hold_budget hb JOIN hold h ON h.id = hb.hold_id
     WHERE hb.agent_id = p_agent AND hb.period_start = v_start;  -- what close_hold will ask: one that waited over midnight too
    UPDATE budget SET limit_micro = p_limit, period = p_period, period_start = v_start, committed_micro = v_sum
     WHERE agent_id = p_agent;
END $$;

-- From `p_at` on the instance costs this much. Never before what is billed already. The caller has locked the instance.
CREATE FUNCTION change_phase(p_instance text, p_at timestamptz, p_billing text, p_price bigint, p_payer text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    i      instance;
    v_last phase;
BEGIN
    SELECT * INTO STRICT i FROM instance WHERE id = p_instance;
    SELECT * INTO v_last FROM phase WHERE instance_id = p_instance ORDER BY seq DESC LIMIT 1;
    IF v_last.billing = p_billing AND v_last.price_micro_h = p_price AND v_last.payer = p_payer THEN
        RETURN;
    END IF;
    INSERT INTO phase (instance_id, seq, org_id, from_at, billing, price_micro_h, payer)
    VALUES (p_instance, coalesce(v_last.seq + 1, 0), i.org_id,
            greatest(date_trunc('second', p_at), i.billed_until, v_last.from_at), p_billing, p_price, p_payer);
END $$;

-- Draw an amount from the pod's open holds, oldest first; what they cannot pay is the installation's loss.
CREATE FUNCTION post_entry(p_instance instance, p_pod pod, p_account text, p_amount bigint, p_month date, p_source text)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_left bigint := p_amount;
    v_draw bigint;
    h      record;
BEGIN
    IF p_account <> 'loss' THEN
        FOR h IN SELECT id, amount_micro - drawn_micro AS room FROM hold
                  WHERE pod_id = p_pod.id AND closed_at IS NULL AND drawn_micro < amount_micro ORDER BY id FOR UPDATE
        LOOP
            EXIT WHEN v_left = 0;
            v_draw := least(v_left, h.room);
            v_left := v_left - v_draw;
            UPDATE hold SET drawn_micro = drawn_micro + v_draw WHERE id = h.id;
            INSERT INTO ledger (org_id, agent_id, pod_id, instance_id, hold_id, account, amount_micro, month, source)
            VALUES (p_pod.org_id, p_pod.agent_id, p_pod.id, p_instance.id, h.id, p_account, v_draw, p_month, p_source);
        END LOOP;
    END IF;
    IF v_left > 0 THEN
        INSERT INTO ledger (org_id, agent_id, pod_id, instance_id, account, amount_micro, month, source)
        VALUES (p_pod.org_id, p_pod.agent_id, p_pod.id, p_instance.id, 'loss', v_left, p_month, p_source);
    END IF;
    RETURN p_amount - v_left;
END $$;

-- The month that an entry of this moment is posted to: its own, or the first one that is still open.
CREATE FUNCTION posting_month(p_at timestamptz) RETURNS date LANGUAGE sql STABLE AS $$
    SELECT greatest(date_trunc('month', p_at, 'UTC') AT TIME ZONE 'UTC',
                    (SELECT max(month) + interval '1 month' FROM month_closed))::date
$$;

-- Move the watermark of an instance up to `p_until` (when it was last seen, or its end) and post what that cost.
-- Any order, any repetition, any number of callers: no second twice, none left out. Returns micro-USD charged to the customer.
CREATE FUNCTION bill(p_instance text, p_until timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    i         instance;
    p         pod;
    f         record;
    c         record;
    v_until   timestamptz;
    v_amount  bigint;
    v_paid    bigint;
    v_charged bigint := 0;
    v_payer   text;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7205759403792794);  -- no month closes meanwhile
    SELECT * INTO i FROM instance WHERE id = p_instance FOR UPDATE;
    v_until := date_trunc('second', least(p_until, i.ended_at));
    IF v_until IS NULL OR v_until <= i.billed_until OR NOT EXISTS (SELECT FROM phase WHERE instance_id = p_instance) THEN
        RETURN 0;  -- the first phase may yet begin at the create: who pays for a boot is known at its end
    END IF;
    SELECT * INTO p FROM pod WHERE id = i.pod_id;
    FOR f IN
        SELECT seq, from_at, billing, price_micro_h, payer, lead(from_at, 1, 'infinity') OVER (ORDER BY seq) AS to_at
          FROM phase WHERE instance_id = p_instance ORDER BY seq
    LOOP
        CONTINUE WHEN f.billing = 'none' OR greatest(f.from_at, i.billed_until) >= least(f.to_at, v_until);
        FOR c IN  -- cut at UTC midnight, and where the customer stops paying
            WITH span AS (
                SELECT greatest(f.from_at, i.billed_until) AS a, least(f.to_at, v_until) AS z
            ), cut AS (
                SELECT a AS at FROM span UNION SELECT z FROM span
                UNION SELECT p.charge_until FROM span WHERE p.charge_until > a AND p.charge_until < z
                UNION SELECT generate_series(date_trunc('day', a, 'UTC') + interval '24 hours', z, interval '24 hours') FROM span
            )
            SELECT at AS a, lead(at) OVER (ORDER BY at) AS z FROM cut ORDER BY at
        LOOP
            CONTINUE WHEN c.z IS NULL;
            v_amount := f.price_micro_h * extract(epoch FROM c.z - f.from_at)::bigint / 3600
                      - f.price_micro_h * extract(epoch FROM c.a - f.from_at)::bigint / 3600;  -- telescopes
            v_payer := CASE WHEN p.charge_until <= c.a THEN 'operator' ELSE f.payer END;
            v_paid := 0;
            IF v_amount > 0 THEN
                v_paid := post_entry(i, p, CASE v_payer WHEN 'customer' THEN 'usage' ELSE 'loss' END, v_amount,
                                     posting_month(c.a), p_instance || '@' || extract(epoch FROM c.a)::bigint);
            END IF;
            v_charged := v_charged + v_paid;
            INSERT INTO usage_interval (id, org_id, pod_id, instance_id, phase_seq, during, month, amount_micro, charged_micro, payer)
            VALUES (new_id('use'), i.org_id, i.pod_id, p_instance, f.seq, tstzrange(c.a, c.z), posting_month(c.a), v_amount, v_paid,
                    v_payer);
        END LOOP;
    END LOOP;
    UPDATE instance SET billed_until = v_until WHERE id = p_instance;
    RETURN v_charged;
END $$;

-- The end of a pod's money: bill every instance to its end, top up to the provider's minimum and increment, close the holds.
-- The caller has locked the pod and knows that nothing of it is alive or may still be born.
CREATE FUNCTION settle(p_pod text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p       pod;
    i       instance;
    a       attempt;
    h       record;
    v_ran   bigint;
    v_owed  bigint;
    v_due   bigint;
    v_min   bigint;
    v_inc   bigint;
BEGIN
    SELECT * INTO STRICT p FROM pod WHERE id = p_pod FOR UPDATE;
    FOR i IN SELECT * FROM instance WHERE pod_id = p_pod ORDER BY known_at, id FOR UPDATE LOOP
        CONTINUE WHEN i.role = 'stray';
        IF i.gone_at IS NULL THEN
            RAISE EXCEPTION 'instance % is not gone', i.id;
        END IF;
        PERFORM bill(i.id, i.ended_at);
        SELECT * INTO a FROM attempt WHERE id = i.attempt_id;
        SELECT sum(extract(epoch FROM upper(u.during) - lower(u.during)))::bigint, sum(u.amount_micro)::bigint
          INTO v_ran, v_owed  -- paid or not: what the holds could not pay is lost once
          FROM usage_interval u JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq
         WHERE u.instance_id = i.id AND u.payer = 'customer' AND f.billing = 'full';
        CONTINUE WHEN coalesce(v_ran, 0) = 0 OR EXISTS (SELECT FROM ledger WHERE source = i.id || '@minimum');
        v_min := (a.offer ->> 'min_billing_s')::bigint;
        v_inc := (a.offer ->> 'increment_s')::bigint;
        v_due := a.price_micro_h * greatest(v_min, (v_ran + v_inc - 1) / v_inc * v_inc) / 3600;
        IF v_due > v_owed THEN
            PERFORM post_entry(i, p, 'minimum', v_due - v_owed, posting_month(i.ended_at), i.id || '@minimum');
        END IF;
    END LOOP;
    FOR h IN SELECT id FROM hold WHERE pod_id = p_pod AND closed_at IS NULL ORDER BY id LOOP
        PERFORM close_hold(h.id);
    END LOOP;
END $$;

-- A month closes on the 3rd, 00:00 UTC, and never changes after that.
CREATE FUNCTION close_months() RETURNS SETOF date
LANGUAGE plpgsql AS $$
DECLARE
    v_month date := (date_trunc('month', instant() - interval '48 hours', 'UTC') AT TIME ZONE 'UTC')::date - interval '1 month';
BEGIN
    IF EXISTS (SELECT FROM month_closed WHERE month >= v_month) THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(7205759403792794);
    RETURN QUERY INSERT INTO month_closed (month, closed_at) VALUES (v_month, instant())
                 ON CONFLICT DO NOTHING RETURNING month;
END $$;
