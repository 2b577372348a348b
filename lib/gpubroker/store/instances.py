"""Rows of `pod` as drivers work on them, and of `attempt`, `instance` and `listing`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.store import Connection
from gpubroker.store.candidates import Candidate, read_candidate

OPEN: Final = ("open", "ambiguous")


@dataclass(frozen=True, slots=True)
class PodRow:
    """A pod as a driver sees it. `now` is the database's instant at which it was read."""

    id: str
    org_id: str
    agent_id: str
    name: str | None
    version: int
    state: str
    state_reason: str | None
    billing: str
    wanted: str
    wanted_at: datetime
    charge_until: datetime | None
    due_at: datetime | None
    turn: int
    failures: int
    created_at: datetime
    ends_at: datetime
    hard_stop_at: datetime
    spec: dict[str, Any]
    candidates: list[dict[str, Any]]
    env_sealed: bytes | None
    restart_requested_at: datetime | None
    restart_done_at: datetime | None
    expiring_told_at: datetime | None
    idle_seconds: int | None
    touched_at: datetime
    exit_code: int | None
    ends_because: str | None
    running_at: datetime | None
    terminated_at: datetime | None
    now: datetime

    @property
    def idle_at(self) -> datetime | None:
        """When it will have been idle for too long, if it may not be."""
        if self.idle_seconds is None or self.state != "running":
            return None
        return self.touched_at + timedelta(seconds=self.idle_seconds)

    @property
    def warns_at(self) -> datetime | None:
        """When its coming end is told: 5 minutes or a tenth of its life before it. None: it was told."""
        if self.expiring_told_at is not None:
            return None
        return self.ends_at - min(timedelta(minutes=5), (self.ends_at - self.created_at) / 10)

    @property
    def is_restart_pending(self) -> bool:
        """A restart was asked for and not done."""
        asked, done = self.restart_requested_at, self.restart_done_at
        return asked is not None and (done is None or asked > done)


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One try at one offer; `ref` is what it is found by, whatever became of the call."""

    id: str
    org_id: str
    pod_id: str
    n: int
    account_id: str
    provider: str
    offer_id: str
    offer: dict[str, Any]
    price_micro_h: int
    ref: str
    send_before: datetime
    over_at: datetime
    state: str
    code: str | None
    looked_up: int
    at: datetime
    settled_at: datetime | None
    hold_until: datetime | None

    @property
    def candidate(self) -> Candidate:
        """The offer as it was when the pod was asked for."""
        return read_candidate(self.offer)


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """What there is at a provider, as far as we know. `life` is the last one seen or commanded."""

    id: str
    org_id: str | None
    attempt_id: str | None
    pod_id: str | None
    account_id: str
    provider_instance_id: str
    ref: str | None
    role: str
    life: str
    provider_status: str | None
    endpoints: list[dict[str, Any]]
    known_at: datetime
    seen_at: datetime | None
    commanded_at: datetime | None
    started_at: datetime | None
    billed_until: datetime
    hard_stop_at: datetime | None
    misses: int
    missed_since: datetime | None
    terminate_sent_at: datetime | None
    terminal_seen_at: datetime | None
    ended_at: datetime | None
    gone_at: datetime | None


_POD: Final = """id, org_id, agent_id, name, version, state, state_reason, billing, wanted, wanted_at, charge_until, due_at, turn,
       failures, created_at, ends_at, hard_stop_at, spec, candidates, env_sealed, restart_requested_at, restart_done_at,
       expiring_told_at, idle_seconds, touched_at, exit_code, ends_because, running_at, terminated_at, instant() AS now"""
_ATTEMPT: Final = """
SELECT id, org_id, pod_id, n, account_id, provider, offer_id, offer, price_micro_h, ref, send_before, over_at, state, code,
       looked_up, at, settled_at, hold_until FROM attempt"""
_INSTANCE: Final = """
SELECT id, org_id, attempt_id, pod_id, account_id, provider_instance_id, ref, role, life, provider_status, endpoints, known_at,
       seen_at, commanded_at, started_at, billed_until, hard_stop_at, misses, missed_since, terminate_sent_at, terminal_seen_at,
       ended_at, gone_at FROM instance"""


_CLAIM: Final = (
    """
