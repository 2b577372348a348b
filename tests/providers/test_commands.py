"""`gpubroker providers check` and `gpubroker deadman` as an operator runs them, with a vendor's key and nothing else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.providers.vendors import server
from tests.providers.vendors.runpod import KEY, RunpodVendor
from tests.providers.vendors.server import Vendor

BIN = Path(sys.executable).parent / "gpubroker"


@pytest.fixture(scope="module")
def vendor() -> Iterator[Vendor]:
    with server.serve(RunpodVendor()) as served:
        yield served


def gpubroker(vendor: Vendor, *arguments: str, key: str = KEY, **more: str) -> subprocess.CompletedProcess[str]:
    env = {"RUNPOD_API_KEY": key, "GPUBROKER_RUNPOD_URL": vendor.url, "GPUBROKER_OWNER": "ownerown"} | more
    return subprocess.run([BIN, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_check_with_a_live_trial(vendor: Vendor) -> None:
    done = gpubroker(vendor, "providers", "check", "--live", "--spend-at-most", "0.50", "--json")
    ((standing),) = json.loads(done.stdout)
    assert (done.returncode, standing["provider"], standing["error"]) == (0, "runpod", None)
    assert standing["steps"][-1]["what"] == "destroy"
    assert all(step["error"] is None for step in standing["steps"])
    assert (vendor.alive(), standing["lacks"]) == ([], ["exec"])


def test_a_credential_that_does_not_work_is_said_and_shown_nowhere(vendor: Vendor) -> None:
    done = gpubroker(vendor, "providers", "check", key="rpa_TheWrongKeyOfTheTests00000")
    assert (done.returncode, done.stderr) == (1, "")
    assert "CredentialRefused" in done.stdout
    assert "TheWrongKey" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("providers", "check", "nowhere"), 1, "gpubroker: there is no provider 'nowhere'; there are: "),
        (("providers", "check", "--live"), 2, "gpubroker: --live and --spend-at-most go together\n"),
    ],
)
def test_a_wrong_check_is_one_line(vendor: Vendor, arguments: tuple[str, ...], code: int, line: str) -> None:
    done = gpubroker(vendor, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert done.stderr.startswith(line)


def test_the_dead_man_needs_no_more_than_keys(vendor: Vendor) -> None:
    done = gpubroker(vendor, "deadman", GPUBROKER_PROVIDERS="vast")  # runpod is drained: what it still has must end too
    assert (done.returncode, done.stdout, done.stderr) == (0, "runpod: 0 of ours, 0 past their hard stop\n", "")
    refused = gpubroker(vendor, "deadman", key="")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "no provider is on" in refused.stderr
