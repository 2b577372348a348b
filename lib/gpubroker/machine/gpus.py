"""The NVIDIA GPUs of this machine, by NVML (nvidia-ml-py). Without library, driver or device there are none."""

import importlib
import threading
from types import ModuleType
from typing import Final

from gpubroker.machine.capacity import Gpu

_GIB: Final = 2**30
_lock = threading.Lock()
_state: dict[str, ModuleType] = {}


def found() -> tuple[Gpu, ...]:
    """Ask NVML. A GPU is busy when something holds more than half of its memory. Takes some milliseconds."""
    with _lock:
        try:
            nvml = _state.get("nvml") or importlib.import_module("pynvml")
        except ImportError:
            return ()
        try:
            if not _state:
                nvml.nvmlInit()
                _state["nvml"] = nvml
            return tuple(_describe(nvml, place) for place in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError:
            _forget(nvml)
            return ()


def _describe(nvml: ModuleType, place: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(place)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    texts = [nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)]
    uuid, model = (text.decode() if isinstance(text, bytes) else str(text) for text in texts)
    total, used = int(memory.total), int(memory.used)
    return Gpu(uuid, model, -(-total // _GIB), used * 2 > total)


def _forget(nvml: ModuleType) -> None:
    """The driver is not there, or was replaced under us: begin anew at the next question."""
    if _state.pop("nvml", None) is not None:
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError:
            return