UPDATE pod SET turn = turn + 1, due_at = instant()
       + (coalesce((SELECT max((c -> 'capabilities' ->> 'call_limit_seconds')::int) FROM jsonb_array_elements(candidates) c), 30)
          + 5) * interval '1 second'
 WHERE id = %s AND due_at <= instant() AND state <> 'terminated' RETURNING """
    + _POD
)


async def claim_pod(conn: Connection, pod_id: str) -> PodRow | None:
    """Take a due pod's next step: nobody else gets it before the lease in `due_at` is over. None: it is not due."""
    cursor = conn.cursor(row_factory=class_row(PodRow))
    await cursor.execute(_CLAIM, (pod_id,))
    return await cursor.fetchone()


_LOCK_POD: Final = "SELECT " + _POD + " FROM pod WHERE id = %s FOR UPDATE"


async def lock_pod(conn: Connection, pod_id: str) -> PodRow:
    """Lock a pod; `now` of the row is read after the lock."""
    await conn.execute("SELECT FROM pod WHERE id = %s FOR UPDATE", (pod_id,))
    cursor = conn.cursor(row_factory=class_row(PodRow))
    await cursor.execute(_LOCK_POD, (pod_id,))
    pod = await cursor.fetchone()
    if pod is None:
        msg = f"pod {pod_id} is in no table"
        raise LookupError(msg)
    return pod


_SAVE_POD: Final = """
UPDATE pod SET state = %(state)s, state_reason = %(state_reason)s, billing = %(billing)s, wanted = %(wanted)s,
       wanted_at = %(wanted_at)s, charge_until = %(charge_until)s, due_at = %(due_at)s, failures = %(failures)s,
       env_sealed = %(env_sealed)s, restart_done_at = %(restart_done_at)s, expiring_told_at = %(expiring_told_at)s,
       exit_code = %(exit_code)s,
       ends_because = %(ends_because)s, running_at = %(running_at)s, terminated_at = %(terminated_at)s, version = %(version)s
 WHERE id = %(id)s"""


async def save_pod(conn: Connection, pod: PodRow) -> None:
    """Write what a driver changed of a pod that it has locked."""
    await conn.execute(
        _SAVE_POD, {name: getattr(pod, name) for name in PodRow.__slots__ if name not in ("spec", "candidates")}
    )


_MOVE_LEASE: Final = "UPDATE pod SET due_at = %s WHERE id = %s AND turn = %s RETURNING due_at"


async def move_lease(conn: Connection, pod_id: str, turn: int, until: datetime) -> bool:
    """Keep a claimed pod for longer; false when the turn is over."""
    return await (await conn.execute(_MOVE_LEASE, (until, pod_id, turn))).fetchone() is not None


async def wake_pod(conn: Connection, pod_id: str) -> None:
    """Make a pod due now."""
    await conn.execute("UPDATE pod SET due_at = instant() WHERE id = %s AND state <> 'terminated'", (pod_id,))


async def wake_for_look(conn: Connection, pod_id: str) -> None:
    """Make a pod that rests until its end due for a look: no step under way, and no pause, is as long as this."""
    await conn.execute(
        "UPDATE pod SET due_at = instant() WHERE id = %s AND due_at > instant() + interval '3 minutes'", (pod_id,)
    )


_DUE: Final = (
    "SELECT id FROM pod WHERE due_at <= (SELECT instant()) + %s * interval '1 second' ORDER BY due_at LIMIT %s"
)


async def list_due(conn: Connection, within_seconds: float, limit: int) -> list[str]:
    """The pods that are due now or within so many seconds, the longest due first."""
    return [str(row[0]) for row in await (await conn.execute(_DUE, (within_seconds, limit))).fetchall()]


_DUE_AT: Final = """
WITH due AS (
    SELECT p.id, p.due_at, coalesce((SELECT a.provider FROM attempt a WHERE a.pod_id = p.id ORDER BY a.n DESC LIMIT 1),
                                    p.candidates -> 0 ->> 'provider', '') AS provider
      FROM pod p WHERE p.due_at <= (SELECT instant())
), placed AS (
    SELECT due.*, row_number() OVER (PARTITION BY provider ORDER BY due_at) AS place FROM due
)
SELECT id, provider FROM placed WHERE place <= %s ORDER BY due_at"""


