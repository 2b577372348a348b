"""Who there is: the installation, organisations, agents as a tree, and their keys.

A child never has more than its parent: at creation it may not ask for more, and at use its rights are the intersection
along its path, so a parent that shrinks shrinks all below it at once.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import psycopg

from gpubroker import budgets, config, errors, keys, outbox, store
from gpubroker.events import AgentData
from gpubroker.ids import new_id
from gpubroker.resources import SCOPES
from gpubroker.resources.agents import (
    Agent,
    AgentChange,
    AgentRequest,
    AgentWithKey,
    Key,
    KeyRequest,
    KeyWithSecret,
    NewKey,
    Whoami,
)
from gpubroker.resources.budgets import Budget
from gpubroker.store import accounts as rows
from gpubroker.store import migrations
from gpubroker.store import tokens as token_rows
from gpubroker.times import now

_DEEPEST: Final = 32
_OWNER_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_OWNER_LENGTH: Final = 8


# The operator's side: no caller, no HTTP


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What `gpubroker bootstrap` made or found. `key` is shown once."""

    created: bool
    owner: str
    org_id: str
    org_name: str
    agent_id: str
    key: NewKey
    scopes: list[str]


def install(database_url: str, owner: str | None = None) -> str:
    """Make the installation's owner if the database has none, this or a random one, and say whose it is.

    The owner is in the reference of every instance that is ever made: the sweep touches no other.
    """
    owner = owner or "".join(secrets.choice(_OWNER_ALPHABET) for _ in range(_OWNER_LENGTH))
    with migrations.connect(database_url) as conn:
        try:
            return rows.install(conn, owner)
        except psycopg.errors.UndefinedTable:
            raise errors.SetupError("the database has no schema yet; run 'gpubroker migrate'") from None


def bootstrap(
    database_url: str, org_name: str, limit_micro: int, period: str, plan: str, *, new_key: bool
) -> Bootstrap:
    """Make an organisation, its root agent with a budget, and a key; again it changes nothing.

    The first organisation's key has `admin`. With `new_key`, an organisation that is there gets a further key.
    """
    owner = install(database_url, config.settings().owner)
    with migrations.connect(database_url) as conn, conn.transaction():
        first = rows.is_first_org(conn)
        root = rows.find_root(conn, org_name)
        created = root is None
        if root is None:
            scopes = [scope for scope in SCOPES if first or scope != "admin"]
            root = rows.Root(new_id("org"), new_id("agt"), scopes, plan)
            rows.add_org(conn, root, org_name, limit_micro, period)
        key = NewKey(id="", key=None)
        if created or new_key:
            row, text = _make_key(root.org_id, root.agent_id, "bootstrap", root.scopes, None)
            rows.add_first_key(conn, row)
            key = NewKey(id=row.id, key=text)
    return Bootstrap(created, owner, root.org_id, org_name, root.agent_id, key, root.scopes)


# Agents


async def create_agent(tx: store.Transaction, request: AgentRequest) -> AgentWithKey:
    """Make a child of the caller's agent and its first key.

    Raises ExceedsParent for scopes, an expiry or a budget that the parent does not have, Forbidden for a token with a budget.
    """
    await _refuse_capped(tx)
    parent = tx.known
    if len(parent.path) >= _DEEPEST:
        msg = f"The tree of agents is at most {_DEEPEST} deep."
        raise errors.ExceedsParent(msg, more={"errors": []})
    scopes = _narrow(request.scopes, parent.scopes)
    agent_id = new_id("agt")
    expires_at = await _bound(tx, await _end(tx, parent.path, request.expires_in), request.expires_in)
    limit, period = (request.budget.limit_usd, request.budget.period) if request.budget else (None, "total")
    if limit is not None:
        await budgets.check_limit(tx, parent.path, limit, "/budget/limit_usd")
    agent = rows.NewAgent(
        agent_id, parent.org_id, [*parent.path, agent_id], request.name, scopes, request.metadata, expires_at
    )
    await rows.add_agent(tx.conn, agent, limit, period)
    row, text = _make_key(parent.org_id, agent_id, request.name, scopes, None)
    await rows.add_key(tx.conn, row)
    made = await show_agent(tx, agent_id)
    return AgentWithKey(**dict(made), key=NewKey(id=row.id, key=text))


