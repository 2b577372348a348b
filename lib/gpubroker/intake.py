"""Commands that come as CloudEvents: each is carried out once by its agent, source and id, and answered by an event.

The claim is written in the transaction of the effect: whoever dies, however often it is sent, now or in a year, it happens once.
What is refused for good is refused once too; what may be tried again (503, 429, 409) leaves no trace.
"""

import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from pydantic import ValidationError

from gpubroker import errors, idempotency, outbox, pod_requests, pods, store
from gpubroker.consumer import Incoming
from gpubroker.events import COMMANDS, CommandData
from gpubroker.inputs import Input
from gpubroker.pods import Opener
from gpubroker.resources.commands import CommandAnswer
from gpubroker.store import commands as rows

ROUTE: Final = "POST /v1/intake"
SCOPE: Final = "pods:write"


class _Forgotten(Exception):
    """It was carried out, but whoever did it could not say so, and by now nobody knows what it made."""


class TerminateCommand(Input):
    """The pod that shall end; or the event's subject names it."""

    pod_id: str


async def carry_out(open_transaction: Opener, event: Incoming) -> CommandAnswer:
    """Carry out one command, or say what became of it before. Raises the problems after which it may be sent again."""
    command = COMMANDS.get(event.type)
    if command is None:
        known = ", ".join(COMMANDS)
        raise errors.Invalid(f"{event.type} is no command; there are: {known}.", more={"errors": []})
    mac = idempotency.mac_body([event.type, event.subject, event.data])
    async with open_transaction() as tx:
        if SCOPE not in tx.known.scopes:
            raise errors.Forbidden(f"This needs the scope {SCOPE}.", more={"scope": SCOPE})
        taken = await rows.find(tx, event.source, event.id)
        if taken is not None and taken.body_mac != mac:
            raise errors.IdempotencyKeyReused(f"The event {event.id} of {event.source} was something else before.")
        if taken is not None and taken.status is not None:
            return _answer(event, taken, replayed=True)
    try:
        if command == "provision":
            pod_id = await _provision(open_transaction, event, mac)
        else:
            pod_id = await _terminate(open_transaction, event, mac)
        said = rows.Taken(mac, "done", pod_id, None, None)
    except _Forgotten:
        said = rows.Taken(mac, "done", None, None, "it was carried out before; what it made is not known any more")
    except errors.Problem as problem:
        if problem.retryable:
            raise
        said = rows.Taken(mac, "refused", None, problem.slug, problem.detail)
    return await _settle(open_transaction, event, command, said)


async def _provision(open_transaction: Opener, event: Incoming, mac: bytes) -> str:
    request = _read(pod_requests.PodRequest, event.data)

    @asynccontextmanager
    async def open_claimed() -> AsyncGenerator[store.Transaction]:
        async with open_transaction() as tx:
            is_new = await rows.claim(tx, event.source, event.id, mac)
            if not is_new and await idempotency.find_made(tx, key) is None:
                raise _Forgotten
            yield tx

    name = hashlib.sha256(f"{event.source}\0{event.id}".encode()).hexdigest()
    key = idempotency.Request(f"event:{name}", ROUTE, [event.type, event.data])
    pod_id, _ = await pod_requests.request_pod(
        open_claimed, cast("pod_requests.PodRequest", request), key, allow_duplicate=True
    )
    return pod_id


async def _terminate(open_transaction: Opener, event: Incoming, mac: bytes) -> str:
    data = event.data if event.data is not None else {"pod_id": event.subject}
    command = cast("TerminateCommand", _read(TerminateCommand, data))
    async with open_transaction() as tx:
        if await rows.claim(tx, event.source, event.id, mac):
            await pods.terminate(tx, command.pod_id)
    return command.pod_id


async def _settle(open_transaction: Opener, event: Incoming, command: str, said: rows.Taken) -> CommandAnswer:
    async with open_transaction() as tx:
        await rows.claim(tx, event.source, event.id, said.body_mac)  # what was refused has no effect that claimed it
        if not await rows.settle(tx, event.source, event.id, said):
            before = await rows.find(tx, event.source, event.id)
            return _answer(event, before or said, replayed=True)
        caller = tx.known
        data = CommandData(
            command=command, command_id=event.id, command_source=event.source, agent_id=caller.agent_id,
            pod_id=said.pod_id, code=said.code, detail=said.detail,
        )  # fmt: skip
        what = f"command.{said.status}"
        await outbox.write(tx, what, event.id, data, tenant=caller.org_id, agent_id=caller.agent_id)
    return _answer(event, said, replayed=False)


def _read(model: type[Input], data: object) -> Input:
    if not isinstance(data, Mapping):
        raise errors.Invalid("The event's data is not a JSON object.", more={"errors": []})
    try:
        return model.model_validate(cast("Mapping[str, Any]", data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "/".join(map(str, first["loc"]))
        raise errors.Invalid(f"/data/{place}: {first['msg']}.", more={"errors": []}) from None


def _answer(event: Incoming, said: rows.Taken, *, replayed: bool) -> CommandAnswer:
    return CommandAnswer(
        id=event.id,
        source=event.source,
        status="refused" if said.status == "refused" else "done",
        replayed=replayed,
        pod_id=said.pod_id,
        code=said.code,
        detail=said.detail,
    )
