"""`python -m gpubroker` is `gpubroker`."""

from gpubroker.cli import main

main()
