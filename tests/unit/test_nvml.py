"""The GPUs of this machine through the real nvidia-ml-py, over a library that plays NVML."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
if shutil.which("gcc") is None:
    pytest.skip("there is no gcc to compile the library with", allow_module_level=True)

LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static const char *names[] = {"NVIDIA H200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"};
static unsigned long long totals[] = {143771ULL << 20, 143771ULL << 20, 81920ULL << 20};
static int number(const char *variable) { const char *text = getenv(variable); return text ? atoi(text) : 0; }
int nvmlInit_v2(void) { return number("NVML_BROKEN"); }
int nvmlInitWithFlags(unsigned flags) { return number("NVML_BROKEN"); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "broken"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned place, void **handle) { *handle = (void *)(size_t)(place + 1); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    snprintf(text, size, "%s", names[(size_t)handle - 1]); return 0;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    snprintf(text, size, "GPU-0000-%zu", (size_t)handle); return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    memory->total = totals[(size_t)handle - 1];
    memory->used = number("NVML_USED_PERCENT") * (memory->total / 100);
    memory->free = memory->total - memory->used;
    return 0;
}
"""

SHOW = """
import asyncio, json, sys, time
from pathlib import Path
from gpubroker.machine import gpus, rental
from gpubroker.providers.local import Local
found = gpus.found()
offers = asyncio.run(Local(Path(sys.argv[1]), rental.Terms(vcpus_milli=4000, ram_bytes=4 * 10**9)).list_offers())
print(json.dumps([found, [(o.provider_offer_id, o.gpu, o.gpu_count, o.vram_gb, o.availability) for o in offers if o.gpu]]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled library."""
    place = tmp_path_factory.mktemp("nvml")
    (place / "nvml.c").write_text(LIBRARY)
    command = ["gcc", "-shared", "-fPIC", "-O0", "-o", str(place / "libnvidia-ml.so.1"), str(place / "nvml.c")]
    subprocess.run(command, check=True)
    return place


def show(tmp_path: Path, **variables: str) -> tuple[list[list[object]], list[list[object]], str]:
    """What a process sees whose loader finds the library; and what it said on stderr."""
    command = [sys.executable, "-W", "error", "-c", SHOW, str(tmp_path / "pods")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    found, offers = json.loads(done.stdout)
    return found, offers, done.stderr


def test_gpus_are_offered_by_model_and_count(library: Path, tmp_path: Path) -> None:
    found, offers, complaints = show(tmp_path, LD_LIBRARY_PATH=str(library))
    assert found == [
        ["GPU-0000-1", "NVIDIA H200", 141, False],
        ["GPU-0000-2", "NVIDIA H200", 141, False],
        ["GPU-0000-3", "NVIDIA A100-SXM4-80GB", 80, False],
    ]
    assert offers == [
        ["gpu-nvidia-a100-sxm4-80gb-1", "NVIDIA A100-SXM4-80GB", 1, 80, "low"],
        ["gpu-nvidia-h200-1", "NVIDIA H200", 1, 141, "medium"],
        ["gpu-nvidia-h200-2", "NVIDIA H200", 2, 141, "low"],
    ]
    assert complaints == ""


def test_gpus_that_others_use_are_not_free(library: Path, tmp_path: Path) -> None:
    found, offers, _ = show(tmp_path, LD_LIBRARY_PATH=str(library), NVML_USED_PERCENT="60")
    assert {busy for *_, busy in found} == {True}
    assert {availability for *_, availability in offers} == {"none"}


def test_without_a_driver_there_are_no_gpus_and_no_noise(library: Path, tmp_path: Path) -> None:
    nothing = ([], [], "")
    assert show(tmp_path, LD_LIBRARY_PATH=str(library), NVML_BROKEN="9") == nothing
    if not any(
        Path(folder, "libnvidia-ml.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
    ):
        assert show(tmp_path) == nothing
