-- Limits of agents beside their budgets: live pods, USD per hour of them, creates within a minute. Each counts the agent's
-- whole subtree, so an organisation's limits are its root agent's.

-- What is used of the limits of these agents now.
CREATE FUNCTION limits_used(p_agents text[])
RETURNS TABLE (agent_id text, max_pods integer, pods integer, max_micro_h bigint, micro_h bigint, max_creates_min integer, creates integer)
LANGUAGE sql STABLE AS $$
    SELECT a.id, a.max_pods, live.pods, a.max_micro_h, live.micro_h, a.max_creates_min, made.creates
      FROM agent a
     CROSS JOIN LATERAL (
           SELECT count(*)::integer AS pods, coalesce(sum(d.price_micro_h), 0)::bigint AS micro_h
             FROM agent_path s JOIN pod d ON d.agent_id = s.agent_id
            WHERE s.ancestor_id = a.id AND d.wanted <> 'gone') live
     CROSS JOIN LATERAL (
           SELECT count(*)::integer AS creates
             FROM agent_path s JOIN pod d ON d.agent_id = s.agent_id
            WHERE s.ancestor_id = a.id AND d.created_at > instant() - interval '1 minute') made
     WHERE a.id = ANY (p_agents)
$$;

-- Raise GB004 with the agent and its limit when the pod just written is one too many on its path. Creates of a tree that has
-- a limit wait for each other, until COMMIT: counting alone would let two through.
CREATE FUNCTION check_limits(p_pod text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_path    text[];
    v_limited text[];
    u         record;
BEGIN
    SELECT a.path INTO STRICT v_path FROM pod d JOIN agent a ON a.id = d.agent_id
     WHERE d.id = p_pod AND d.org_id = coalesce(nullif(current_setting('gpubroker.org', true), ''), d.org_id);
    SELECT array_agg(id) INTO v_limited FROM agent
     WHERE id = ANY (v_path) AND (max_pods IS NOT NULL OR max_micro_h IS NOT NULL OR max_creates_min IS NOT NULL);
    IF v_limited IS NULL THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('limits ' || v_path[1], 0));
    FOR u IN SELECT * FROM limits_used(v_limited) LOOP
        IF u.pods > u.max_pods OR u.micro_h > u.max_micro_h OR u.creates > u.max_creates_min THEN
            RAISE EXCEPTION USING ERRCODE = 'GB004', MESSAGE = u.agent_id,
                DETAIL = CASE WHEN u.pods > u.max_pods THEN 'max_pods'
                              WHEN u.micro_h > u.max_micro_h THEN 'max_usd_per_hour' ELSE 'max_creates_per_minute' END;
        END IF;
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION check_limits FROM PUBLIC;
GRANT EXECUTE ON FUNCTION check_limits TO gpubroker_public;
