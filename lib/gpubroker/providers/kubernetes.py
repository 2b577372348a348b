"""`kubernetes`: the operator's own cluster. A pod is a Job with GPUs, in a namespace that has nothing else.

It has no state of its own: every look is made of what the API says (`gpubroker.cluster` says which objects there are, and what
their states mean). The API is consistent, so that a record that says `gone` and no pod left prove an end at once.
"""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Final, Self

from gpubroker.cluster import journal, objects, rental, states
from gpubroker.cluster.client import Cluster, NotThere, Object
from gpubroker.config import Settings
from gpubroker.errors import AmbiguousOutcome, CannotDo, CredentialRefused, ProviderError, Rejected, Throttled
from gpubroker.providers.base import (
    Capabilities,
    Created,
    ExecResult,
    Instance,
    LogPage,
    Provider,
    ProviderOffer,
    Spec,
    Support,
)

_LOOK_SECONDS: Final = 0.25
_RUNNING_SECONDS: Final = 2.0
"""So long a create waits to see it run: with the image on the node that is often enough."""
_SCHEDULED_SECONDS: Final = 8.0
_ENDED_SECONDS: Final = 15.0
_KEPT: Final = timedelta(days=1)
_BELONGINGS: Final = (
    "batch/v1 jobs", "v1 services", "v1 secrets", "v1 persistentvolumeclaims", "networking.k8s.io/v1 networkpolicies",
)  # fmt: skip


