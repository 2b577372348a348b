"""The commands for agents and the people beside them: what can be rented, pods, and what is done with pods.

They ask the broker at GPUBROKER_URL with GPUBROKER_API_KEY through `gpubroker.client`, as any program could.
"""

import re
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gpubroker import config, console, tables
from gpubroker.errors import GpubrokerError
from gpubroker.options import AsJson, Cursor, Limit, read_duration, read_moment, read_pairs, read_usd, write_usd

if TYPE_CHECKING:
    from gpubroker.client import Client
    from gpubroker.resources.pods import Pod

app: Final = typer.Typer()

_POD_ID: Final = re.compile(r"pod_[0-9a-hjkmnp-tv-z]{26}")
_LIVE: Final = (
    "awaiting_approval", "requested", "creating", "starting", "running", "stopping", "stopped", "interrupted", "unreachable",
)  # fmt: skip
_ENDED: Final = ("terminating", "failed", "terminated")
_COMPLETION_SECONDS: Final = 2
_EXEC_SECONDS: Final = 60
_QUIET_SECONDS: Final = 2.0
_TIMED_OUT: Final = 124
"""The exit code of a command whose time was over, as timeout(1) has it."""


def complete_pods(incomplete: str) -> list[str]:
    """Names of live pods that begin so, or ids where they begin so; none where the broker does not answer at once."""
    import asyncio

    from gpubroker.client import AsyncClient

    async def ask() -> list[str]:
        async with AsyncClient() as broker:
            page = await broker.list_pods(limit=200, state=_LIVE)
        by_id = incomplete.startswith("pod_")
        return [pod.id if by_id else pod.name or pod.id for pod in page.items]

    try:
        words = asyncio.run(asyncio.wait_for(ask(), _COMPLETION_SECONDS))
    except (GpubrokerError, TimeoutError):
        return []
    return [word for word in words if word.startswith(incomplete)]


