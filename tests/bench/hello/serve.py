"""Serves hello on a port of the loopback, under the same server as `gpubroker serve`."""

import sys
from pathlib import Path

import functions_framework.aio
import uvicorn

app = functions_framework.aio.create_asgi_app("hello", str(Path(__file__).with_name("main.py")))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off", access_log=False)
