"""Rows of `installation`, `org`, `agent`, `agent_path` and `key`."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.resources.agents import Agent, Key, Organisation
from gpubroker.store import Caller, Connection

_INSTALL: Final = "INSERT INTO installation (owner) VALUES (%s) ON CONFLICT DO NOTHING"
_OWNER: Final = "SELECT owner FROM installation"


def install(conn: psycopg.Connection[Any], owner: str) -> str:
    """Give the database an owner if it has none, and say whose it is."""
    conn.execute(_INSTALL, (owner,))
    row = conn.execute(_OWNER).fetchone()
    return str(row[0]) if row else owner


_ADD_ORG: Final = "INSERT INTO org (id, name, plan) VALUES (%s, %s, %s)"
_FIND_ROOT: Final = """
SELECT o.id, a.id, a.scopes, o.plan FROM org o JOIN agent a ON a.org_id = o.id AND a.parent_id IS NULL WHERE o.name = %s"""
_LOCK_ORGS: Final = "LOCK TABLE org IN SHARE ROW EXCLUSIVE MODE"
_COUNT_ORGS: Final = "SELECT count(*) FROM org"
_ADD_ROOT: Final = "INSERT INTO agent (id, org_id, path, name, scopes) VALUES (%s, %s, %s, 'root', %s)"


class Root(NamedTuple):
    """An organisation and its root agent."""

    org_id: str
    agent_id: str
    scopes: list[str]
    plan: str


def find_root(conn: psycopg.Connection[Any], org_name: str) -> Root | None:
    """Find an organisation by its name."""
    row = conn.execute(_FIND_ROOT, (org_name,)).fetchone()
    return Root(*row) if row else None


def add_org(conn: psycopg.Connection[Any], root: Root, org_name: str, limit_micro: int, period: str) -> None:
    """Make an organisation with its root agent and the budget that bounds all of it."""
    conn.execute(_ADD_ORG, (root.org_id, org_name, root.plan))
    conn.execute(_ADD_ROOT, (root.agent_id, root.org_id, [root.agent_id], root.scopes))
    conn.execute(_ADD_PATHS, (root.org_id, [root.agent_id], root.agent_id))
    conn.execute(_ADD_BUDGET, (root.agent_id, root.org_id, limit_micro, period, period))


def is_first_org(conn: psycopg.Connection[Any]) -> bool:
    """Say whether there is no organisation yet; until COMMIT nobody else can make one."""
    conn.execute(_LOCK_ORGS)
    row = conn.execute(_COUNT_ORGS).fetchone()
    return row is not None and row[0] == 0


class NewAgent(NamedTuple):
    """An agent to be written."""

    id: str
    org_id: str
    path: Sequence[str]
    name: str
    scopes: Sequence[str]
    metadata: Mapping[str, object]
    expires_at: datetime | None


_ADD_AGENT: Final = """
INSERT INTO agent (id, org_id, parent_id, path, name, scopes, metadata, expires_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"""
_ADD_PATHS: Final = "INSERT INTO agent_path (org_id, ancestor_id, agent_id) SELECT %s, unnest(%s::text[]), %s"
_ADD_BUDGET: Final = """
INSERT INTO budget (agent_id, org_id, limit_micro, period, period_start)
VALUES (%s, %s, %s, %s, start_of(%s, instant()))"""


async def add_agent(conn: Connection, agent: NewAgent, limit_micro: int | None, period: str) -> None:
    """Write an agent, its place in the tree and its budget row."""
    await conn.execute(
        _ADD_AGENT,
        (agent.id, agent.org_id, agent.path[-2], list(agent.path), agent.name, list(agent.scopes),
         Jsonb(agent.metadata, dumps=_dump), agent.expires_at),
    )  # fmt: skip
    await conn.execute(_ADD_PATHS, (agent.org_id, list(agent.path), agent.id))
    await conn.execute(_ADD_BUDGET, (agent.id, agent.org_id, limit_micro, period, period))


def _dump(value: object) -> str:
    return json.dumps(value, default=float)  # the numbers of a request's JSON are Decimals


_AGENT: Final = """
SELECT a.id, a.org_id, a.parent_id, a.name, a.scopes, a.metadata, a.may_act, a.grants, a.created_at, a.expires_at, a.revoked_at,
       ARRAY(SELECT s FROM unnest(a.scopes) s
              WHERE NOT EXISTS (SELECT FROM agent x WHERE x.id = ANY (a.path) AND NOT s = ANY (x.scopes))) AS effective_scopes,
       jsonb_build_object('max_pods', a.max_pods, 'max_usd_per_hour', a.max_micro_h,
                          'max_creates_per_minute', a.max_creates_min) AS limits
  FROM agent a JOIN agent_path p ON p.agent_id = a.id
 WHERE p.ancestor_id = %(above)s"""
_FIND_AGENT: Final = _AGENT + " AND a.id = %(id)s"
_LIST_AGENTS: Final = _AGENT + " AND (%(after)s::text IS NULL OR a.id > %(after)s) ORDER BY a.id LIMIT %(limit)s"


async def find_agent(conn: Connection, above: str, agent_id: str) -> Agent | None:
    """Find an agent in the subtree of `above`, itself included."""
    cursor = conn.cursor(row_factory=class_row(Agent))
    await cursor.execute(_FIND_AGENT, {"above": above, "id": agent_id})
    return await cursor.fetchone()


async def list_agents(conn: Connection, above: str, after: str | None, limit: int) -> list[Agent]:
    """The subtree of `above`, in the order of creation."""
    cursor = conn.cursor(row_factory=class_row(Agent))
    await cursor.execute(_LIST_AGENTS, {"above": above, "after": after, "limit": limit})
    return await cursor.fetchall()


class AgentRights(NamedTuple):
    """What an agent was given, without what its path leaves of it."""

    scopes: list[str]
    expires_at: datetime | None
    max_pods: int | None
    max_micro_h: int | None
    max_creates_min: int | None


_FIND_RIGHTS: Final = """
SELECT scopes, expires_at, max_pods, max_micro_h, max_creates_min FROM agent WHERE id = ANY (%s) ORDER BY cardinality(path)"""


async def list_rights(conn: Connection, path: Sequence[str]) -> list[AgentRights]:
    """The rights of each agent of a path, the root first."""
    cursor = conn.cursor(row_factory=class_row(AgentRights))
    await cursor.execute(_FIND_RIGHTS, (list(path),))
    return await cursor.fetchall()


_CHANGE_AGENT: Final = """
UPDATE agent SET name = coalesce(%(name)s, name), metadata = coalesce(%(metadata)s, metadata),
       may_act = coalesce(%(may_act)s, may_act), grants = coalesce(%(grants)s, grants), scopes = %(scopes)s,
       expires_at = %(expires_at)s, max_pods = %(max_pods)s, max_micro_h = %(max_micro_h)s, max_creates_min = %(max_creates_min)s
 WHERE id = %(id)s"""


async def change_agent(
    conn: Connection,
    agent_id: str,
    rights: AgentRights,
    *,
    name: str | None,
    metadata: Mapping[str, object] | None,
    may_act: Sequence[str] | None,
    grants: Sequence[str] | None,
) -> None:
    """Write an agent's rights, and of the rest what is given."""
    parameters: dict[str, object] = {name: getattr(rights, name) for name in AgentRights._fields}
    parameters |= {
        "id": agent_id,
        "name": name,
        "metadata": None if metadata is None else Jsonb(metadata, dumps=_dump),
        "may_act": None if may_act is None else list(may_act),
        "grants": None if grants is None else list(grants),
    }
    await conn.execute(_CHANGE_AGENT, parameters)


_REVOKE_AGENTS: Final = """
UPDATE agent a SET revoked_at = clock_timestamp() FROM agent_path p
 WHERE p.ancestor_id = %s AND p.agent_id = a.id AND a.revoked_at IS NULL RETURNING a.id"""


async def revoke_agents(conn: Connection, above: str) -> list[str]:
    """Revoke an agent and all below it: every credential of theirs is refused from COMMIT on. Names those it revoked."""
    return [str(row[0]) for row in await (await conn.execute(_REVOKE_AGENTS, (above,))).fetchall()]


_FIND_PATH: Final = """
SELECT a.path FROM agent a JOIN agent_path p ON p.agent_id = a.id WHERE p.ancestor_id = %s AND a.id = %s"""


async def find_path(conn: Connection, above: str, agent_id: str) -> list[str] | None:
    """The path, root first, of an agent in the subtree of `above`."""
    row = await (await conn.execute(_FIND_PATH, (above, agent_id))).fetchone()
    return row[0] if row else None


_GRANTS: Final = "SELECT grants FROM agent WHERE id = %s"


async def list_grants(conn: Connection, agent_id: str) -> list[str]:
    """What an agent lets those above it do with its pods: logs, exec."""
    row = await (await conn.execute(_GRANTS, (agent_id,))).fetchone()
    return list(row[0]) if row else []


_FIRST_END: Final = "SELECT min(expires_at) FROM agent WHERE id = ANY (%s)"
_CREDENTIAL_END: Final = """
SELECT least((SELECT expires_at FROM key WHERE id = %s),
             (SELECT expires_at FROM token WHERE jti = %s AND cardinality(actors) > 1))"""


async def first_end(conn: Connection, path: Sequence[str]) -> datetime | None:
    """When the first agent of a path expires: nothing below lives longer."""
    row = await (await conn.execute(_FIRST_END, (list(path),))).fetchone()
    return row[0] if row else None


async def credential_end(conn: Connection, caller: Caller) -> datetime | None:
    """When the caller's key expires, or the token by which it acts for another: what it makes lives no longer."""
    row = await (await conn.execute(_CREDENTIAL_END, (caller.key_id, caller.jti))).fetchone()
    return row[0] if row else None


_FIND_ORG: Final = "SELECT id, name, plan FROM org WHERE id = %s"


async def find_org(conn: Connection, org_id: str) -> Organisation | None:
    """Find an organisation."""
    cursor = conn.cursor(row_factory=class_row(Organisation))
    await cursor.execute(_FIND_ORG, (org_id,))
    return await cursor.fetchone()


_ADD_KEY: Final = """
INSERT INTO key (id, org_id, agent_id, name, start, hash, scopes, expires_at)
VALUES (%(id)s, %(org_id)s, %(agent_id)s, %(name)s, %(start)s, %(hash)s, %(scopes)s, %(expires_at)s)"""


class KeyRow(NamedTuple):
    """A key to be written: its hash, never itself."""

    id: str
    org_id: str
    agent_id: str
    name: str
    start: str
    hash: bytes
    scopes: list[str]
    expires_at: datetime | None

    def parameters(self) -> dict[str, object]:
        """The row by column."""
        return {name: getattr(self, name) for name in self._fields}


async def add_key(conn: Connection, key: KeyRow) -> None:
    """Write a key."""
    await conn.execute(_ADD_KEY, key.parameters())


def add_first_key(conn: psycopg.Connection[Any], key: KeyRow) -> None:
    """Write a key while there is no caller yet: at bootstrap."""
    conn.execute(_ADD_KEY, key.parameters())


_KEY: Final = """
SELECT k.id, k.agent_id, k.name, k.start, k.scopes, k.created_at, k.used_at, k.expires_at,
       coalesce(k.revoked_at, a.revoked_at) AS revoked_at
  FROM key k JOIN agent a ON a.id = k.agent_id JOIN agent_path p ON p.agent_id = k.agent_id
 WHERE p.ancestor_id = %(above)s"""
_FIND_KEY: Final = _KEY + " AND k.id = %(id)s"
_LIST_KEYS: Final = (
    _KEY
    + """
   AND (%(agent)s::text IS NULL OR k.agent_id = %(agent)s)
   AND (%(after)s::text IS NULL OR k.id > %(after)s) ORDER BY k.id LIMIT %(limit)s"""
)


async def find_key(conn: Connection, above: str, key_id: str) -> Key | None:
    """Find a key of the subtree of `above`."""
    cursor = conn.cursor(row_factory=class_row(Key))
    await cursor.execute(_FIND_KEY, {"above": above, "id": key_id})
    return await cursor.fetchone()


async def list_keys(conn: Connection, above: str, agent_id: str | None, after: str | None, limit: int) -> list[Key]:
    """The keys of a subtree, revoked ones too, in the order of creation; an agent that is revoked has no other."""
    cursor = conn.cursor(row_factory=class_row(Key))
    await cursor.execute(_LIST_KEYS, {"above": above, "agent": agent_id, "after": after, "limit": limit})
    return await cursor.fetchall()


_LOCK_LIVE_KEY: Final = """
SELECT id FROM key WHERE id = %s AND revoked_at IS NULL AND replaced_by IS NULL
   AND (expires_at IS NULL OR expires_at > clock_timestamp()) FOR UPDATE"""


async def lock_live_key(conn: Connection, key_id: str) -> bool:
    """Lock a key until the end of the transaction; false when it is revoked, expired or replaced."""
    return await (await conn.execute(_LOCK_LIVE_KEY, (key_id,))).fetchone() is not None


_REPLACE_KEY: Final = """
UPDATE key SET replaced_by = %(new)s, expires_at = least(expires_at, clock_timestamp() + %(overlap)s * interval '1 second')
 WHERE id = %(old)s"""


async def replace_key(conn: Connection, old_id: str, new_id: str, overlap_seconds: int) -> None:
    """A new key stands for an old one, which lives on for the overlap at the most."""
    await conn.execute(_REPLACE_KEY, {"old": old_id, "new": new_id, "overlap": overlap_seconds})


_REVOKE_KEY: Final = "UPDATE key SET revoked_at = clock_timestamp() WHERE id = %s AND revoked_at IS NULL"


async def revoke_key(conn: Connection, key_id: str) -> None:
    """Revoke a key now; again is harmless."""
    await conn.execute(_REVOKE_KEY, (key_id,))
