"""From a provider's name to its adapter. A file in this package is a provider: there is no other place to register.

What providers share are packages (`http`), or the two modules that every provider needs: `base` and this.

Adapters are imported when they are needed: a function that serves one vendor's pod never loads another's library.
"""

import importlib
import inspect
import pkgutil

from gpubroker import providers
from gpubroker.config import Settings
from gpubroker.errors import SetupError
from gpubroker.providers.base import Provider

_NOT_PROVIDERS = frozenset({"base", "registry"})


def names() -> tuple[str, ...]:
    """Name every provider that there is, configured or not."""
    found = (module.name for module in pkgutil.iter_modules(providers.__path__) if not module.ispkg)
    return tuple(sorted(name for name in found if name not in _NOT_PROVIDERS))


def adapter(name: str) -> type[Provider]:
    """Import the provider's class. Raises SetupError for a name that is none."""
    if name not in names():
        msg = f"there is no provider '{name}'; there are: {', '.join(names())}"
        raise SetupError(msg)
    module = importlib.import_module(f"{providers.__name__}.{name}")
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Provider) and member.__module__ == module.__name__
    ]
    (only,) = found
    return only


def enabled(settings: Settings) -> tuple[str, ...]:
    """Name the providers that are on: their credentials are set, and GPUBROKER_PROVIDERS, if given, lists them."""
    listed = settings.providers
    if listed is not None:
        for name in listed:
            adapter(name)
        return tuple(name for name in listed if _has_credentials(name, settings))
    return tuple(name for name in names() if adapter(name).credentials and _has_credentials(name, settings))


def reachable(settings: Settings) -> tuple[str, ...]:
    """Name the providers that can be called: those that are on, and any that was taken off the list with its credentials left."""
    left = (name for name in names() if adapter(name).credentials and _has_credentials(name, settings))
    return tuple(dict.fromkeys((*enabled(settings), *left)))


def _has_credentials(name: str, settings: Settings) -> bool:
    return all(settings.variable(variable) for variable in adapter(name).credentials)


class Adapters:
    """The adapters of one process, made at their first use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[str, Provider] = {}

    def get(self, name: str) -> Provider:
        """Give the adapter of a provider. Raises SetupError when it is not configured."""
        if name not in self._made:
            self._made[name] = adapter(name).from_settings(self._settings)
        return self._made[name]

    async def close(self) -> None:
        """Close every adapter that was made."""
        made, self._made = self._made, {}
        for provider in made.values():
            await provider.close()
