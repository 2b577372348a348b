"""Rows of `pod`, `pod_label` and `pod_log`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.store import Connection, Transaction
from gpubroker.store.candidates import Candidate, read_candidate

DUPLICATE_SECONDS: Final = 120
HARD_STOP_SECONDS: Final = 15 * 60
"""So long after its end a pod is ended by whoever still lives, the provider's side included."""


class NewPod(NamedTuple):
    """A pod to be written. `life_seconds` counts from the transaction's own instant."""

    id: str
    org_id: str
    agent_id: str
    token_jti: str | None
    name: str | None
    life_seconds: int
    spec: Mapping[str, object]
    candidates: Sequence[Mapping[str, object]]
    env_sealed: bytes | None
    seal_key: str | None
    price_micro_h: int
    budget_micro: int | None
    quote_id: str | None
    body_mac: bytes
    labels: Mapping[str, str]
    hold_micro: int
    idle_seconds: int | None


_ADD: Final = """
INSERT INTO pod (id, org_id, agent_id, token_jti, name, state, due_at, ends_at, hard_stop_at, spec, candidates, env_sealed,
                 seal_key, price_micro_h, budget_micro, quote_id, body_mac, idle_seconds, touched_at, created_at, wanted_at)
SELECT %(id)s, %(org_id)s, %(agent_id)s, %(token_jti)s, %(name)s, 'requested', t.at, t.at + %(life)s * interval '1 second',
       t.at + (%(life)s + %(hard_stop)s) * interval '1 second', %(spec)s, %(candidates)s, %(env_sealed)s, %(seal_key)s,
       %(price_micro_h)s, %(budget_micro)s, %(quote_id)s, %(body_mac)s, %(idle_seconds)s, t.at, t.at, t.at
  FROM (SELECT instant() AS at) t"""
_ADD_LABELS: Final = "INSERT INTO pod_label (org_id, pod_id, k, v) SELECT %s, %s, * FROM unnest(%s::text[], %s::text[])"


async def add_pod(conn: Connection, pod: NewPod) -> None:
    """Write a pod that is due now, and its labels."""
    parameters = {
        "id": pod.id,
        "org_id": pod.org_id,
        "agent_id": pod.agent_id,
        "token_jti": pod.token_jti,
        "name": pod.name,
        "life": pod.life_seconds,
        "hard_stop": HARD_STOP_SECONDS,
        "spec": Jsonb(pod.spec),
        "candidates": Jsonb(list(pod.candidates)),
        "env_sealed": pod.env_sealed,
        "seal_key": pod.seal_key,
        "price_micro_h": pod.price_micro_h,
        "idle_seconds": pod.idle_seconds,
        "budget_micro": pod.budget_micro,
        "quote_id": pod.quote_id,
        "body_mac": pod.body_mac,
    }
    await conn.execute(_ADD, parameters)
    if pod.labels:
        await conn.execute(_ADD_LABELS, (pod.org_id, pod.id, list(pod.labels), list(pod.labels.values())))


_TAKE_HOLD: Final = "SELECT take_hold(%s, %s, %s, %s)"


async def take_hold(conn: Connection, pod_id: str, cause: str, agent_id: str, amount_micro: int) -> None:
    """Set money aside on every budget of the path. Raises GB001 (see `gpubroker.budgets.limiting_agent`)."""
    await conn.execute(_TAKE_HOLD, (pod_id, cause, agent_id, amount_micro))


async def commit_with_hold(tx: Transaction, pod: NewPod) -> None:
    """Take the pod's hold and commit, in one round trip: the budgets of a tree are locked no longer than that.

    Raises GB004 for a limit of the path, GB001 for a budget.
    """
    await tx.conn.execute("SELECT check_limits(%s)", (pod.id,))
    await tx.conn.execute(_TAKE_HOLD, (pod.id, "create", pod.agent_id, pod.hold_micro))
    await tx.conn.execute("COMMIT")


_NAMED: Final = "SELECT id FROM pod WHERE agent_id = %s AND name = %s AND wanted <> 'gone'"
_SAME: Final = """
SELECT id FROM pod WHERE agent_id = %s AND body_mac = %s AND created_at > instant() - %s * interval '1 second'
   AND wanted <> 'gone' ORDER BY created_at DESC LIMIT 1"""


async def find_named(conn: Connection, agent_id: str, name: str) -> str | None:
    """The live pod of an agent that has this name."""
    row = await (await conn.execute(_NAMED, (agent_id, name))).fetchone()
    return str(row[0]) if row else None


_LOCK_SAME: Final = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"


