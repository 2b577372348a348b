"""The broker's power is cut, its pods' is not: whatever state they were in, all of them are found and billed once."""

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row
from tests.dev import Dev, bootstrap, started_at, wait_until

from gpubroker.machine import control, folder, processes, record

SEED = int(os.environ.get("GPUBROKER_KILL_SEED", "1"))
ROUNDS = int(os.environ.get("GPUBROKER_KILL_ROUNDS", "1"))
STATES = ("creating", "stopping", "requested", "starting", "restarting", "terminating", "running", "stopped")
"""What is waited for in turn before the power is cut; the other pods are in other states then."""
MOST_PODS = 3
ENVIRONMENT = {
    "GPUBROKER_LOCAL_VCPUS": "16", "GPUBROKER_LOCAL_RAM_GB": "16", "GPUBROKER_TICK_SECONDS": "1",
    "GPUBROKER_LOCAL_PRICE_USD_PER_HOUR": "1.234567",
}  # fmt: skip
PROGRAMS = {
    "mild": ["sleep", "1000"],
    "stubborn": ["sh", "-c", "trap '' TERM; while true; do sleep 1; done"],  # it is killed after 5 s, or 2 at its end
    "brief": ["sleep", "3"],
}
_STATE = """
SELECT id, CASE WHEN state = 'starting' AND restart_requested_at > coalesce(restart_done_at, '-infinity') THEN 'restarting'
                ELSE state END AS state FROM pod WHERE state <> 'terminated'"""


@dataclass
class Site:
    """One data folder, and the broker that lives there again and again."""

    data: Path
    dice: random.Random
    dev: Dev | None = None
    key: str = ""
    ready: dict[str, Any] = field(default_factory=dict)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    seen: Counter[str] = field(default_factory=Counter)
    """The states that pods were in when the power was cut."""

    @property
    def pods(self) -> str:
        return str(self.data / "pods")

    @property
    def now(self) -> Dev:
        assert self.dev is not None
        return self.dev

    def start(self) -> None:
        self.began = datetime.now(UTC)
        self.dev = Dev(self.data, "--json", **ENVIRONMENT)

    def wait(self) -> None:
        self.ready = self.now.ready()
        self.key = self.key or bootstrap(self.data)

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self.ready["database_url"], autocommit=True, row_factory=dict_row)

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        with self.connect() as conn:
            return conn.execute(sql, parameters).fetchall()

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.ready["url"], headers={"Authorization": f"Bearer {self.key}"}, timeout=30, trust_env=False
        )

    # Its end

    def tree(self) -> set[int]:
        """All of the broker's processes, and none of a pod."""
        every = processes.descendants(self.now.process.pid)
        keepers = {pid for pid in every if b"machine/__main__.py" in command(pid)}
        spared = keepers.union(*(processes.descendants(pid) for pid in keepers))
        return every - spared

    def cut_power(self) -> None:
        """The broker, PostgreSQL and Valkey are killed at one moment; no supervisor is."""
        tree = self.tree()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.end(tree)

    def kill_main(self) -> None:
        """Only the process that has all functions is killed: nothing of the broker may outlive it."""
        self.end(self.tree())

    def end(self, tree: set[int]) -> None:
        began = {pid: started_at(pid) for pid in tree}
        self.now.process.kill()
        self.now.process.communicate()
        self.now.log.close()
        wait_until(lambda: not any(started_at(pid) == at for pid, at in began.items() if at))
        self.dev = None

    def close(self) -> None:
        if self.dev is not None:
            self.cut_power()
        for ref in folder.live(self.pods) if Path(self.pods).exists() else ():
            processes.kill(pid for pid in processes.marked(ref))
            processes.kill(pid for pid in pids_with(f"{self.pods}/{ref}"))


def command(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def pids_with(word: str) -> set[int]:
    return {int(p.name) for p in Path("/proc").glob("[0-9]*") if word.encode() in command(int(p.name))}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "data", random.Random(SEED))
    try:
        yield made
    finally:
        made.close()


# What agents do


async def prepare(site: Site, least: int) -> list[dict[str, Any]]:
    """So many pods that run or are stopped, of every kind."""
    async with site.client() as http:
        listed = (await http.get("/v1/pods", params={"state": ["running", "stopped"], "limit": 200})).json()["items"]
        missing = max(0, least - len(listed))
        kinds = ["mild", "stubborn", "mild", "stubborn", "stubborn"]
        made = await asyncio.gather(*(create(http, kinds[n % len(kinds)], wait=20) for n in range(missing)))
    return [*listed, *(answer.json() for answer in made)]


async def create(http: httpx.AsyncClient, kind: str, *, wait: int = 0, life: int = 3000) -> httpx.Response:
    body = {"command": PROGRAMS[kind], "requirements": {}, "labels": {"kind": kind}, "max_lifetime_seconds": life}
    return await http.post(f"/v1/pods?duplicate=allow&until=running&wait={wait}", json=body)


async def act(site: Site, pods: list[dict[str, Any]], target: str) -> None:
    """Everything at once; whatever is under way when the power goes has no answer."""
    dice = site.dice
    async with site.client() as http:
        work = [create(http, dice.choice(["mild", "stubborn", "brief"])) for _ in range(2)]
        work.append(create(http, "mild", life=10))
        running = [pod for pod in pods if pod["state"] == "running"]
        dice.shuffle(running)
        running.sort(key=lambda pod: pod["labels"]["kind"] != "stubborn")
        if running:
            work.append(http.post(f"/v1/pods/{running.pop(-1 if target == 'stopped' else 0)['id']}/stop"))
        if running:
            work.append(http.post(f"/v1/pods/{running.pop(0)['id']}/restart"))
        work += [http.delete(f"/v1/pods/{pod['id']}") for pod in running[: max(1, len(running) - MOST_PODS)]]
        work += [http.post(f"/v1/pods/{pod['id']}/start") for pod in pods if pod["state"] == "stopped"]
        answers = await asyncio.gather(*work, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, httpx.Response):
            assert answer.status_code in (200, 202, 409), answer.text
        else:
            assert isinstance(answer, httpx.TransportError), answer