async def list_due_at(conn: Connection, limit: int) -> list[tuple[str, str]]:
    """The pods that are due now, the longest due first, each with the provider that its step will wait for most likely.

    So many of each provider: those of one that answers nobody keep no other's pods out.
    """
    return [(str(row[0]), str(row[1])) for row in await (await conn.execute(_DUE_AT, (limit,))).fetchall()]


_EXPIRED: Final = """
SELECT id FROM pod WHERE ends_at <= (SELECT instant()) AND wanted <> 'gone'
UNION
SELECT id FROM pod WHERE idle_seconds IS NOT NULL AND state = 'running' AND wanted <> 'gone'
   AND touched_at + idle_seconds * interval '1 second' <= instant()
 LIMIT %s"""


async def list_expired(conn: Connection, limit: int) -> list[str]:
    """The pods whose time is over and whose end nobody wants yet."""
    return [str(row[0]) for row in await (await conn.execute(_EXPIRED, (limit,))).fetchall()]


_LATEST_ATTEMPT: Final = _ATTEMPT + " WHERE pod_id = %s ORDER BY n DESC"
_ATTEMPT_BY_REF: Final = _ATTEMPT + " WHERE ref = %s"
_ATTEMPT_BY_ID: Final = _ATTEMPT + " WHERE id = %s FOR UPDATE"


async def list_attempts(conn: Connection, pod_id: str) -> list[AttemptRow]:
    """A pod's attempts, the latest first."""
    cursor = conn.cursor(row_factory=class_row(AttemptRow))
    await cursor.execute(_LATEST_ATTEMPT, (pod_id,))
    return await cursor.fetchall()


async def find_attempt(conn: Connection, ref: str) -> AttemptRow | None:
    """The attempt that a reference belongs to."""
    cursor = conn.cursor(row_factory=class_row(AttemptRow))
    await cursor.execute(_ATTEMPT_BY_REF, (ref,))
    return await cursor.fetchone()


async def lock_attempt(conn: Connection, attempt_id: str) -> AttemptRow:
    """Lock an attempt."""
    cursor = conn.cursor(row_factory=class_row(AttemptRow))
    await cursor.execute(_ATTEMPT_BY_ID, (attempt_id,))
    attempt = await cursor.fetchone()
    if attempt is None:
        msg = f"attempt {attempt_id} is in no table"
        raise LookupError(msg)
    return attempt


@dataclass(frozen=True, slots=True)
class NewAttempt:
    """An attempt to be written, before its call is sent."""

    id: str
    pod: PodRow
    n: int
    candidate: Candidate
    offer: dict[str, Any]
    ref: str
    send_seconds: int
    call_seconds: int


_ADD_ATTEMPT: Final = """
INSERT INTO attempt (id, org_id, pod_id, n, account_id, provider, offer_id, offer, gpu, gpu_count, price_micro_h, ref, send_before,
                     over_at, state, at)
SELECT %(id)s, %(org_id)s, %(pod_id)s, %(n)s, %(account_id)s, %(provider)s, %(offer_id)s, %(offer)s, %(gpu)s, %(gpu_count)s,
       %(price)s, %(ref)s, t.at + %(send)s * interval '1 second', t.at + %(over)s * interval '1 second', 'open', t.at
  FROM (SELECT instant() AS at) t
RETURNING id, org_id, pod_id, n, account_id, provider, offer_id, offer, price_micro_h, ref, send_before, over_at, state, code,
          looked_up, at, settled_at, hold_until"""


async def add_attempt(conn: Connection, new: NewAttempt) -> AttemptRow:
    """Write an attempt: from here on an instance with its reference is ours."""
    c = new.candidate
    parameters = {
        "id": new.id, "org_id": new.pod.org_id, "pod_id": new.pod.id, "n": new.n, "account_id": c.account_id,
        "provider": c.provider, "offer_id": c.offer_id, "offer": Jsonb(new.offer), "gpu": c.gpu, "gpu_count": c.gpu_count,
        "price": c.price_micro_h, "ref": new.ref, "send": new.send_seconds, "over": new.send_seconds + new.call_seconds,
    }  # fmt: skip
    cursor = conn.cursor(row_factory=class_row(AttemptRow))
    await cursor.execute(_ADD_ATTEMPT, parameters)
    attempt = await cursor.fetchone()
    if attempt is None:
        msg = "INSERT … RETURNING returned nothing"
        raise LookupError(msg)
    return attempt