class Kubernetes(Provider):
    """One namespace of one cluster."""

    name: ClassVar[str] = "kubernetes"
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="container",
        supports=frozenset[Support]({"image", "ports", "exec", "logs", "stop"}),
        stopped_billing="none",
        boot_seconds=5,
        boot_limit_seconds=1800,
        bills_boot=False,
        termination_allowance_seconds=30,
        visibility_lag_seconds=0,
        create_limit_seconds=40,
        call_limit_seconds=30,
        refresh_seconds=60,
        lookup_seconds=(1, 3, 10),
        terminal_is_final=True,
        moves_hard_stop=True,
        ttl=True,
        priced_by_operator=True,
    )

    def __init__(self, cluster: Cluster, terms: rental.Terms) -> None:
        self.cluster = cluster
        self.terms = terms

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read `KUBECONFIG` (without it, this is a pod of the cluster) and what `gpubroker.cluster.rental` reads."""
        return cls(Cluster(settings.variable("KUBECONFIG")), rental.read_terms(settings))

    async def account(self) -> str:
        """The identity of the namespace: made anew it is another account, and what it lists is no evidence."""
        found = await self.cluster.call("GET", f"/api/v1/namespaces/{self.terms.namespace}")
        return str(found["metadata"]["uid"])

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every kind of GPU that has a price, in the sizes that fit on a node."""
        nodes, pods = await asyncio.gather(
            self.cluster.call("GET", "/api/v1/nodes"),
            self.cluster.call("GET", "/api/v1/pods", fieldSelector="status.phase!=Succeeded,status.phase!=Failed"),
        )
        return rental.list_offers(self.terms, nodes["items"], pods["items"])

    async def create(self, spec: Spec, offer: ProviderOffer, ref: str) -> Created:
        """Make the record, then what belongs to it, then its first Job. Made again, it completes what is not there."""
        objects.refuse_what_cannot_be(spec, ref)
        try:
            record = await self._make_record(objects.record(spec, offer, ref, self.terms), ref)
        except (Rejected, Throttled, CredentialRefused):
            raise
        except ProviderError as error:
            raise AmbiguousOutcome(error.code, error.detail) from None
        _refuse_gone(record)
        run = record["data"]["run"]
        try:
            if record["data"].get("whole") != run:
                for collection, made in objects.parts(spec, ref, record["metadata"]["uid"], self.terms):
                    await self._add(collection, made)
                await self._add("batch/v1 jobs", objects.job(record, int(run)))
        except (Rejected, CredentialRefused) as error:
            await self._undo(ref, error)
            raise
        except ProviderError as error:
            raise AmbiguousOutcome(error.code, error.detail, maybe_id=ref) from None
        try:
            await self._note_whole(record)
            return Created(ref, await self._wait(ref, {"running", "failed", "stopped", "gone"}, _RUNNING_SECONDS))
        except ProviderError as error:
            raise AmbiguousOutcome(error.code, error.detail, maybe_id=ref) from None

    async def _note_whole(self, record: Object) -> None:
        """Note that its run has its Job. What was ended or stopped meanwhile, before this Job was there, loses it again."""
        ref, run = record["metadata"]["name"], record["data"]["run"]
        now = (await self._change(record, whole=run))["data"]
        if now["wanted"] == "gone":
            await self._clear(ref)
        elif (now["wanted"], now["run"]) != ("running", run):
            await self._delete_job(ref, int(run))

    async def _make_record(self, made: Object, ref: str) -> Object:
        try:
            return await self.cluster.call("POST", self._path("v1 configmaps"), made)
        except Rejected as refused:
            if refused.code != "alreadyexists":
                raise
            return await self._record(ref)

    async def _add(self, collection: str, made: Object) -> None:
        try:
            await self.cluster.call("POST", self._path(collection), made)
        except Rejected as refused:
            if refused.code != "alreadyexists":
                raise

    async def _undo(self, ref: str, error: ProviderError) -> None:
        """A part was refused: nothing is to remain. What belongs to the record goes with it."""
        try:
            await self.cluster.call("DELETE", self._path("v1 configmaps", ref), {"propagationPolicy": "Background"})
        except ProviderError:
            raise AmbiguousOutcome(error.code, error.detail, maybe_id=ref) from None

    async def find_by_ref(self, ref: str) -> Sequence[Instance]:
        """The pod of this reference, also while its record lasts after its end."""
        try:
            return [await self.get(ref)]
        except NotThere:
            return []

    async def list_managed(self, owner: str) -> Sequence[Instance]:
        """Every pod of the owner that is not gone. Records come first: what they name was made before."""
        chosen = f"{objects.OWNER}={owner}"
        records = await self._list("v1 configmaps", chosen)
        jobs, pods, services = await asyncio.gather(
            *(self._list(c, chosen) for c in ("batch/v1 jobs", "v1 pods", "v1 services"))
        )
        found: list[Instance] = []
        for record in records:
            ref = record["metadata"]["name"]
            name = objects.job_name(ref, int(record["data"]["run"]))
            job = next((job for job in jobs if job["metadata"]["name"] == name), None)
            state = states.State(record, job, _of(ref, pods), _of(ref, services))
            instance = states.present(state, self.terms.host)
            if instance.life == "gone":
                await self._bury(record, instance)
            else:
                found.append(instance)
        return found

    async def get(self, instance_id: str) -> Instance:
        """One pod now, and why it does not run yet. What its deadline ended is cleared away at this look."""
        record = await self._record(instance_id)
        state = await self._look(record)
        instance = states.present(state, self.terms.host)
        if instance.life == "gone":
            await self._bury(record, instance)
        elif state.job is not None and record["data"].get("whole") != record["data"]["run"]:
            await self._note_whole(record)  # whoever made the Job could not
        return instance

    async def _look(self, record: Object) -> states.State:
        ref, run = record["metadata"]["name"], int(record["data"]["run"])
        chosen = f"{objects.REF}={ref}"
        kinds = ("batch/v1 jobs", "v1 pods", *(("v1 services",) if record["data"]["ports"] != "[]" else ()))
        jobs, pods, *services = await asyncio.gather(*(self._list(kind, chosen) for kind in kinds))
        job = next((job for job in jobs if job["metadata"]["name"] == objects.job_name(ref, run)), None)
        state = states.State(record, job, pods, services[0] if services else ())
        waits = state.pod if state.pod is not None else job
        if waits is not None and states.judge(state, datetime.now(UTC)).life == "starting":
            about = f"involvedObject.name={waits['metadata']['name']},type=Warning"
            events = await self.cluster.call("GET", self._path("v1 events"), fieldSelector=about)
            state = state._replace(events=events["items"])
        return state

    async def _wait(self, ref: str, lives: set[str], seconds: float) -> Instance:
        """Look until it is what is waited for, or the time is over."""
        until = time.monotonic() + seconds
        while True:
            instance = await self.get(ref)
            if instance.life in lives or time.monotonic() >= until:
                return instance
            await asyncio.sleep(_LOOK_SECONDS)

    async def terminate(self, instance_id: str) -> None:
        """End it, disk and all; returns when its program has ended, or goes on ending it."""
        record = await self._record(instance_id)
        is_first = record["data"]["wanted"] != "gone"
        if is_first:
            await self._change(record, wanted="gone", ended=_now())
        await self._clear(instance_id)
        if (await self._wait(instance_id, {"gone"}, _ENDED_SECONDS)).life == "gone" and is_first:
            await self._change(record, ended=_now())

    async def _bury(self, record: Object, seen: Instance) -> None:
        """Clear away what a deadline left, and a record that is old."""
        ended_at = seen.ended_at or datetime.now(UTC)
        if record["data"]["wanted"] != "gone":
            await self._change(record, wanted="gone", ended=ended_at.isoformat(), reason=seen.reason)
            await self._clear(record["metadata"]["name"])
        elif datetime.now(UTC) - ended_at > _KEPT:
            await self.cluster.call("DELETE", self._path("v1 configmaps", record["metadata"]["name"]))

    async def _clear(self, ref: str) -> None:
        for collection in _BELONGINGS:
            path, body = self._path(collection), {"propagationPolicy": "Background"}
            await self.cluster.call("DELETE", path, body, labelSelector=f"{objects.REF}={ref}")

    async def stop(self, instance_id: str) -> None:
        """End the program and keep the disk, which a volume of the storage class is."""
        if not self.terms.storage_class:
            raise CannotDo(self.name, "without a storage class a pod's disk is gone when it stops")
        await self._stop(await self._record(instance_id))

    async def _stop(self, record: Object) -> None:
        _refuse_gone(record)
        ref = record["metadata"]["name"]
        now = await self._change(record, wanted="stopped", ended=_now())
        await self._delete_job(ref, int(now["data"]["run"]))
        await self._wait(ref, {"stopped"}, _ENDED_SECONDS)
        await self._change(record, ended=_now())

    async def _delete_job(self, ref: str, run: int) -> None:
        try:
            await self.cluster.call(
                "DELETE", self._path("batch/v1 jobs", objects.job_name(ref, run)), {"propagationPolicy": "Background"}
            )
        except NotThere:
            return

    async def start(self, instance_id: str) -> None:
        """Start what is stopped, in a new run on the same disk. Raises Rejected `no_capacity` when it fits nowhere now.

        A start that was cut off, or is another caller's, is completed, not begun anew.
        """
        record = await self._record(instance_id)
        _refuse_gone(record)
        stands = states.judge(await self._look(record), datetime.now(UTC))
        if record["data"]["wanted"] != "running" or stands.life not in ("starting", "running"):
            run = int(record["data"]["run"]) + 1
            record = await self._change(record, lock=True, wanted="running", run=str(run), since=_now(), ended=None)
        run = int(record["data"]["run"])
        await self._delete_job(instance_id, run - 1)
        await self._add("batch/v1 jobs", objects.job(record, run))
        await self._note_whole(record)
        seen = await self._wait(instance_id, {"running", "failed", "stopped"}, _RUNNING_SECONDS)
        if seen.status == "Unschedulable":
            seen = await self._wait(instance_id, {"running"}, _SCHEDULED_SECONDS)
        if seen.status == "Unschedulable":
            await self._stop(record)
            raise Rejected("no_capacity", seen.reason or "")

    async def restart(self, instance_id: str) -> None:
        """End the program and start it anew. Raises Rejected `not_running`."""
        if (await self.get(instance_id)).life != "running":
            raise Rejected("not_running", instance_id)
        await self._stop(await self._record(instance_id))
        await self.start(instance_id)

    async def extend(self, instance_id: str, hard_stop_at: datetime) -> None:
        """Move the deadline of its Job. Raises Rejected `gone`."""
        record = await self._record(instance_id)
        _refuse_gone(record)
        job = (await self._look(record)).job
        if job is not None:
            began = datetime.fromisoformat(
                job.get("status", {}).get("startTime") or job["metadata"]["creationTimestamp"]
            )
            seconds = max(1, int((hard_stop_at - began).total_seconds()))
            path = self._path("batch/v1 jobs", job["metadata"]["name"])
            await self.cluster.call("PATCH", path, {"spec": {"activeDeadlineSeconds": seconds}})
        await self._change(record, hard_stop=str(int(hard_stop_at.timestamp())))

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> LogPage:
        """The log of the present run, by positions that grow from run to run."""
        pod = await self._pod(instance_id)
        if pod is None or not any("waiting" not in c["state"] for c in pod["status"].get("containerStatuses", [])):
            return LogPage(after or 0, b"")
        query: dict[str, object] = {"container": objects.CONTAINER, "timestamps": "true"}
        moments = [text for text in (journal.since(after), since and since.isoformat()) if text]
        query |= {"sinceTime": max(moments)} if moments else {"tailLines": 100_000} if after is None else {}
        path = f"{self._path('v1 pods', pod['metadata']['name'])}/log"
        try:
            return journal.read(await self.cluster.read("GET", path, seconds=25.0, **query), after, limit)
        except Rejected:  # the container is not there yet, or not any more
            return LogPage(after or 0, b"")

    async def exec(
        self, instance_id: str, command: Sequence[str], *, stdin: bytes | None, timeout_seconds: int
    ) -> ExecResult:
        """Run a command in the container. One that is not done in its time goes on there: the API cannot end it."""
        pod = await self._pod(instance_id)
        if pod is None or not any("running" in c["state"] for c in pod["status"].get("containerStatuses", [])):
            raise Rejected("not_running", instance_id)
        path = f"{self._path('v1 pods', pod['metadata']['name'])}/exec"
        return await self.cluster.run(path, command, stdin=stdin, seconds=timeout_seconds, container=objects.CONTAINER)

    async def close(self) -> None:
        """Let go of connections."""
        await self.cluster.close()

    # Calls

    async def _pod(self, ref: str) -> Object | None:
        record, pods = await asyncio.gather(self._record(ref), self._list("v1 pods", f"{objects.REF}={ref}"))
        return states.State(record, None, pods).pod

    async def _record(self, ref: str) -> Object:
        record = await self.cluster.call("GET", self._path("v1 configmaps", ref))
        if objects.REF not in record["metadata"].get("labels", {}):
            raise NotThere("not_found", f"{ref} is no pod of ours")
        return record

    async def _change(self, record: Object, *, lock: bool = False, **data: str | None) -> Object:
        change: Object = {"data": data}
        if lock:  # of two that start it at once one is told so
            change["metadata"] = {"resourceVersion": record["metadata"]["resourceVersion"]}
        try:
            return await self.cluster.call("PATCH", self._path("v1 configmaps", record["metadata"]["name"]), change)
        except Rejected as refused:
            raise Throttled(refused.code, refused.detail, wait=1.0) from None

    async def _list(self, collection: str, chosen: str) -> list[Object]:
        found = await self.cluster.call("GET", self._path(collection), labelSelector=chosen)
        return list(found["items"])

    def _path(self, collection: str, name: str | None = None) -> str:
        group, _, plural = collection.rpartition(" ")
        root = "/api/v1" if group == "v1" else f"/apis/{group}"
        return f"{root}/namespaces/{self.terms.namespace}/{plural}{f'/{name}' if name else ''}"


def _of(ref: str, found: Sequence[Object]) -> list[Object]:
    return [each for each in found if each["metadata"]["labels"].get(objects.REF) == ref]


def _refuse_gone(record: Object) -> None:
    if record["data"]["wanted"] == "gone":
        raise Rejected("gone", record["metadata"]["name"], try_next_offer=False)


def _now() -> str:
    return datetime.now(UTC).isoformat()
