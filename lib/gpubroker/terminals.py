"""Logs of pods and commands in them: for a pod's own agent, straight from its provider."""

import asyncio
import time
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Annotated, Final, NamedTuple

from pydantic import BeforeValidator, Field

from gpubroker import errors, inputs, pods, store
from gpubroker.inputs import Input
from gpubroker.providers import base
from gpubroker.providers.registry import Adapters
from gpubroker.resources.pods import ExecAnswer
from gpubroker.store import accounts
from gpubroker.store import pods as pod_rows
from gpubroker.times import parse_time

LOG_BYTES: Final = 1024 * 1024
"""So much of a log can be read at once, and stays readable after the pod's end."""
_FOLLOW_SECONDS: Final = 300
_HEARTBEAT_SECONDS: Final = 15
_POLL_SECONDS: Final = 0.5
_LONGEST_POLL_SECONDS: Final = 2.0
_CALL_SECONDS: Final = 30
_EXEC_GRACE_SECONDS: Final = 10
_LONGEST_LINE: Final = 64 * 1024


class LogQuery(inputs.Query):
    """Which part of a log."""

    tail: Annotated[int, Field(ge=0, le=100_000, description="So many last lines."), inputs.Whole] = 200
    since: Annotated[datetime, BeforeValidator(parse_time)] | None = None
    follow: Annotated[bool, inputs.Flag] = False


class ExecRequest(Input):
    """A command to run in the pod, with no shell unless it is one."""

    command: Annotated[list[Annotated[str, Field(max_length=32768)]], Field(min_length=1, max_length=256)]
    timeout_seconds: int = Field(default=60, ge=1, le=300)
    stdin: str | None = Field(default=None, max_length=inputs.LARGEST_BODY)


class Target(NamedTuple):
    """The instance of a pod that the caller may read or run commands in."""

    pod_id: str
    provider: str | None
    instance_id: str | None
    ended_at: datetime | None


async def find_target(tx: store.Transaction, pod_id: str, action: str) -> Target:
    """The instance behind a pod. Raises NotFound, Forbidden, NotSupported or NotRunning."""
    pod = await pods.find_view(tx, pod_id)
    if pod.agent_id != tx.known.agent_id and action not in await accounts.list_grants(tx.conn, pod.agent_id):
        msg = f"{action} of a pod belongs to its own agent."
        raise errors.Forbidden(msg, hint="Have the pod's agent do it, or grant it to those above it.")
    await pods.touch(tx, pod)
    supports = (pod.offer or pod.first_offer or {}).get("supports", [])
    if action not in supports:
        msg = f"{pod.provider or 'This provider'} gives no {action}."
        raise errors.NotSupported(msg, more={"errors": []})
    if action == "exec" and (pod.state != "running" or pod.wanted != "running" or pod.provider_instance_id is None):
        raise errors.NotRunning(
            f"The pod is {pod.state}.",
            more={"state": pod.state},
            steps=[errors.Next("GET", f"/v1/pods/{pod_id}?wait=30&until=running")],
        )
    return Target(pod_id, pod.provider, pod.provider_instance_id, pod.terminated_at)


async def execute(adapters: Adapters, target: Target, request: ExecRequest) -> ExecAnswer:
    """Run the command and wait for its end. Raises NotRunning, NotSupported or ProviderFailed."""
    if target.provider is None or target.instance_id is None:
        raise errors.NotRunning
    provider = adapters.get(target.provider)
    stdin = None if request.stdin is None else request.stdin.encode()
    call = provider.exec(target.instance_id, request.command, stdin=stdin, timeout_seconds=request.timeout_seconds)
    try:
        result = await asyncio.wait_for(call, request.timeout_seconds + _EXEC_GRACE_SECONDS)
    except (errors.InstanceNotFound, errors.Rejected):
        raise errors.NotRunning("The pod stopped running.") from None
    except errors.CannotDo as error:
        raise errors.NotSupported(error.detail, more={"errors": []}) from None
    except (errors.ProviderError, TimeoutError, OSError) as error:
        raise errors.ProviderFailed from error
    return ExecAnswer(
        exit_code=result.exit_code,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        truncated=result.truncated,
        duration_ms=result.duration_ms,
    )


async def read_log(adapters: Adapters, target: Target, query: LogQuery) -> bytes:
    """The last lines of a log."""
    page = await _read(adapters, target, None, query.since)
    return _cut_tail(page.data, query.tail)


