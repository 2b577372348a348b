-- JWTs: the signature says who made it, this says whether it still holds. Nothing of a token is believed but its jti.

-- The rights of a token now: its own scopes within those of its key and of every agent on its subject's path. Raises GB401
-- when it, a token it came from, its key, its subject's path or its actor's path is unknown, expired or revoked.
CREATE FUNCTION authenticate_token(p_jti text, p_scope text DEFAULT NULL)
RETURNS TABLE (key_id text, org_id text, agent_id text, path text[], scopes text[], plan text, jti text, actors text[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    r        record;
    v_now    timestamptz := clock_timestamp();
    v_scopes text[];
    v_broken boolean;
BEGIN
    SELECT t.jti, t.key_id, t.agent_id, t.actor_id, t.actors, t.scopes, a.org_id, a.path, o.plan INTO r
      FROM token t JOIN agent a ON a.id = t.agent_id JOIN org o ON o.id = a.org_id WHERE t.jti = p_jti;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'GB401', MESSAGE = 'unauthenticated';
    END IF;
    WITH RECURSIVE chain AS (
        SELECT t.jti, t.parent_jti, t.key_id, t.actor_id, t.expires_at, t.revoked_at FROM token t WHERE t.jti = p_jti
        UNION ALL
        SELECT t.jti, t.parent_jti, t.key_id, t.actor_id, t.expires_at, t.revoked_at
          FROM token t JOIN chain c ON t.jti = c.parent_jti
    )
    SELECT bool_or(c.revoked_at IS NOT NULL OR c.expires_at <= v_now
                   OR k.revoked_at IS NOT NULL OR k.expires_at <= v_now
                   OR EXISTS (SELECT FROM agent b, agent x WHERE b.id = c.actor_id AND x.id = ANY (b.path)
                                 AND (x.revoked_at IS NOT NULL OR x.expires_at <= v_now)))
      INTO v_broken FROM chain c LEFT JOIN key k ON k.id = c.key_id;
    IF v_broken OR EXISTS (SELECT FROM agent x WHERE x.id = ANY (r.path) AND (x.revoked_at IS NOT NULL OR x.expires_at <= v_now)) THEN
        RAISE EXCEPTION USING ERRCODE = 'GB401', MESSAGE = 'unauthenticated';
    END IF;
    SELECT coalesce(array_agg(s), '{}') INTO v_scopes FROM unnest(r.scopes) s
     WHERE NOT EXISTS (SELECT FROM agent x WHERE x.id = ANY (r.path) AND NOT s = ANY (x.scopes))
       AND NOT EXISTS (SELECT FROM key k WHERE k.id = r.key_id AND NOT s = ANY (k.scopes));
    IF p_scope IS NOT NULL AND NOT p_scope = ANY (v_scopes) THEN
        RAISE EXCEPTION USING ERRCODE = 'GB403', MESSAGE = p_scope;
    END IF;
    PERFORM set_config('gpubroker.org', r.org_id, true), set_config('gpubroker.agent', r.agent_id, true);
    RETURN QUERY SELECT r.key_id, r.org_id, r.agent_id, r.path, v_scopes, r.plan, r.jti, r.actors;
END $$;
REVOKE ALL ON FUNCTION authenticate_token FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authenticate_token TO gpubroker_public;

-- An operator with the scope `admin` may set the budget of any organisation's root agent: for the rest of this transaction it
-- stands in that organisation. The caller checks the scope. False: this is no root agent.
CREATE FUNCTION enter_root(p_agent text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT count(set_config('gpubroker.org', org_id, true)) > 0 FROM agent WHERE id = p_agent AND parent_id IS NULL
$$;
REVOKE ALL ON FUNCTION enter_root FROM PUBLIC;
GRANT EXECUTE ON FUNCTION enter_root TO gpubroker_public;
