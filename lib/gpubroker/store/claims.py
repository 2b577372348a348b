"""What drivers and sweeps have claimed for a while, so that none does another's work."""

from typing import Any, Final

import psycopg

_RELEASE: Final = (
    "UPDATE pod SET due_at = instant() WHERE state <> 'terminated' AND due_at > instant()",
    "UPDATE provider_account SET listing_until = NULL WHERE listing_until IS NOT NULL",
    "UPDATE attempt SET over_at = instant() WHERE state = 'open' AND provider = %(provider)s AND over_at > instant()",
)


def release_all(conn: psycopg.Connection[Any], provider: str) -> None:
    """Whoever claimed anything is dead, and so is every create that was sent to this provider: all is due now."""
    for statement in _RELEASE:
        conn.execute(statement, {"provider": provider})
