"""GPUBROKER: a GPU broker that AI agents call as a tool."""

__version__ = "0.1.0"

import sys

# httpx imports rich and click for a command line of its own where it finds them: 70 of the 110 ms that it takes to load.
sys.modules.setdefault("httpx._main", None)  # pyright: ignore[reportArgumentType] - None: there is no such module
