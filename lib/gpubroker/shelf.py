"""Pages of offers as they were last written, shown again while nothing changed.

Offers are nobody's secret and change by refreshes alone: a page is good under the version of the offers that it was read
under, and for a few seconds at the most, since `stale` moves with time. Whoever asks is authenticated each time.
"""

import time
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
        self._pages: dict[str, _Page] = {}

    def find(self, question: str, version: str) -> bytes | None:
        """The page of this question, if it is still what the database would answer."""
        page = self._pages.get(question)
        if page is None or page.version != version or page.until < time.monotonic():
            return None
        return page.content

    def keep(self, question: str, version: str, content: bytes) -> None:
        """Keep a page that was read after this version was."""
        if len(self._pages) >= _PAGES:
            self._pages.pop(next(iter(self._pages)))
        self._pages[question] = _Page(version, time.monotonic() + _SECONDS, content)
