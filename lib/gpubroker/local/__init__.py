"""The one-machine runtime behind `gpubroker dev`: servers, broker, schedules and all functions in one process tree.

Only Linux. Nothing of it is imported by a function: what it needs (YAML, httpx, cron) is heavy.
"""