_SETTLE_ATTEMPT: Final = """
UPDATE attempt SET state = %(state)s, code = coalesce(%(code)s, code), detail = coalesce(%(detail)s, detail),
       settled_at = instant(), hold_until = %(hold_until)s
 WHERE id = %(id)s AND state = ANY (%(from)s)"""


async def settle_attempt(
    conn: Connection,
    attempt_id: str,
    state: str,
    *,
    code: str | None = None,
    detail: str | None = None,
    hold_until: datetime | None = None,
    leaving: Sequence[str] = OPEN,
) -> bool:
    """Move an attempt on from open or ambiguous; false when it had moved already."""
    done = await conn.execute(
        _SETTLE_ATTEMPT,
        {"id": attempt_id, "state": state, "code": code, "detail": (detail or "")[:500] or None, "hold_until": hold_until,
         "from": list(leaving)},
    )  # fmt: skip
    return done.rowcount == 1


_COUNT_LOOKUP: Final = "UPDATE attempt SET looked_up = looked_up + 1 WHERE id = %s AND state = 'ambiguous'"


async def count_lookup(conn: Connection, attempt_id: str) -> None:
    """Note that an ambiguous attempt's reference was looked up and not found."""
    await conn.execute(_COUNT_LOOKUP, (attempt_id,))


_LISTED_SINCE: Final = """
SELECT count(*)::int FROM listing WHERE account_id = %s AND complete AND began_at > %s"""


async def count_listings(conn: Connection, account_id: str, since: datetime) -> int:
    """How many complete listings of an account began after this moment."""
    row = await (await conn.execute(_LISTED_SINCE, (account_id, since))).fetchone()
    return int(row[0]) if row else 0


_LIVE_OF_POD: Final = _INSTANCE + " WHERE pod_id = %s AND role = 'live' AND gone_at IS NULL FOR UPDATE"
_LAST_OF_POD: Final = _INSTANCE + " WHERE pod_id = %s AND role = 'live' ORDER BY known_at DESC LIMIT 1"
_BY_PROVIDER_ID: Final = _INSTANCE + " WHERE account_id = %s AND provider_instance_id = %s FOR UPDATE"
_PRESENT: Final = _INSTANCE + " WHERE account_id = %s AND gone_at IS NULL ORDER BY id"
_EXPECTED: Final = """
SELECT i.id, CASE WHEN p.wanted = 'gone' THEN 'ending' ELSE 'wanted' END
  FROM instance i LEFT JOIN attempt a ON a.id = i.attempt_id LEFT JOIN pod p ON p.id = i.pod_id
 WHERE i.account_id = %s AND i.gone_at IS NULL AND greatest(i.known_at, a.settled_at) < %s - %s * interval '1 second'"""


async def _one(conn: Connection, sql: LiteralString, parameters: tuple[object, ...]) -> InstanceRow | None:
    cursor = conn.cursor(row_factory=class_row(InstanceRow))
    await cursor.execute(sql, parameters)
    return await cursor.fetchone()


async def lock_live(conn: Connection, pod_id: str) -> InstanceRow | None:
    """Lock the instance that a pod has."""
    return await _one(conn, _LIVE_OF_POD, (pod_id,))


async def find_last(conn: Connection, pod_id: str) -> InstanceRow | None:
    """The instance that a pod has or had last."""
    return await _one(conn, _LAST_OF_POD, (pod_id,))


async def lock_instance(conn: Connection, account_id: str, provider_instance_id: str) -> InstanceRow | None:
    """Lock an instance by its provider's name of it."""
    return await _one(conn, _BY_PROVIDER_ID, (account_id, provider_instance_id))


