"""What adapters of vendors with an HTTP interface share: calls, limits, breakers, and strict reading. No vendor is known here."""