async def find_same(conn: Connection, agent_id: str, body_mac: bytes) -> str | None:
    """A pod that an equal request of this agent made within the last two minutes and that is still wanted.

    Until the end of the transaction every equal request waits here: what is sent twice at once is a duplicate too.
    """
    await conn.execute(_LOCK_SAME, (f"{agent_id} {body_mac.hex()}",))
    row = await (await conn.execute(_SAME, (agent_id, body_mac, DUPLICATE_SECONDS))).fetchone()
    return str(row[0]) if row else None


def is_name_taken(error: psycopg.Error) -> bool:
    """Say whether another transaction took the name first."""
    return isinstance(error, psycopg.errors.UniqueViolation) and error.diag.constraint_name == "pod_name"


class PodView(NamedTuple):
    """A pod with all that its public form is made of."""

    id: str
    org_id: str
    agent_id: str
    name: str | None
    state: str
    state_reason: str | None
    billing: str
    wanted: str
    version: int
    due: bool
    spec: dict[str, Any]
    first_offer: dict[str, Any] | None
    budget_micro: int | None
    exit_code: int | None
    ends_because: str | None
    restart_pending: bool
    age_seconds: float
    created_at: datetime
    running_at: datetime | None
    ends_at: datetime
    hard_stop_at: datetime
    terminated_at: datetime | None
    labels: dict[str, str]
    attempts: list[dict[str, Any]]
    offer: dict[str, Any] | None
    provider: str | None
    provider_instance_id: str | None
    provider_status: str | None
    endpoints: list[dict[str, Any]]
    spent_micro: int
    committed_micro: int


_VIEW: Final = """
SELECT p.id, p.org_id, p.agent_id, p.name, p.state, p.state_reason, p.billing, p.wanted, p.version,
       coalesce(p.due_at <= instant(), false) AS due, p.spec, p.candidates -> 0 AS first_offer, p.budget_micro, p.exit_code,
       p.ends_because, coalesce(p.restart_requested_at > coalesce(p.restart_done_at, '-infinity'), false) AS restart_pending,
       extract(epoch FROM instant() - p.created_at)::float AS age_seconds, p.created_at, p.running_at, p.ends_at,
       p.hard_stop_at, p.terminated_at, coalesce(l.labels, '{}') AS labels, coalesce(t.attempts, '[]') AS attempts, t.offer,
       t.provider, i.provider_instance_id, i.provider_status, coalesce(i.endpoints, '[]') AS endpoints,
       coalesce(h.spent, 0)::bigint AS spent_micro, coalesce(h.committed, 0)::bigint AS committed_micro
  FROM pod p
  LEFT JOIN LATERAL (SELECT jsonb_object_agg(k, v) AS labels FROM pod_label WHERE pod_id = p.id) l ON true
  LEFT JOIN LATERAL (
      SELECT jsonb_agg(jsonb_build_object('provider', provider, 'offer_id', offer_id, 'outcome', state, 'code', code, 'at', at)
                       ORDER BY n) AS attempts,
             (array_agg(offer ORDER BY n DESC))[1] AS offer, (array_agg(provider ORDER BY n DESC))[1] AS provider
        FROM attempt WHERE pod_id = p.id) t ON true
  LEFT JOIN LATERAL (
      SELECT provider_instance_id, provider_status, CASE WHEN gone_at IS NULL THEN endpoints ELSE '[]' END AS endpoints
        FROM instance WHERE pod_id = p.id AND role = 'live' ORDER BY known_at DESC LIMIT 1) i ON true
  LEFT JOIN LATERAL (
      SELECT sum(drawn_micro) AS spent, sum(CASE WHEN closed_at IS NULL THEN amount_micro ELSE drawn_micro END) AS committed
        FROM hold WHERE pod_id = p.id) h ON true
"""
_FIND: Final = (
    _VIEW
    + """
  JOIN agent_path s ON s.agent_id = p.agent_id AND s.ancestor_id = %(above)s WHERE p.id = %(id)s"""
)
_LIST: Final = (
    _VIEW
    + """
  JOIN agent_path s ON s.agent_id = p.agent_id AND s.ancestor_id = %(above)s
 WHERE (%(states)s::text[] IS NULL OR p.state = ANY (%(states)s))
   AND (%(agent)s::text IS NULL OR p.agent_id = %(agent)s)
   AND (%(created_after)s::timestamptz IS NULL OR p.created_at > %(created_after)s)
   AND (%(keys)s::text[] IS NULL OR NOT EXISTS (
        SELECT FROM unnest(%(keys)s::text[], %(values)s::text[]) w(k, v)
         WHERE NOT EXISTS (SELECT FROM pod_label n WHERE n.org_id = p.org_id AND n.k = w.k AND n.v = w.v AND n.pod_id = p.id)))
   AND (NOT %(live)s OR p.wanted <> 'gone')
   AND (%(before)s::text IS NULL OR p.id < %(before)s)
 ORDER BY p.id DESC LIMIT %(limit)s"""
)