async def freeze(site: Site, target: str) -> None:
    """Stop the broker's clock at the moment when a pod is in this state, or soon after."""
    with site.connect() as conn:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            if any(row["state"] == target for row in conn.execute(_STATE)):
                break
            await asyncio.sleep(0.001)
        await asyncio.sleep(site.dice.choice([0, 0, site.dice.uniform(0, 0.3)]))
        site.now.process.send_signal(signal.SIGSTOP)
        states = Counter(row["state"] for row in conn.execute(_STATE))
    site.seen += states


async def live_through(site: Site, number: int) -> None:
    target = STATES[number % len(STATES)]
    pods = await prepare(site, 5)
    if number == 0:
        async with site.client() as http:
            await http.post(f"/v1/pods/{pods[0]['id']}/stop?wait=20")
        pods[0]["state"] = "stopped"
    doing = asyncio.create_task(act(site, pods, target))
    await freeze(site, target)
    site.cut_power() if number % 2 == 0 else site.kill_main()
    await doing


# What must be so


def check_processes(site: Site) -> None:
    """After two sweeps every process is a pod's."""
    swept = "SELECT count(*) AS n FROM listing WHERE complete AND began_at > %s"
    wait_until(lambda: site.query(swept, site.began)[0]["n"] >= 2, 15)
    known = {
        row["ref"]
        for row in site.query(
            """SELECT a.ref FROM instance i JOIN attempt a ON a.id = i.attempt_id JOIN pod p ON p.id = i.pod_id
                WHERE i.role = 'live' AND i.gone_at IS NULL AND p.state <> 'terminated'"""
        )
    }
    there = set(folder.live(site.pods))
    assert there <= known, f"nobody's: {there - known}"
    ours = f"{processes.MARK}=gb-{site.ready['owner']}-".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = [word for word in path.read_bytes().split(b"\0") if word.startswith(ours)]
        except OSError:
            continue
        assert not found or found[0].partition(b"=")[2].decode() in known, command(int(path.parent.name))


def ran(site: Site, ref: str) -> int:
    """Seconds by the supervisor's own record."""
    try:
        intervals = record.billed_intervals(control.read_record(site.pods, ref))
    except FileNotFoundError:  # the create was never sent
        return 0
    return sum(int(end or time.time()) - int(begin) for begin, end in intervals)


_SECONDS = "coalesce(sum(extract(epoch FROM upper(u.during) - lower(u.during))), 0)::int AS seconds"


async def check_bill(site: Site) -> None:
    """Everything is ended; then the bill is the supervisors' record, to the second."""
    async with site.client() as http:
        answer = await http.delete("/v1/pods", params={"created_after": "2020-01-01T00:00:00Z"})
        assert answer.status_code == 202, answer.text
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not site.query(_STATE), 40)
        assert not site.query("SELECT * FROM pod WHERE state <> 'terminated'")
        usage = (await http.get("/v1/usage")).json()
        (budget,) = (await http.get("/v1/budgets")).json()["items"]
    billed = site.query(
        f"""SELECT a.ref, i.role, {_SECONDS} FROM attempt a LEFT JOIN instance i ON i.attempt_id = a.id
              LEFT JOIN usage_interval u ON u.instance_id = i.id WHERE a.state <> 'rejected' GROUP BY 1, 2"""
    )
    compared = {row["ref"]: (row["role"], row["seconds"], ran(site, row["ref"])) for row in billed}
    wrong = {ref: told for ref, told in compared.items() if told[1] != told[2]}
    assert not wrong, f"billed and ran: {wrong}"
    assert len(billed) > 5
    paid = site.query(f"SELECT {_SECONDS} FROM usage_interval u WHERE payer = 'customer'")
    assert usage["total"]["seconds"] == paid[0]["seconds"] > 0
    assert (budget["held_usd"], budget["spent_usd"]) == ("0.000000", usage["total"]["amount_usd"])
    assert not site.query(
        """SELECT a.id FROM usage_interval a JOIN usage_interval b USING (instance_id)
            WHERE a.id < b.id AND a.during && b.during"""
    )
    assert folder.live(site.pods) == []


@pytest.mark.anyio
async def test_the_power_is_cut_in_every_state_and_nothing_is_lost_or_billed_twice(site: Site, capsys: Any) -> None:
    site.start()
    site.wait()
    for number in range(ROUNDS):
        await live_through(site, number)
        site.start()
        if site.dice.random() < 0.3:  # and once more before it is up
            await asyncio.sleep(site.dice.uniform(0.2, 3))
            site.kill_main() if site.dice.random() < 0.5 else site.cut_power()
            site.start()
        site.wait()
        check_processes(site)
    await check_bill(site)
    if len(STATES) <= ROUNDS:
        assert set(STATES) <= set(site.seen), site.seen
        with capsys.disabled():
            sys.stdout.write(f"\n{ROUNDS} rounds, seed {SEED}, states when killed: {dict(site.seen)}\n")