async def show_agent(tx: store.Transaction, agent_id: str) -> Agent:
    """An agent of the caller's subtree. Raises NotFound for any other, in the same words."""
    agent = await rows.find_agent(tx.conn, tx.known.agent_id, agent_id)
    if agent is None:
        raise errors.NotFound
    return agent


async def change_agent(tx: store.Transaction, agent_id: str, change: AgentChange) -> Agent:
    """Change an agent of the subtree.

    Of itself an agent may only lower rights, and only it names its actors and grants. Raises ExceedsParent for more than
    the parent has, Forbidden, NotFound.
    """
    caller = tx.known
    await show_agent(tx, agent_id)
    is_self = agent_id == caller.agent_id
    if not is_self and (change.may_act is not None or change.grants is not None):
        raise errors.Forbidden(
            "Only the agent itself says who may act for it and what it grants.", hint="Have that agent do it."
        )
    path = await rows.find_path(tx.conn, caller.agent_id, agent_id) or []
    *above, present = await rows.list_rights(tx.conn, path)
    wanted = await _wanted_rights(tx, change, present, path)
    is_operator = "admin" in caller.scopes and len(path) == 1
    if is_self and not is_operator and _is_raised(present, wanted):
        raise errors.Forbidden(
            "Nobody may raise a limit, scope or expiry of itself.", hint="Have an agent above do it."
        )
    _refuse_excess(present, wanted, above, caller)
    await rows.change_agent(
        tx.conn, agent_id, wanted,
        name=change.name, metadata=change.metadata, may_act=change.may_act, grants=change.grants,
    )  # fmt: skip
    return await show_agent(tx, agent_id)


async def _wanted_rights(
    tx: store.Transaction, change: AgentChange, present: rows.AgentRights, path: Sequence[str]
) -> rows.AgentRights:
    expires_at = present.expires_at
    if "expires_in" in change.model_fields_set:
        expires_at = await _end(tx, path[:-1], change.expires_in)
    limits = change.limits
    given = limits.model_fields_set if limits else set[str]()
    return rows.AgentRights(
        scopes=present.scopes if change.scopes is None else [scope for scope in SCOPES if scope in change.scopes],
        expires_at=expires_at,
        max_pods=limits.max_pods if limits and "max_pods" in given else present.max_pods,
        max_micro_h=limits.max_usd_per_hour if limits and "max_usd_per_hour" in given else present.max_micro_h,
        max_creates_min=(
            limits.max_creates_per_minute if limits and "max_creates_per_minute" in given else present.max_creates_min
        ),
    )


def _is_raised(present: rows.AgentRights, wanted: rows.AgentRights) -> bool:
    pairs = [
        (present.max_pods, wanted.max_pods),
        (present.max_micro_h, wanted.max_micro_h),
        (present.max_creates_min, wanted.max_creates_min),
    ]
    is_later = present.expires_at is not None and (wanted.expires_at is None or wanted.expires_at > present.expires_at)
    is_wider = not set(wanted.scopes) <= set(present.scopes)
    return is_later or is_wider or any(old is not None and (new is None or new > old) for old, new in pairs)