async def find_pod(conn: Connection, above: str, pod_id: str) -> PodView | None:
    """A pod of the subtree of `above`."""
    cursor = conn.cursor(row_factory=class_row(PodView))
    await cursor.execute(_FIND, {"above": above, "id": pod_id})
    return await cursor.fetchone()


_FIND_ANY: Final = _VIEW + " WHERE p.id = %s FOR UPDATE OF p"
_OF_PROVIDER: Final = """
SELECT id FROM pod WHERE state <> 'terminated' AND wanted <> 'gone' AND candidates -> 0 ->> 'provider' = %s ORDER BY id"""


_LIVE_OF: Final = "SELECT id FROM pod WHERE agent_id = ANY (%s) AND wanted <> 'gone' ORDER BY id"


async def list_live_of(conn: Connection, agent_ids: Sequence[str]) -> list[str]:
    """The pods of these agents whose end nobody wants yet."""
    return [str(row[0]) for row in await (await conn.execute(_LIVE_OF, (list(agent_ids),))).fetchall()]


async def find_any_pod(conn: Connection, pod_id: str) -> PodView | None:
    """A pod of any organisation, locked: for workers."""
    cursor = conn.cursor(row_factory=class_row(PodView))
    await cursor.execute(_FIND_ANY, (pod_id,))
    return await cursor.fetchone()


async def list_of_provider(conn: Connection, provider: str) -> list[str]:
    """The live pods whose first choice is an offer of this provider."""
    return [str(row[0]) for row in await (await conn.execute(_OF_PROVIDER, (provider,))).fetchall()]


class Selection(NamedTuple):
    """Which pods of a subtree: all conditions hold. `live` leaves out those whose end is wanted."""

    above: str
    states: Sequence[str] | None = None
    agent_id: str | None = None
    labels: Mapping[str, str] | None = None
    created_after: datetime | None = None
    live: bool = False


async def list_pods(conn: Connection, which: Selection, before: str | None, limit: int) -> list[PodView]:
    """Pods, the newest first."""
    cursor = conn.cursor(row_factory=class_row(PodView))
    parameters = {
        "above": which.above,
        "states": list(which.states) if which.states else None,
        "agent": which.agent_id,
        "keys": list(which.labels) if which.labels else None,
        "values": list(which.labels.values()) if which.labels else None,
        "created_after": which.created_after,
        "live": which.live,
        "before": before,
        "limit": limit,
    }
    await cursor.execute(_LIST, parameters)
    return await cursor.fetchall()


# What is wanted of a pod: written by callers, obeyed by drivers


_LOCK: Final = """
SELECT p.id FROM pod p JOIN agent_path s ON s.agent_id = p.agent_id AND s.ancestor_id = %s WHERE p.id = %s FOR UPDATE OF p"""


async def lock_pod(conn: Connection, above: str, pod_id: str) -> bool:
    """Lock a pod of the subtree of `above` until the end of the transaction; false when there is none."""
    return await (await conn.execute(_LOCK, (above, pod_id))).fetchone() is not None


_WANT_GONE: Final = """
UPDATE pod
   SET wanted = 'gone', wanted_at = instant(), state = 'terminating', state_reason = %(reason)s, version = version + 1,
       ends_because = %(because)s, due_at = instant(), failures = 0,
       charge_until = date_trunc('second', least(instant(), ends_at, %(until)s::timestamptz))
                      + %(allowance)s * interval '1 second'
 WHERE id = %(id)s AND wanted <> 'gone'"""


async def want_gone(
    conn: Connection,
    pod_id: str,
    because: str,
    allowance_seconds: int,
    until: datetime | None = None,
    reason: str | None = None,
) -> bool:
    """Want the pod's end; false when it was wanted before. Its agent pays at most the allowance from now, or from `until`, on."""
    done = await conn.execute(
        _WANT_GONE,
        {"id": pod_id, "because": because, "allowance": allowance_seconds, "until": until, "reason": reason},
    )
    return done.rowcount == 1


_WANT_STOPPED: Final = """
UPDATE pod SET wanted = 'stopped', wanted_at = instant(), state = 'stopping', state_reason = NULL, version = version + 1,
       due_at = instant(), failures = 0 WHERE id = %s"""
_WANT_RUNNING: Final = """
UPDATE pod SET wanted = 'running', wanted_at = instant(), state = 'starting', state_reason = NULL, version = version + 1,
       due_at = instant(), failures = 0 WHERE id = %s"""
_WANT_RESTART: Final = """
UPDATE pod SET wanted = 'running', wanted_at = instant(), restart_requested_at = instant(), state = 'starting',
       state_reason = NULL, version = version + 1, due_at = instant(), failures = 0 WHERE id = %s"""


