"""GPUBROKER: a GPU broker that AI agents call as a tool."""

__version__ = "0.1.0"
