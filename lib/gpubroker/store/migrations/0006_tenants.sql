-- Roles and row-level security. Every transaction begins with SET LOCAL ROLE: public functions see one organisation,
-- consumers and ticks see all. Roles belong to the server, not to the database.

DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'gpubroker_public') THEN CREATE ROLE gpubroker_public NOLOGIN; END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'gpubroker_worker') THEN CREATE ROLE gpubroker_worker NOLOGIN; END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;  -- another database of this server made them just now
END $$;

GRANT USAGE ON SCHEMA public TO gpubroker_public, gpubroker_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO gpubroker_worker;
REVOKE UPDATE, DELETE ON ledger, usage_interval FROM gpubroker_worker;
REVOKE INSERT, UPDATE, DELETE ON installation, migration FROM gpubroker_worker;
GRANT SELECT ON migration TO gpubroker_public;

GRANT SELECT ON installation, org, agent, agent_path, key, signing_key, token, idempotency, provider_account, refresh, offer, offer_shape,
    offer_price, quote, pod, pod_label, pod_log, attempt, instance, budget, hold, hold_budget, phase, usage_interval, ledger,
    month_closed, event, delivery TO gpubroker_public;
GRANT INSERT ON agent, agent_path, key, token, idempotency, quote, pod, pod_label, pod_log, budget, event, delivery, signing_key
    TO gpubroker_public;
GRANT UPDATE (name, scopes, metadata, may_act, grants, max_pods, max_micro_h, max_creates_min, approval_above_micro,
    expires_at, revoked_at) ON agent TO gpubroker_public;
GRANT UPDATE (used_at, expires_at, revoked_at, replaced_by) ON key TO gpubroker_public;
GRANT UPDATE (revoked_at) ON token TO gpubroker_public;
GRANT UPDATE (pod_id) ON quote TO gpubroker_public;
GRANT UPDATE (state, state_reason, wanted, wanted_at, charge_until, due_at, version, ends_at, hard_stop_at, budget_micro,
    restart_requested_at, expiring_told_at, touched_at, ends_because, failures, turn) ON pod TO gpubroker_public;
GRANT UPDATE (published_at, next_at, tries) ON event TO gpubroker_public;
GRANT UPDATE (done_at, next_at, tries) ON delivery TO gpubroker_public;
GRANT UPDATE (starts_at, tail, taken_at) ON pod_log TO gpubroker_public;
REVOKE EXECUTE ON FUNCTION take_hold, close_hold, set_budget, mark_published, wake FROM PUBLIC;
GRANT EXECUTE ON FUNCTION take_hold, set_budget, mark_published, wake TO gpubroker_public;
GRANT EXECUTE ON FUNCTION take_hold, close_hold, set_budget, mark_published TO gpubroker_worker;

DO $$
DECLARE t text;
BEGIN
    FOREACH t IN ARRAY ARRAY['agent', 'agent_path', 'key', 'token', 'idempotency', 'quote', 'pod', 'pod_label', 'pod_log',
                             'attempt', 'instance', 'budget', 'hold', 'hold_budget', 'phase', 'usage_interval', 'ledger']
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format('CREATE POLICY tenant ON %I TO gpubroker_public USING (org_id = current_setting(''gpubroker.org'', true))', t);
        EXECUTE format('CREATE POLICY every ON %I TO gpubroker_worker USING (true)', t);
    END LOOP;
    FOREACH t IN ARRAY ARRAY['event', 'delivery'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format('CREATE POLICY tenant ON %I TO gpubroker_public USING (tenant = current_setting(''gpubroker.org'', true))', t);
        EXECUTE format('CREATE POLICY every ON %I TO gpubroker_worker USING (true)', t);
    END LOOP;
END $$;
ALTER TABLE org ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON org TO gpubroker_public USING (id = current_setting('gpubroker.org', true));
CREATE POLICY every ON org TO gpubroker_worker USING (true);

-- Who holds this key, with what rights now: the intersection of its own scopes and those of every agent on its path.
-- Raises GB401 for a key that is unknown, expired or revoked (or whose path is), GB403 when `p_scope` is not among the rights:
-- either ends the pipeline that it stands in. Sets the organisation and agent for the row-level policies.
CREATE FUNCTION authenticate(p_hash bytea, p_scope text DEFAULT NULL)
RETURNS TABLE (key_id text, org_id text, agent_id text, path text[], scopes text[], plan text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    r     record;
    v_now timestamptz := clock_timestamp();
BEGIN
    SELECT k.id, k.agent_id, k.used_at, a.org_id, a.path, o.plan,
           (SELECT coalesce(array_agg(s), '{}') FROM unnest(k.scopes) s
             WHERE NOT EXISTS (SELECT FROM agent x WHERE x.id = ANY (a.path) AND NOT s = ANY (x.scopes))) AS scopes
      INTO r
      FROM key k JOIN agent a ON a.id = k.agent_id JOIN org o ON o.id = a.org_id
     WHERE k.hash = p_hash AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > v_now)
       AND NOT EXISTS (SELECT FROM agent x WHERE x.id = ANY (a.path) AND (x.revoked_at IS NOT NULL OR x.expires_at <= v_now));
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'GB401', MESSAGE = 'unauthenticated';
    END IF;
    IF p_scope IS NOT NULL AND NOT p_scope = ANY (r.scopes) THEN
        RAISE EXCEPTION USING ERRCODE = 'GB403', MESSAGE = p_scope;
    END IF;
    IF r.used_at IS NULL OR r.used_at < v_now - interval '1 minute' THEN  -- never waits for another request of the same key
        UPDATE key SET used_at = v_now
         WHERE id IN (SELECT id FROM key WHERE id = r.id FOR UPDATE SKIP LOCKED);
    END IF;
    PERFORM set_config('gpubroker.org', r.org_id, true), set_config('gpubroker.agent', r.agent_id, true);
    RETURN QUERY SELECT r.id, r.org_id, r.agent_id, r.path, r.scopes, r.plan;
END $$;
REVOKE ALL ON FUNCTION authenticate FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authenticate TO gpubroker_public;