async def want_stopped(conn: Connection, pod_id: str) -> None:
    """Want the pod stopped, its disk kept."""
    await conn.execute(_WANT_STOPPED, (pod_id,))


async def want_running(conn: Connection, pod_id: str) -> None:
    """Want a stopped pod running."""
    await conn.execute(_WANT_RUNNING, (pod_id,))


async def want_restart(conn: Connection, pod_id: str) -> None:
    """Want the pod's program ended and started anew."""
    await conn.execute(_WANT_RESTART, (pod_id,))


_EXTEND: Final = """
UPDATE pod SET ends_at = created_at + %(life)s * interval '1 second',
       hard_stop_at = greatest(hard_stop_at, created_at + (%(life)s + %(hard_stop)s) * interval '1 second'),
       budget_micro = coalesce(%(budget)s, budget_micro), version = version + 1, expiring_told_at = NULL, due_at = instant()
 WHERE id = %(id)s"""
_EXTEND_WITHIN: Final = """
UPDATE pod SET ends_at = created_at + %(life)s * interval '1 second', budget_micro = coalesce(%(budget)s, budget_micro),
       version = version + 1, expiring_told_at = NULL WHERE id = %(id)s"""


async def extend(
    conn: Connection, pod_id: str, life_seconds: int, budget_micro: int | None, *, move_hard_stop: bool
) -> None:
    """Move the pod's end; its hard stop too where the provider can be told."""
    parameters = {"id": pod_id, "life": life_seconds, "budget": budget_micro, "hard_stop": HARD_STOP_SECONDS}
    await conn.execute(_EXTEND if move_hard_stop else _EXTEND_WITHIN, parameters)


_CANDIDATES: Final = "SELECT candidates FROM pod WHERE id = %s"


async def list_candidates(conn: Connection, pod_id: str) -> list[Candidate]:
    """The offers that a pod may use, best first, at the prices quoted when it was asked for."""
    row = await (await conn.execute(_CANDIDATES, (pod_id,))).fetchone()
    return [read_candidate(candidate) for candidate in row[0]] if row else []


_COUNT_HOLDS: Final = "SELECT count(*)::int, coalesce(sum(amount_micro), 0)::bigint FROM hold WHERE pod_id = %s"


async def sum_holds(conn: Connection, pod_id: str) -> tuple[int, int]:
    """How many holds a pod has, and micro-USD of all of them."""
    row = await (await conn.execute(_COUNT_HOLDS, (pod_id,))).fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


_DUE_IN: Final = "SELECT extract(epoch FROM due_at - instant())::float FROM pod WHERE id = %s AND due_at IS NOT NULL"


async def due_in(conn: Connection, pod_id: str) -> float | None:
    """Seconds until a pod is due, negative when it is; None when nothing is due."""
    row = await (await conn.execute(_DUE_IN, (pod_id,))).fetchone()
    return float(row[0]) if row else None


_IS_OVER: Final = "SELECT state IN ('stopped', 'terminated', 'failed', 'interrupted') FROM pod WHERE id = %s"


async def is_over(conn: Connection, pod_id: str) -> bool:
    """Say whether the pod's program writes nothing more for now."""
    row = await (await conn.execute(_IS_OVER, (pod_id,))).fetchone()
    return row is None or bool(row[0])


_TOUCH: Final = """
UPDATE pod SET touched_at = instant() WHERE id = %s AND touched_at < instant() - interval '5 seconds'"""


async def touch_pod(conn: Connection, pod_id: str) -> None:
    """Note that its agent made a call about the pod, at most once in five seconds."""
    await conn.execute(_TOUCH, (pod_id,))


_KEEP_LOG: Final = """
INSERT INTO pod_log (pod_id, org_id, starts_at, tail, taken_at) VALUES (%s, %s, %s, %s, clock_timestamp())
ON CONFLICT (pod_id) DO UPDATE SET starts_at = excluded.starts_at, tail = excluded.tail, taken_at = excluded.taken_at"""
_FIND_LOG: Final = "SELECT starts_at, tail FROM pod_log WHERE pod_id = %s"


async def keep_log(conn: Connection, pod_id: str, org_id: str, starts_at: int, tail: bytes) -> None:
    """Keep the last of a pod's log, at most 1 MiB: it is read after the pod's end. It begins at byte `starts_at`."""
    await conn.execute(_KEEP_LOG, (pod_id, org_id, starts_at, tail))


async def find_log(conn: Connection, pod_id: str) -> tuple[int, bytes] | None:
    """What was kept of a pod's log: where it begins, and its bytes."""
    row = await (await conn.execute(_FIND_LOG, (pod_id,))).fetchone()
    return (int(row[0]), bytes(row[1])) if row else None
