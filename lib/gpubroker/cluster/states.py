"""What Kubernetes says of a pod, in the words of the broker: where it stands, why, and when that began."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from gpubroker.cluster.client import Object
from gpubroker.cluster.objects import NOT_WHOLE, RUN
from gpubroker.providers.base import Endpoint, Instance, Life

HOPELESS: Final = frozenset(
    {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"}
)
"""Reasons for which a container waits, and that no waiting mends."""
PULLS: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
PULL_SECONDS: Final = 120
PULL_TRIES: Final = 4
"""So often, and since so long, must a pull have failed: a large image comes slowly, and one failure on its way is mended."""
SCHEDULE_SECONDS: Final = 60
"""So long a pod that fits nowhere may wait before it is given up. A cluster that adds nodes is to have them by then."""
_CUT_OFF_SECONDS: Final = 600
"""So long what was cut off is sent again: then nobody is left who would."""
_UNNOTED_SECONDS: Final = 60
"""The same for records of older versions, which do not say how far their create or start came."""
_NOTHING: Final[Object] = {}
_TAKEN: Final = frozenset({"Evicted", "Preempting", "Shutdown", "NodeLost", "NodeShutdown", "Terminated"})


class State(NamedTuple):
    """One look at an instance: its record, and of its present run the Job and the pod, where they are."""

    record: Object
    job: Object | None
    pods: Sequence[Object]
    """All pods of the record, of earlier runs too."""
    services: Sequence[Object] = ()
    events: Sequence[Object] = ()

    @property
    def pod(self) -> Object | None:
        """The pod of the present run."""
        run = self.record["data"]["run"]
        mine = [pod for pod in self.pods if pod["metadata"]["labels"].get(RUN) == run]
        return max(mine, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)


class Standing(NamedTuple):
    """Where it stands, and since when."""

    life: Life
    status: str
    reason: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    exit_code: int | None = None


def present(state: State, host: str | None) -> Instance:
    """The instance, as the broker sees it."""
    record, now = state.record, datetime.now(UTC)
    data = record["data"]
    stands = judge(state, now)
    return Instance(
        id=record["metadata"]["name"],
        ref=record["metadata"]["name"],
        status=stands.status,
        life=stands.life,
        billing="full" if stands.life in ("running", "stopping", "terminating") else "none",
        started_at=stands.started_at,
        ended_at=stands.ended_at,
        exit_code=stands.exit_code,
        reason=stands.reason,
        endpoints=tuple(_endpoints(state, host)) if stands.life == "running" else (),
        hard_stop_at=datetime.fromtimestamp(int(data["hard_stop"]), UTC),
        price_micro_h=int(data["price_micro_h"]),
        is_whole=is_whole(state, now),
    )


def judge(state: State, now: datetime) -> Standing:  # noqa: PLR0911 - a table
    """Where the instance stands. A pure rule."""
    data, job, pod = state.record["data"], state.job, state.pod
    is_over = all(_has_ended(each) for each in state.pods)
    ended_at = _time(data.get("ended"))
    if data["wanted"] == "gone":
        return (
            Standing("gone", "Deleted", data.get("reason"), ended_at=ended_at)
            if is_over
            else Standing("terminating", "Terminating")
        )
    if data["wanted"] == "stopped":
        return Standing("stopped", "Stopped", ended_at=ended_at) if is_over else Standing("stopping", "Terminating")
    failed = _condition(job, "Failed")
    to_fail = failed or _condition(job, "FailureTarget") or _NOTHING  # this comes before the pods end, that after
    if to_fail.get("reason") == "DeadlineExceeded":
        return (
            Standing("gone", "DeadlineExceeded", "its hard stop", ended_at=_time(failed.get("lastTransitionTime")))
            if failed is not None and is_over
            else Standing("terminating", "DeadlineExceeded")
        )
    if pod is not None:
        return _judge_pod(state, pod, now)
    if failed is not None or _condition(job, "Complete") is not None:
        over_at = _time((failed or _condition(job, "Complete") or _NOTHING).get("lastTransitionTime"))
        return Standing("interrupted", "PodDeleted", "its pod was deleted by somebody else", ended_at=over_at)
    if job is None:
        return _judge_no_job(state, now)
    return Standing("starting", "Pending", _first_warning(state.events))


def _judge_no_job(state: State, now: datetime) -> Standing:
    if not is_whole(state, now):
        return Standing("starting", "Incomplete")
    data = state.record["data"]
    if (data["run"], data.get("whole")) == ("1", NOT_WHOLE):
        return Standing("failed", "Incomplete", "its create was cut off")
    return Standing("interrupted", "JobDeleted", "its Job was deleted by somebody else")


def is_whole(state: State, now: datetime) -> bool:
    """Whether the create or start of its present run came to its end, or will not any more: its Job is made last."""
    data = state.record["data"]
    is_begun = state.job is None and state.pod is None and data["wanted"] == "running"
    limit = _CUT_OFF_SECONDS if "whole" in data else _UNNOTED_SECONDS
    is_noted = data.get("whole") == data["run"]
    return not is_begun or is_noted or now - _began(state.record) > timedelta(seconds=limit)


def _judge_pod(state: State, pod: Object, now: datetime) -> Standing:
    status = pod.get("status", _NOTHING)
    container = next(iter(status.get("containerStatuses", [])), _NOTHING)
    current = container.get("state", _NOTHING)
    if "terminated" in current or status.get("phase") in ("Succeeded", "Failed"):
        return _judge_end(pod, current.get("terminated", _NOTHING))
    if "running" in current:
        ready = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), _NOTHING)
        if ready.get("status") == "Unknown" or status.get("reason") == "NodeLost":
            return Standing("unknown", "NodeLost", "its node does not answer")
        life: Life = "stopping" if pod["metadata"].get("deletionTimestamp") else "running"
        return Standing(life, "Running", started_at=_time(current["running"].get("startedAt")))
    return _judge_start(state, pod, current.get("waiting", _NOTHING), now)


def _judge_end(pod: Object, ended: Object) -> Standing:
    status = pod["status"]
    disrupted = next(
        (c for c in status.get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True"), None
    )
    started_at, ended_at = _time(ended.get("startedAt")), _time(ended.get("finishedAt"))
    if disrupted is not None or status.get("reason") in _TAKEN:
        why = status.get("reason") or (disrupted or _NOTHING).get("reason") or "Evicted"
        said = status.get("message") or (disrupted or _NOTHING).get("message") or ""
        return Standing("interrupted", why, f"{why}: {said}"[:300], started_at, ended_at, ended.get("exitCode"))
    if pod["metadata"].get("deletionTimestamp"):  # not by us: then more would be wanted than that it runs
        return Standing("interrupted", "PodDeleted", "its pod was deleted by somebody else", started_at, ended_at)
    if not ended:
        said = f"{status.get('reason') or 'Failed'}: {status.get('message', '')}"[:300]
        return Standing("failed", status.get("reason") or "Failed", said)
    why = ended.get("reason", "Completed")
    reason = {"Completed": None, "Error": None, "OOMKilled": "OOMKilled: it used more memory than the offer has"}.get(
        why, f"{why}: {ended.get('message', '')}"[:300]
    )
    return Standing("stopped", why, reason, started_at, ended_at, ended.get("exitCode"))


def _judge_start(state: State, pod: Object, waiting: Object, now: datetime) -> Standing:
    age = now - _made(pod)
    scheduled = next(
        (c for c in pod.get("status", _NOTHING).get("conditions", []) if c["type"] == "PodScheduled"), _NOTHING
    )
    if scheduled.get("status") == "False":
        reason = f"Unschedulable: {scheduled.get('message', '')}"[:300]
        hopeless = state.record["data"]["run"] == "1" and age > timedelta(seconds=SCHEDULE_SECONDS)
        return Standing("failed" if hopeless else "starting", "Unschedulable", reason)
    why = waiting.get("reason")
    if why in (None, "ContainerCreating", "PodInitializing"):
        return Standing("starting", why or "Pending", _first_warning(state.events))
    reason = f"{why}: {waiting.get('message', '')}"[:300]
    hopeless = why in HOPELESS or (why in PULLS and _fails_to_pull(state.events, now))
    return Standing("failed" if hopeless else "starting", why, reason)


def _fails_to_pull(events: Sequence[Object], now: datetime) -> bool:
    """Say whether the kubelet tried in vain often enough. Kubernetes counts what is told again (API reference, Event v1 core)."""
    failures = [event for event in events if str(event.get("message", "")).startswith("Failed to pull image")]
    first = min(
        (_time(event.get("firstTimestamp") or event.get("eventTime")) or now for event in failures), default=now
    )
    times = sum(event.get("count") or (event.get("series") or _NOTHING).get("count") or 1 for event in failures)
    return times >= PULL_TRIES and now - first > timedelta(seconds=PULL_SECONDS)


def _has_ended(pod: Object) -> bool:
    return pod.get("status", _NOTHING).get("phase") in ("Succeeded", "Failed")


def _endpoints(state: State, host: str | None) -> list[Endpoint]:
    pod = state.pod or _NOTHING
    protocols = dict(json.loads(state.record["data"]["ports"]))
    found: list[Endpoint] = []
    for service in sorted(state.services, key=lambda each: each["spec"]["ports"][0]["port"]):
        spec, port = service["spec"], service["spec"]["ports"][0]
        balancer = next(
            iter(service.get("status", _NOTHING).get("loadBalancer", _NOTHING).get("ingress", [])), _NOTHING
        )
        if spec["type"] == "LoadBalancer":
            where, external = balancer.get("hostname") or balancer.get("ip"), port["port"]
        elif spec["type"] == "NodePort":
            where, external = host or pod.get("status", _NOTHING).get("hostIP"), port.get("nodePort")
        else:
            where, external = spec.get("clusterIP"), port["port"]
        if not where or not external:
            continue  # a balancer that has no address yet
        protocol = protocols.get(port["port"], "tcp")
        url = f"http://{where}:{external}" if protocol == "http" else None
        found.append(Endpoint(f"{protocol}-{port['port']}", port["port"], protocol, where, external, url))
    return found


def _first_warning(events: Sequence[Object]) -> str | None:
    """The last thing that went wrong on the way, such as `FailedCreate: exceeded quota` or `FailedMount: …`."""
    warnings = [event for event in events if event.get("type") == "Warning"]
    last = max(warnings, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default=None)
    return None if last is None else f"{last.get('reason')}: {last.get('message', '')}"[:300]


def _condition(job: Object | None, kind: str) -> Object | None:
    conditions = (job or _NOTHING).get("status", _NOTHING).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _began(record: Object) -> datetime:
    """When its present run was begun."""
    return _time(record["data"].get("since")) or _made(record)


def _made(made: Object) -> datetime:
    return _time(made["metadata"]["creationTimestamp"]) or datetime.now(UTC)


def _time(text: str | None) -> datetime | None:
    return None if not text else datetime.fromisoformat(text)