async def list_present(conn: Connection, account_id: str) -> list[InstanceRow]:
    """All instances of an account that are not proved gone."""
    cursor = conn.cursor(row_factory=class_row(InstanceRow))
    await cursor.execute(_PRESENT, (account_id,))
    return await cursor.fetchall()


async def list_expected(conn: Connection, account_id: str, began_at: datetime, lag_seconds: int) -> dict[str, str]:
    """Those that a listing begun at this moment must show, each `wanted` or `ending`.

    What is `ending` may be away: its terminate may be under way, or done and not noted yet. What was not known, or whose
    create was not answered, before the listing and the provider's lag may have been born after it.
    """
    cursor = await conn.execute(_EXPECTED, (account_id, began_at, lag_seconds))
    return {str(row[0]): str(row[1]) for row in await cursor.fetchall()}


_ADD_INSTANCE: Final = """
INSERT INTO instance (id, org_id, attempt_id, pod_id, account_id, provider_instance_id, ref, role, known_at, billed_until,
                      hard_stop_at)
VALUES (new_id('ins'), %(org_id)s, %(attempt_id)s, %(pod_id)s, %(account_id)s, %(provider_instance_id)s, %(ref)s, %(role)s,
        %(known_at)s, date_trunc('second', %(known_at)s::timestamptz), %(hard_stop_at)s)
ON CONFLICT (account_id, provider_instance_id) DO NOTHING"""


async def add_instance(
    conn: Connection,
    account_id: str,
    provider_instance_id: str,
    role: str,
    known_at: datetime,
    *,
    attempt: AttemptRow | None = None,
    ref: str | None = None,
    hard_stop_at: datetime | None = None,
) -> InstanceRow:
    """Know an instance from here on, whatever became of its pod; the row that is there when it was known before."""
    parameters = {
        "org_id": attempt.org_id if attempt else None, "attempt_id": attempt.id if attempt else None,
        "pod_id": attempt.pod_id if attempt else None, "account_id": account_id, "provider_instance_id": provider_instance_id,
        "ref": attempt.ref if attempt else ref, "role": role, "known_at": known_at, "hard_stop_at": hard_stop_at,
    }  # fmt: skip
    await conn.execute(_ADD_INSTANCE, parameters)
    instance = await lock_instance(conn, account_id, provider_instance_id)
    if instance is None:
        msg = f"instance {provider_instance_id} is in no table"
        raise LookupError(msg)
    return instance


_SAVE_INSTANCE: Final = """
UPDATE instance SET role = %(role)s, life = %(life)s, provider_status = %(provider_status)s, endpoints = %(endpoints)s,
       seen_at = %(seen_at)s, commanded_at = %(commanded_at)s, started_at = %(started_at)s, hard_stop_at = %(hard_stop_at)s,
       misses = %(misses)s, missed_since = %(missed_since)s, terminate_sent_at = %(terminate_sent_at)s,
       terminal_seen_at = %(terminal_seen_at)s
 WHERE id = %(id)s"""


async def save_instance(conn: Connection, instance: InstanceRow) -> None:
    """Write what is known anew of an instance that is locked."""
    values = {name: getattr(instance, name) for name in InstanceRow.__slots__} | {
        "endpoints": Jsonb(instance.endpoints)
    }
    await conn.execute(_SAVE_INSTANCE, values)


_MARK_GONE: Final = """
UPDATE instance SET gone_at = instant(), ended_at = %(ended_at)s, gone_evidence = %(evidence)s, life = 'gone', endpoints = '[]',
       provider_status = coalesce(%(said)s, provider_status)
 WHERE id = %(id)s AND gone_at IS NULL"""


async def mark_gone(conn: Connection, instance_id: str, ended_at: datetime, evidence: Mapping[str, object]) -> None:
    """The instance is gone, and this proves it."""
    said = evidence.get("said")
    await conn.execute(
        _MARK_GONE, {"id": instance_id, "ended_at": ended_at, "evidence": Jsonb(dict(evidence)), "said": said}
    )


_MARK_BACK: Final = """
UPDATE instance SET gone_at = NULL, gone_evidence = NULL, ended_at = NULL, role = 'stray', life = 'unknown', seen_at = %s,
       misses = 0, missed_since = NULL, terminate_sent_at = NULL, terminal_seen_at = NULL
 WHERE id = %s AND gone_at IS NOT NULL"""


