"""The least that functions-framework can serve: what everything here is measured against."""

import functions_framework.aio
from starlette.requests import Request


@functions_framework.aio.http
async def hello(request: Request) -> str:
    del request
    return "hello"