PodName = Annotated[str, typer.Argument(metavar="POD", help="Its id or name.", autocompletion=complete_pods)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is done.")]


@app.command(rich_help_panel="Agents")
def offers(
    gpu: Annotated[list[str] | None, typer.Option(help="A GPU model such as H100; may be repeated.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", "--gpu-count", help="So many GPUs.")] = None,
    min_gpus: Annotated[int | None, typer.Option("--min-gpus", "--min-gpu-count", help="As many GPUs.")] = None,
    min_vram_gb: Annotated[int | None, typer.Option(help="Memory per GPU.")] = None,
    min_vcpus: float | None = None,
    min_ram_gb: float | None = None,
    min_disk_gb: int | None = None,
    provider: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    region: Annotated[str | None, typer.Option(help="With * and ?.")] = None,
    country: Annotated[str | None, typer.Option(help="Two letters.")] = None,
    spot: Annotated[bool | None, typer.Option(help="Only spot offers, or none.")] = None,
    max_price: Annotated[
        int | None,
        typer.Option("--max-price", "--max-price-usd-per-hour", parser=read_usd, metavar="USD", help="Per hour."),
    ] = None,
    max_price_per_gpu: Annotated[
        int | None,
        typer.Option("--max-price-per-gpu", "--max-price-usd-per-gpu-hour", parser=read_usd, metavar="USD", help="Per hour."),
    ] = None,
    supports: Annotated[list[str] | None, typer.Option(help="exec, logs, stop, ports, image, ssh; may be repeated.")] = None,
    min_reliability: Annotated[float | None, typer.Option(help="0 to 1.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those not to be had now as well.")] = False,
    sort: Annotated[str, typer.Option(help="price, price_per_gpu, price_per_vram_gb, value; -price and so on.")] = "price",
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Search what can be rented, the cheapest first."""
    filters: dict[str, Any] = {
        "gpu": gpu, "gpu_count": gpus, "min_gpu_count": min_gpus, "min_vram_gb": min_vram_gb, "min_vcpus": min_vcpus,
        "min_ram_gb": min_ram_gb, "min_disk_gb": min_disk_gb, "provider": provider, "region": region, "country": country,
        "spot": spot, "max_price_usd_per_hour": write_usd(max_price),
        "max_price_usd_per_gpu_hour": write_usd(max_price_per_gpu), "supports": supports, "min_reliability": min_reliability,
        "available": not everything, "sort": sort, "limit": limit, "cursor": cursor,
    }  # fmt: skip
    with console.connect(as_json=as_json) as broker:
        console.show(broker.list_offers(**filters), tables.of_offers, as_json=as_json)


@app.command(rich_help_panel="Agents")
def up(
    command: Annotated[list[str] | None, typer.Argument(metavar="-- CMD...", help="The program to run.")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="A GPU model such as H100; may be repeated.")] = None,
    gpus: Annotated[int | None, typer.Option(help="So many GPUs.")] = None,
    max_price: Annotated[
        int | None, typer.Option(parser=read_usd, metavar="USD", help="Per hour, for all of the offer.")
    ] = None,
    offer: Annotated[str | None, typer.Option(help="This offer and no other.")] = None,
    image: Annotated[str | None, typer.Option(help="A container image.")] = None,
    name: Annotated[str | None, typer.Option(help="Unique among your live pods.")] = None,
    budget: Annotated[int | None, typer.Option(parser=read_usd, metavar="USD", help="The most that it may ever cost.")] = None,
    lifetime: Annotated[
        int | None, typer.Option(parser=read_duration, metavar="TIME", help="Its end: 90s, 15m, 1h, 2d after now.")
    ] = None,
    port: Annotated[list[str] | None, typer.Option(metavar="N[/tcp|udp|http]", help="A port it serves; may be repeated.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="K alone takes the value from here; may be repeated.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="May be repeated.")] = None,
    disk: Annotated[int | None, typer.Option(metavar="GB", help="Disk.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would choose and hold, and do nothing.")] = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Rent a pod and run a program in it, under a hold that covers all of its life."""
    requirements: dict[str, Any] = {"gpu": gpu, "gpu_count": gpus, "max_price_usd_per_hour": write_usd(max_price)}
    requirements = {key: value for key, value in requirements.items() if value is not None}
    asked: dict[str, Any] = {
        "name": name, "image": image, "command": command, "env": _read_env(env or ()), "ports": _read_ports(port or ()),
        "disk_gb": disk, "labels": read_pairs(label or (), "--label"), "budget_usd": write_usd(budget),
        "max_lifetime_seconds": lifetime, "offer_id": offer,
        "requirements": requirements if requirements or offer is None else None,
    }  # fmt: skip
    request = {key: value for key, value in asked.items() if value is not None}
    with console.connect(as_json=as_json) as broker:
        if dry_run:
            console.show(broker.dry_run_pod(request), tables.of_dry_run, as_json=as_json)
            return
        try:
            pod = broker.create_pod(request)
        except KeyboardInterrupt:
            console.say("it may have been asked for all the same: 'gpubroker pods' shows it")
            raise
        if wait:
            pod = _watch(broker, pod)
        console.show(pod, tables.of_pod, as_json=as_json)
        if wait and pod.state != "running" and pod.exit_code != 0:
            console.say(
                f"gpubroker: the pod is {pod.state}: {pod.state_reason or pod.ends_because or 'its program ended'}"
            )
            raise typer.Exit(console.FAILED)


def _read_env(texts: Sequence[str]) -> dict[str, str]:
    given = [text for text in texts if "=" in text]
    named = {text: config.settings().variables.get(text) for text in texts if "=" not in text}
    unset = [name for name, value in named.items() if value is None]
    if unset:
        raise typer.BadParameter(f"{', '.join(unset)} is not set here", param_hint="--env")
    return read_pairs(given, "--env") | {name: value for name, value in named.items() if value is not None}


def _read_ports(texts: Sequence[str]) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = []
    for text in texts:
        number, _, protocol = text.partition("/")
        if not (number.isascii() and number.isdigit()):
            raise typer.BadParameter(f"{text!r} is no port such as 8080 or 8080/http", param_hint="--port")
        ports.append({"port": int(number), "protocol": protocol or "tcp"})
    return ports


@app.command(rich_help_panel="Agents")
def pods(
    pod: Annotated[
        str | None, typer.Argument(metavar="[POD]", help="One pod in full.", autocompletion=complete_pods)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those that have ended as well.")] = False,
    state: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="May be repeated.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: AsJson = False,
) -> None:
    """List pods, the newest first, or show one."""
    with console.connect(as_json=as_json) as broker:
        if pod is not None:
            console.show(broker.get_pod(_find_pod(broker, pod)), tables.of_pod, as_json=as_json)
            return
        states = state or (None if everything else [*_LIVE, "terminating", "failed"])
        page = broker.list_pods(state=states, label=label, limit=limit, cursor=cursor)
        console.show(page, tables.of_pods, as_json=as_json)


@app.command(rich_help_panel="Agents")
def logs(
    pod: PodName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until its program has ended.")] = False,
    tail: Annotated[int, typer.Option(help="So many last lines.")] = 200,
    since: Annotated[
        datetime | None, typer.Option(parser=read_moment, metavar="TIME", help="15m ago, or 2026-11-22T18:58:03Z.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a pod's log; the last of it stays after the pod's end."""
    if follow and as_json:
        raise typer.BadParameter("a log that goes on is no JSON document", param_hint="--json")
    with console.connect(as_json=as_json) as broker:
        pod_id = _find_pod(broker, pod)
        if follow:
            for line in broker.follow_log(pod_id, tail=tail, since=since):
                print(line, flush=True)
            return
        text = broker.read_log(pod_id, tail=tail, since=since)
        if as_json:
            console.print_json({"pod_id": pod_id, "log": text})
        else:
            sys.stdout.write(text)


@app.command("exec", rich_help_panel="Agents")
def execute(
    pod: PodName,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="No shell, unless it is one.")],
    timeout: Annotated[
        int | None, typer.Option(parser=read_duration, metavar="TIME", help="Default: 60s; at most 5m.")
    ] = None,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", "-n", help="Do not read stdin.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a command in a pod: its output, its exit code. 124: its time was over."""
    stdin = None if no_stdin else _read_stdin()
    seconds = _EXEC_SECONDS if timeout is None else timeout
    with console.connect(as_json=as_json) as broker:
        answer = broker.execute(_find_pod(broker, pod), command, timeout_seconds=seconds, stdin=stdin)
    if as_json:
        console.print_json(answer)
    else:
        sys.stdout.write(answer.stdout)
        sys.stdout.flush()
        sys.stderr.write(answer.stderr)
    if answer.truncated:
        console.say("gpubroker: the output was longer than 1 MiB; the rest is left out")
    if answer.exit_code is None and answer.duration_ms < seconds * 1000:
        console.say("gpubroker: its provider does not tell how the command ended")
        return 0
    if answer.exit_code is None:
        console.say(f"gpubroker: the command was ended after {seconds} s; --timeout gives it more")
        return _TIMED_OUT
    return answer.exit_code


def _read_stdin() -> str | None:
    """What is piped in, to its end. A pipe that stays open and silent would look like a command that hangs: say so."""
    from gpubroker.inputs import LARGEST_BODY

    if sys.stdin is None or sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison] - None where fd 0 is closed
        return None
    if not select.select([sys.stdin], [], [], _QUIET_SECONDS)[0]:
        console.say("gpubroker: reading stdin to its end; -n or < /dev/null gives the command none")
    data = sys.stdin.buffer.read(LARGEST_BODY + 1)
    if len(data) > LARGEST_BODY:
        raise typer.BadParameter("stdin is longer than 1 MiB: put it on the pod's disk in parts")
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        raise typer.BadParameter("stdin is no UTF-8 text: encode it, with base64 for instance") from None


@app.command(rich_help_panel="Agents")
def stop(pod: PodName, wait: Wait = False, as_json: AsJson = False) -> None:
    """Stop a pod and keep its disk, which may cost a little."""
    _act(lambda broker, pod_id: broker.stop_pod(pod_id), pod, wait=wait, as_json=as_json)


@app.command(rich_help_panel="Agents")
def start(pod: PodName, wait: Wait = False, as_json: AsJson = False) -> None:
    """Start a stopped pod."""
    _act(lambda broker, pod_id: broker.start_pod(pod_id), pod, wait=wait, as_json=as_json)


@app.command(rich_help_panel="Agents")
def restart(pod: PodName, wait: Wait = False, as_json: AsJson = False) -> None:
    """End a pod's program and start it anew."""
    _act(lambda broker, pod_id: broker.restart_pod(pod_id), pod, wait=wait, as_json=as_json)


@app.command(rich_help_panel="Agents")
def down(
    pod: Annotated[
        list[str] | None, typer.Argument(metavar="POD...", help="Ids or names.", autocompletion=complete_pods)
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="All pods with it; may be repeated.")] = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> int:
    """End pods, disks and all: some, or all that have a label."""
    from gpubroker.resources import Page
    from gpubroker.resources.pods import Pod

    if bool(pod) == bool(label):
        raise typer.BadParameter("either pods or --label", param_hint="POD")
    if pod and len(pod) == 1:
        _act(lambda broker, pod_id: broker.terminate_pod(pod_id), pod[0], wait=wait, as_json=as_json, gone=True)
        return 0
    with console.connect(as_json=as_json) as broker:
        ended, code = (broker.terminate_pods(label=label).items, 0) if label else _end_each(broker, pod or ())
        if wait:
            ended = [_watch(broker, one, gone=True) for one in ended]
        console.show(Page[Pod](items=ended), tables.of_pods, as_json=as_json)
    return code


def _end_each(broker: "Client", words: Sequence[str]) -> tuple[list["Pod"], int]:
    """End as many as can be; the exit code is that of the first that cannot."""
    from gpubroker.client import BrokerError

    ended: list[Pod] = []
    code = 0
    for word in words:
        try:
            ended.append(broker.terminate_pod(_find_pod(broker, word)))
        except BrokerError as error:
            told = console.tell(error)
            code = code or told
    return ended, code


def _act(action: Callable[["Client", str], "Pod"], word: str, *, wait: bool, as_json: bool, gone: bool = False) -> None:
    with console.connect(as_json=as_json) as broker:
        pod = action(broker, _find_pod(broker, word))
        if wait:
            pod = _watch(broker, pod, gone=gone)
        console.show(pod, tables.of_pod, as_json=as_json)


def _watch(broker: "Client", pod: "Pod", *, gone: bool = False) -> "Pod":
    """The pod once it is settled, or terminated where it shall be `gone`. Who stops waiting is told what goes on."""
    try:
        with console.waiting() as show_pod:
            show_pod(pod)
            for seen in broker.watch_pod(pod.id, gone=gone):
                pod = seen
                show_pod(pod)
    except KeyboardInterrupt:
        word = shlex.quote(pod.name or pod.id)
        console.say(
            f"{word} is being ended all the same" if gone else f"{word} goes on; end it with: gpubroker down {word}"
        )
        raise typer.Exit(console.INTERRUPTED) from None
    return pod


def _find_pod(broker: "Client", word: str) -> str:
    """The id of a pod by its id or name: a live one, else the newest that has ended. Raises BrokerError."""
    from gpubroker.client import BrokerError

    if _POD_ID.fullmatch(word):
        return word
    live = [pod for pod in broker.iterate_pods(state=_LIVE) if pod.name == word]
    if len(live) > 1:
        ids = ", ".join(f"{pod.id} of {pod.agent_id}" for pod in live)
        raise BrokerError({"code": "ambiguous_name", "detail": f"{word!r} is {ids}.", "hint": "Give the id."})
    if live:
        return live[0].id
    for pod in broker.iterate_pods(state=_ENDED):
        if pod.name == word:
            return pod.id
    detail, hint = f"There is no pod {word!r}.", "'gpubroker pods --all' lists those there are."
    raise BrokerError({"status": 404, "code": "not_found", "detail": detail, "hint": hint})