async def mark_back(conn: Connection, instance_id: str, seen_at: datetime) -> None:
    """The instance was not gone: it is a stray from here on."""
    await conn.execute(_MARK_BACK, (seen_at, instance_id))


# Sweeps


_BEGIN_LISTING: Final = """
UPDATE provider_account SET listing_until = instant() + %s * interval '1 second'
 WHERE id = %s AND (listing_until IS NULL OR listing_until <= instant()) RETURNING instant()"""
_END_LISTING: Final = """
WITH noted AS (
    INSERT INTO listing (account_id, began_at, ended_at, complete, instances, error)
    VALUES (%(account)s, %(began_at)s, instant(), %(complete)s, %(instances)s, %(error)s) RETURNING complete
)
UPDATE provider_account
   SET listing_until = NULL, last_listing_at = CASE WHEN %(complete)s THEN %(began_at)s ELSE last_listing_at END
 WHERE id = %(account)s"""
_DISTRUST: Final = "UPDATE provider_account SET distrust_until = instant() + %s * interval '1 second' WHERE id = %s"
_IS_TRUSTED: Final = "SELECT distrust_until IS NULL OR distrust_until <= instant() FROM provider_account WHERE id = %s"
_ACCOUNTS: Final = """
SELECT DISTINCT a.provider FROM provider_account a
 WHERE EXISTS (SELECT FROM instance i WHERE i.account_id = a.id AND i.gone_at IS NULL)
    OR EXISTS (SELECT FROM attempt t JOIN pod p ON p.id = t.pod_id WHERE t.account_id = a.id AND p.state <> 'terminated'
                  AND t.state IN ('open', 'ambiguous', 'abandoned'))"""


async def begin_listing(conn: Connection, account_id: str, seconds: int) -> datetime | None:
    """Begin a sweep of an account; None while another one is under way."""
    row = await (await conn.execute(_BEGIN_LISTING, (seconds, account_id))).fetchone()
    return row[0] if row else None


async def end_listing(
    conn: Connection,
    account_id: str,
    began_at: datetime,
    *,
    complete: bool,
    instances: int = 0,
    error: str | None = None,
) -> None:
    """Note what a listing brought. Only a complete one is evidence."""
    await conn.execute(
        _END_LISTING,
        {
            "account": account_id,
            "began_at": began_at,
            "complete": complete,
            "instances": instances,
            "error": (error or "")[:500] or None,
        },
    )


async def distrust_account(conn: Connection, account_id: str, seconds: int) -> None:
    """Believe no absence in this account's listings for so long."""
    await conn.execute(_DISTRUST, (seconds, account_id))


async def is_trusted(conn: Connection, account_id: str) -> bool:
    """Say whether an absence in this account's listings counts."""
    row = await (await conn.execute(_IS_TRUSTED, (account_id,))).fetchone()
    return row is not None and bool(row[0])


async def list_used_providers(conn: Connection) -> list[str]:
    """The providers that have instances of ours, or may yet bear some, configured or not."""
    return [str(row[0]) for row in await (await conn.execute(_ACCOUNTS)).fetchall()]


_UNBILLED: Final = """
SELECT id, seen_at FROM instance
 WHERE gone_at IS NULL AND seen_at >= billed_until + %s * interval '1 second' ORDER BY billed_until LIMIT %s"""


async def list_unbilled(conn: Connection, seconds: int, limit: int) -> list[tuple[str, datetime]]:
    """Instances that were seen at least so many seconds after what is billed, each with when it was seen."""
    return [(str(row[0]), row[1]) for row in await (await conn.execute(_UNBILLED, (seconds, limit))).fetchall()]


_FIND_BILLABLE: Final = "SELECT id, seen_at FROM instance WHERE pod_id = %s AND seen_at IS NOT NULL"


async def list_billable(conn: Connection, pod_id: str) -> list[tuple[str, datetime]]:
    """A pod's instances that were ever seen."""
    return [(str(row[0]), row[1]) for row in await (await conn.execute(_FIND_BILLABLE, (pod_id,))).fetchall()]
