"""The catalogue: every provider's offers, refreshed side by side, so that none waits for another."""

import asyncio
import logging

from gpubroker import config, errors
from gpubroker.offers import refresh_offers
from gpubroker.providers import registry
from gpubroker.providers.registry import Adapters

log = logging.getLogger("gpubroker.catalog")


async def refresh_all(adapters: Adapters) -> dict[str, str]:
    """Refresh every provider that is on and due. Says of each what came of it, in a line."""
    names = registry.enabled(config.settings())
    said = await asyncio.gather(*(_refresh(adapters, name) for name in names))
    return dict(zip(names, said, strict=True))


async def _refresh(adapters: Adapters, name: str) -> str:
    try:
        changes = await refresh_offers(adapters.get(name), config.settings().tick_seconds)
    except (errors.GpubrokerError, TimeoutError, OSError) as error:
        log.warning("the offers of %s were not refreshed: %s %s", name, type(error).__name__, error)
        return f"failed: {type(error).__name__} {error}"
    return "not due" if changes is None else f"{changes.changed} changed, {changes.gone} gone"
