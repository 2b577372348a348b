-- Since when an organisation is on its plan, and when that ends: it is on the free one then.
ALTER TABLE org ADD COLUMN plan_since timestamptz NOT NULL DEFAULT clock_timestamp(), ADD COLUMN plan_ends_at timestamptz;
UPDATE org SET plan_since = created_at;

-- Callers write no organisation: these stand in one that a caller with `admin` names, and change the plan of that one alone.
CREATE FUNCTION enter_org(p_org text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT count(set_config('gpubroker.org', id, true)) > 0 FROM org WHERE id = p_org
$$;
CREATE FUNCTION set_plan(p_plan text, p_ends_at timestamptz) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    UPDATE org SET plan_since = CASE WHEN plan = p_plan THEN plan_since ELSE instant() END, plan = p_plan, plan_ends_at = p_ends_at
     WHERE id = current_setting('gpubroker.org', true)
$$;
REVOKE ALL ON FUNCTION enter_org, set_plan FROM PUBLIC;
GRANT EXECUTE ON FUNCTION enter_org, set_plan TO gpubroker_public;
