-- Many callers at once, who want to know no more than who they are: a row for each, in their order. `refusal` is the state
-- that `authenticate` or `authenticate_token` raises for one alone. The transaction stands in no organisation after it.
CREATE FUNCTION authenticate_all(p_hashes bytea[], p_jtis text[], p_scopes text[])
RETURNS TABLE (refusal text, key_id text, org_id text, agent_id text, path text[], scopes text[], plan text, jti text, actors text[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
#variable_conflict use_column
BEGIN
    FOR i IN 1 .. cardinality(p_scopes) LOOP
        BEGIN
            IF p_jtis[i] IS NULL THEN
                RETURN QUERY SELECT NULL::text, a.key_id, a.org_id, a.agent_id, a.path, a.scopes, a.plan, NULL::text, '{}'::text[]
                               FROM authenticate(p_hashes[i], p_scopes[i]) a;
            ELSE
                RETURN QUERY SELECT NULL::text, a.key_id, a.org_id, a.agent_id, a.path, a.scopes, a.plan, a.jti, a.actors
                               FROM authenticate_token(p_jtis[i], p_scopes[i]) a;
            END IF;
        EXCEPTION WHEN SQLSTATE 'GB401' OR SQLSTATE 'GB403' THEN
            refusal := SQLSTATE;
            RETURN NEXT;
            refusal := NULL;
        END;
    END LOOP;
    PERFORM set_config('gpubroker.org', '', true), set_config('gpubroker.agent', '', true);
END $$;
REVOKE ALL ON FUNCTION authenticate_all FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authenticate_all TO gpubroker_public;
