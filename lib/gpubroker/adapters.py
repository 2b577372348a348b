"""The adapters of this process, made at their first use, for the functions that hold vendor credentials."""

from typing import TYPE_CHECKING

from gpubroker import config

if TYPE_CHECKING:
    from gpubroker.providers.registry import Adapters

_adapters: "Adapters | None" = None


def mine() -> "Adapters":
    """The adapters of this process."""
    from gpubroker.providers.registry import Adapters  # noqa: PLC0415 - most functions never need it

    global _adapters  # noqa: PLW0603 - functions-framework has no lifespan to keep it in
    if _adapters is None:
        _adapters = Adapters(config.settings())
    return _adapters


async def close() -> None:
    """Close what was made; the next use makes it anew."""
    global _adapters
    closing, _adapters = _adapters, None
    if closing is not None:
        await closing.close()