def _refuse_excess(
    present: rows.AgentRights, wanted: rows.AgentRights, above: Sequence[rows.AgentRights], caller: store.Caller
) -> None:
    """Raise ExceedsParent for what is asked anew and is more than an agent above, or the caller's credential, has."""
    given = [set(agent.scopes) for agent in above] + [set(caller.scopes)]
    found = [
        {"pointer": "/scopes", "message": f"{scope} is not among the rights above it"}
        for scope in wanted.scopes
        if scope not in present.scopes and any(scope not in scopes for scopes in given)
    ]
    named = {"max_pods": "max_pods", "max_micro_h": "max_usd_per_hour", "max_creates_min": "max_creates_per_minute"}
    for column, name in named.items():
        limits = [limit for agent in above if (limit := getattr(agent, column)) is not None]
        new = getattr(wanted, column)
        if new is not None and new != getattr(present, column) and limits and new > min(limits):
            found.append({"pointer": f"/limits/{name}", "message": "is more than an agent above it has"})
    if found:
        raise errors.ExceedsParent("A child cannot have more than its parent.", more={"errors": found})


async def revoke_agent(tx: store.Transaction, agent_id: str) -> tuple[Agent, list[str]]:
    """Revoke an agent of the subtree and all below it; names whom. Raises Forbidden for oneself and the root."""
    if agent_id == tx.known.agent_id or agent_id == tx.known.path[0]:
        await show_agent(tx, agent_id)
        raise errors.Forbidden(
            "An agent cannot be deleted by itself, and the root not at all.",
            hint="Have an agent above delete it; of the root, revoke the keys.",
        )
    await show_agent(tx, agent_id)
    revoked = await rows.revoke_agents(tx.conn, agent_id)
    for revoked_id in revoked:
        data = AgentData(agent_id=revoked_id, by=tx.known.agent_id)
        await outbox.write(tx, "agent.revoked", revoked_id, data, tenant=tx.known.org_id, agent_id=revoked_id)
    return await show_agent(tx, agent_id), revoked


async def describe_caller(tx: store.Transaction) -> Whoami:
    """Who the caller is: agent, organisation, the rights of its credential now, its budget."""
    caller = tx.known
    agent = await show_agent(tx, caller.agent_id)
    organisation = await rows.find_org(tx.conn, caller.org_id)
    if organisation is None:
        raise errors.NotFound
    return Whoami(
        agent=agent,
        organisation=organisation,
        scopes=sorted(caller.scopes),
        delegation=list(caller.actors or (caller.agent_id,)),
        budgets=[await _show_budget(tx)],
        limits=agent.limits,
    )


async def _show_budget(tx: store.Transaction) -> Budget:
    """The caller's budget; where its token has one as well, what can be held is within that too."""
    budget = await budgets.show_budget(tx, tx.known.agent_id)
    room = None if tx.known.jti is None else await token_rows.find_least_room(tx.conn, tx.known.jti)
    if room is None:
        return budget
    least = room if budget.available_usd is None else min(room, budget.available_usd)
    return budget.model_copy(update={"available_usd": least})


# Keys


async def create_key(tx: store.Transaction, request: KeyRequest) -> KeyWithSecret:
    """Make a further key of the caller's agent or of one below it, with at most the caller's own rights."""
    await _refuse_capped(tx)
    caller = tx.known
    agent = await show_agent(tx, request.agent_id or caller.agent_id)
    within = [scope for scope in agent.effective_scopes if scope in caller.scopes]
    scopes = _narrow(request.scopes, within)
    path = await rows.find_path(tx.conn, caller.agent_id, agent.id) or []
    expires_at = await _end(tx, path, request.expires_in) if request.expires_in else None
    expires_at = await _bound(tx, expires_at, request.expires_in)
    row, text = _make_key(caller.org_id, agent.id, request.name, scopes, expires_at)
    await rows.add_key(tx.conn, row)
    made = await show_key(tx, row.id)
    return KeyWithSecret(**dict(made), key=NewKey(id=row.id, key=text))


async def _refuse_capped(tx: store.Transaction) -> None:
    """Raise Forbidden for a token with a budget: what its agents and keys would spend would not count against that."""
    jti = tx.known.jti
    if jti is not None and await token_rows.find_least_room(tx.conn, jti) is not None:
        raise errors.Forbidden(
            "A token with a budget of its own makes no agents and keys: they would spend beyond it.",
            hint="Use an API key, or a token without budget_usd.",
        )