async def _read_kept(target: Target, after: int | None, since: datetime | None) -> base.LogPage:
    """The last of the log of a pod that has ended, as it was kept; empty when there was none, or nothing that late.

    What was kept has no times of its lines: `since` a moment before the end leaves all of it.
    """
    async with store.worker() as tx:
        kept = await pod_rows.find_log(tx.conn, target.pod_id)
    if kept is None or (since is not None and target.ended_at is not None and since >= target.ended_at):
        return base.LogPage(after or 0, b"")
    starts_at, data = kept
    skipped = max(0, (after or 0) - starts_at)
    return base.LogPage(starts_at + min(skipped, len(data)), data[skipped:])


async def _read(adapters: Adapters, target: Target, after: int | None, since: datetime | None) -> base.LogPage:
    if target.provider is None or target.instance_id is None or target.ended_at is not None:
        return await _read_kept(target, after, since)
    provider = adapters.get(target.provider)
    try:
        return await asyncio.wait_for(
            provider.logs(target.instance_id, after=after, since=since, limit=LOG_BYTES), _CALL_SECONDS
        )
    except errors.InstanceNotFound:
        return await _read_kept(target, after, since)
    except errors.CannotDo as error:
        raise errors.NotSupported(error.detail, more={"errors": []}) from None
    except (errors.ProviderError, TimeoutError, OSError) as error:
        raise errors.ProviderFailed from error


def _cut_tail(data: bytes, lines: int) -> bytes:
    if lines == 0:
        return b""
    return b"\n".join(data.removesuffix(b"\n").split(b"\n")[-lines:]) + (b"\n" if data.endswith(b"\n") else b"")


async def follow_log(adapters: Adapters, target: Target, query: LogQuery, resume: str | None) -> AsyncGenerator[bytes]:
    """The log as server-sent events whose ids are byte offsets: `Last-Event-ID` goes on where another stream ended."""
    if resume is not None and not (resume.isascii() and resume.isdigit() and len(resume) < 19):  # noqa: PLR2004 - fits 64 bits
        raise inputs.invalid("Last-Event-ID", "is not an id of this stream")
    if resume is None:
        first = await _read(adapters, target, None, query.since)
        text = _cut_tail(first.data, query.tail)
        first = base.LogPage(first.starts_at + len(first.data) - len(text), text)
    else:
        first = await _read(adapters, target, int(resume), None)
    return _stream(adapters, target, first)


async def _stream(adapters: Adapters, target: Target, first: base.LogPage) -> AsyncGenerator[bytes]:
    began = last = time.monotonic()
    position, rest, pause = first.starts_at, first.data, _POLL_SECONDS
    yield b"retry: 1000\n\n"
    while time.monotonic() - began < _FOLLOW_SECONDS:
        is_over = not rest.endswith(b"\n") and await _is_over(target)
        whole, rest = _part_lines(rest, everything=is_over)
        for line in whole:
            position += len(line)
            yield _event(position, line)
            last, pause = time.monotonic(), _POLL_SECONDS
        if is_over and not whole:
            yield b"event: end\ndata:\n\n"
            return
        if time.monotonic() - last >= _HEARTBEAT_SECONDS:
            yield b": alive\n\n"
            last = time.monotonic()
        await asyncio.sleep(0 if whole else pause)
        pause = min(pause * 1.2, _LONGEST_POLL_SECONDS)
        try:
            page = await _read(adapters, target, position + len(rest), None)
        except errors.Problem:
            continue
        if page.starts_at != position + len(rest):  # the oldest part of the log was let go meanwhile
            position, rest = page.starts_at, b""
        rest += page.data


def _part_lines(data: bytes, *, everything: bool) -> tuple[list[bytes], bytes]:
    """Whole lines with their ends, and what is left; the last line counts as whole when nothing can follow, or it is long."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    rest = lines.pop()[:-1]
    if rest and (everything or len(rest) > _LONGEST_LINE):
        return [*lines, rest], b""
    return lines, rest


def _event(position: int, line: bytes) -> bytes:
    """One line as an event; its id is the offset of the byte behind it. A carriage return would end a field: it parts lines."""
    text = line.decode(errors="replace").rstrip("\r\n")
    fields = "".join(f"data: {part}\n" for part in text.replace("\r\n", "\r").split("\r"))
    return f"id: {position}\n{fields}\n".encode()


async def _is_over(target: Target) -> bool:
    async with store.worker() as tx:
        return await pod_rows.is_over(tx.conn, target.pod_id)
