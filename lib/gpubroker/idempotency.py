"""Idempotency keys: the same key and body make one thing, whoever retries and whenever.

from typing import NamedTuple
Kept are the key, a keyed MAC of the body and the id of what was made, in the transaction that makes it; never bodies,
which hold secrets. The same key and body answer with the resource as it is now.
"""

import json
from typing import NamedTuple

from gpubroker import errors, sealing, store
from gpubroker.store import idempotency as rows


class Request(NamedTuple):
    """What a call says of itself: its key, if it has one, its route and its body."""

    key: str | None
    route: str
    body: object

    def body_mac(self) -> bytes:
        """A keyed digest of the body, whatever the order of its names."""
        return mac_body(self.body)


def mac_body(body: object) -> bytes:
    """A keyed digest of a JSON value: equal for equal values."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return sealing.mac("request body", canonical.encode())


async def find_made(tx: store.Transaction, request: Request) -> str | None:
    """The id of what this request made before. None: it is new, and this transaction alone may make it.

    Raises IdempotencyInProgress, or IdempotencyKeyReused for another body or route.
    """
    if request.key is None:
        return None
    if not await rows.lock(tx, request.key):
        raise errors.IdempotencyInProgress(headers={"Retry-After": "1"})
    kept = await rows.find(tx, request.key)
    if kept is None:
        return None
    if kept.route != request.route or kept.body_mac != request.body_mac():
        found = [{"pointer": "Idempotency-Key", "message": "was used for another request"}]
        raise errors.IdempotencyKeyReused(more={"errors": found})
    return kept.resource_id


async def keep(tx: store.Transaction, request: Request, resource_id: str) -> None:
    """Remember what was made; nothing without a key."""
    if request.key is not None:
        await rows.keep(tx, request.key, rows.Kept(request.route, request.body_mac(), resource_id))