async def show_key(tx: store.Transaction, key_id: str) -> Key:
    """A key of the caller's subtree. Raises NotFound."""
    key = await rows.find_key(tx.conn, tx.known.agent_id, key_id)
    if key is None:
        raise errors.NotFound
    return key


async def rotate_key(tx: store.Transaction, key_id: str, overlap_seconds: int) -> KeyWithSecret:
    """Replace a key by a new one with the same rights; the old one lives that much longer.

    Raises NotFound, Forbidden, and Conflict for a key that is revoked, expired or replaced already.
    """
    await _refuse_capped(tx)
    old = await show_key(tx, key_id)
    caller = tx.known
    beyond = [scope for scope in old.scopes if scope not in caller.scopes]
    if beyond:
        raise errors.Forbidden(
            f"That key has rights that the caller lacks: {', '.join(beyond)}.", hint="Use a key that has them."
        )
    if not await rows.lock_live_key(tx.conn, key_id):
        raise errors.Conflict(
            "That key is revoked, expired or replaced already.",
            hint="Rotate the key that replaced it, or make a new one.",
        )
    expires_at = await _bound(tx, old.expires_at, None)
    row, text = _make_key(caller.org_id, old.agent_id, old.name, old.scopes, expires_at)
    await rows.add_key(tx.conn, row)
    await rows.replace_key(tx.conn, key_id, row.id, overlap_seconds)
    made = await show_key(tx, row.id)
    return KeyWithSecret(**dict(made), key=NewKey(id=row.id, key=text))


async def revoke_key(tx: store.Transaction, key_id: str) -> Key:
    """Revoke a key of the caller's subtree: the next request with it is refused."""
    await show_key(tx, key_id)
    await rows.revoke_key(tx.conn, key_id)
    return await show_key(tx, key_id)


def _make_key(
    org_id: str, agent_id: str, name: str, scopes: Sequence[str], expires_at: datetime | None
) -> tuple[rows.KeyRow, str]:
    key_id, text = keys.new_key()
    row = rows.KeyRow(key_id, org_id, agent_id, name, text[: keys.SHOWN], keys.hash_key(text), list(scopes), expires_at)
    return row, text


def _narrow(wanted: Sequence[str] | None, parent: Sequence[str]) -> list[str]:
    if wanted is None:
        return [scope for scope in SCOPES if scope in parent and scope != "admin"]
    beyond = [scope for scope in wanted if scope not in parent]
    if beyond:
        found = [{"pointer": "/scopes", "message": f"{scope} is not among the caller's scopes"} for scope in beyond]
        raise errors.ExceedsParent(f"The caller does not have: {', '.join(beyond)}.", more={"errors": found})
    return [scope for scope in SCOPES if scope in wanted]


async def _end(tx: store.Transaction, path: Sequence[str], expires_in: int | None) -> datetime | None:
    parents_end = await rows.first_end(tx.conn, path)
    if expires_in is None:
        return parents_end
    end = now() + timedelta(seconds=expires_in)
    if parents_end is not None and end > parents_end:
        raise _outlives("ends after the parent does")
    return end


async def _bound(tx: store.Transaction, end: datetime | None, asked: int | None) -> datetime | None:
    """The end of what a credential makes: never after its own, or a key for an hour would be one for ever."""
    own_end = await rows.credential_end(tx.conn, tx.known)
    if own_end is None or (end is not None and end <= own_end):
        return end
    if asked is not None:
        raise _outlives("ends after the credential that asks for it")
    return own_end


def _outlives(why: str) -> errors.ExceedsParent:
    found = [{"pointer": "/expires_in", "message": why}]
    return errors.ExceedsParent("A child cannot live longer than its parent.", more={"errors": found})
