"""Pages of offers as they were last written, shown again while nothing changed.

Offers are nobody's secret and change by refreshes alone: a page is good under the version of the offers that it was read
under, and for a few seconds at the most, since `stale` moves with time. Whoever asks is authenticated each time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

_SECONDS: Final = 5.0
_PAGES: Final = 512


class _Page(NamedTuple):
    version: str
    until: float
    content: bytes


class Shelf:
    """The pages of this process, by what was asked."""

    def __init__(self) -> None:
        self._pages: dict[bytes, _Page] = {}
        self._reading: dict[bytes, asyncio.Event] = {}

    async def show(self, question: bytes, version: str, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """The page of this question as of this version, read once for all who wait for it."""
        while (content := self._find(question, version)) is None:
            others = self._reading.get(question)
            if others is not None:
                await others.wait()
                continue
            self._reading[question] = asyncio.Event()
            try:
                content = await read()
                self._keep(question, version, content)
            finally:
                self._reading.pop(question).set()
            break
        return content

    def _find(self, question: bytes, version: str) -> bytes | None:
        page = self._pages.get(question)
        if page is None or page.version != version or page.until < time.monotonic():
            return None
        return page.content

    def _keep(self, question: bytes, version: str, content: bytes) -> None:
        if len(self._pages) >= _PAGES:
            self._pages.pop(next(iter(self._pages)))
        self._pages[question] = _Page(version, time.monotonic() + _SECONDS, content)
