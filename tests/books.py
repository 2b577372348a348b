"""The money tables as a test writes them: agents, pods, instances and phases as rows, and a clock that stands still."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from gpubroker.ids import new_id

set_hypothesis_home_dir(tempfile.gettempdir() + "/hypothesis")  # what it learns of constants; a checkout stays clean

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
PRICE = 2_390_000
_FREEZE = """
CREATE TABLE IF NOT EXISTS frozen (at timestamptz NOT NULL);
GRANT SELECT ON frozen TO gpubroker_public, gpubroker_worker;
CREATE OR REPLACE FUNCTION instant() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT at FROM frozen';
"""


def bounded(examples: int, steps: int = 50) -> settings:
    """Settings of a property: so many examples, with CI set always the same ones, shrunk only where that takes no minutes."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize="CI" in os.environ,
        database=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate) if "CI" in os.environ else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def cloned(postgres_url: str, template: str) -> Iterator[str]:
    """A database for the tests of one module, which each clear it: emptying tables costs a tenth of a copy."""
    name = new_id("req").replace("req_", "gb_books_")
    url = re.sub(r"(://[^/]+/)[^?]*", rf"\g<1>{name}", postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield url
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Books:
    """An organisation's money, by SQL alone."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.conn = self.connect()
        self.org_id = ""
        self.agents: list[str] = []
        self.account_id = self.value(
            "INSERT INTO provider_account (id, provider, identity) VALUES (%s, 'simulated', %s) RETURNING id",
            new_id("acc"), new_id("acc"),
        )  # fmt: skip

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self.url, autocommit=True, row_factory=dict_row)

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        done = self.conn.execute(sql, parameters)
        return done.fetchall() if done.description else []

    def value(self, sql: str, *parameters: object) -> Any:
        (row,) = self.query(sql, *parameters)
        (value,) = row.values()
        return value

    def clear(self) -> None:
        """Leave nothing of this test but the schema."""
        with self.conn:
            self.conn.execute("TRUNCATE org, provider_account, event, month_closed, tick RESTART IDENTITY CASCADE")

    @contextmanager
    def role(self, name: str, org_id: str | None = None) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """A transaction of one of our roles, rolled back."""
        with psycopg.connect(self.url, row_factory=dict_row) as conn:
            conn.execute(f"SET LOCAL ROLE {name}")
            if org_id is not None:
                conn.execute("SELECT set_config('gpubroker.org', %s, true)", (org_id,))
            yield conn
            conn.rollback()

    def freeze(self, at: datetime = NOON) -> datetime:
        """From now on it is always this moment."""
        with self.conn.transaction():
            self.conn.execute(_FREEZE)
            self.conn.execute("DELETE FROM frozen")
            self.conn.execute("INSERT INTO frozen VALUES (%s)", (at,))
        return at

    # Rows

    def tree(self, *limits: int | None, period: str = "total") -> list[str]:
        """A new organisation with a line of agents, the root first, and a limit for each."""
        self.org_id = self.value(
            "INSERT INTO org (id, name) VALUES (%s, %s) RETURNING id", new_id("org"), new_id("org")
        )
        self.agents = []
        for limit in limits:
            self.agents.append(self.agent(limit, path=self.agents, period=period))
        return self.agents

    def agent(self, limit: int | None, *, path: list[str], period: str = "total") -> str:
        """One more agent, below all of `path`."""
        agent_id = new_id("agt")
        above = path[-1] if path else None
        with self.conn.transaction():
            self.query(
                "INSERT INTO agent (id, org_id, parent_id, path, scopes) VALUES (%s, %s, %s, %s, '{}')",
                agent_id, self.org_id, above, [*path, agent_id],
            )  # fmt: skip
            self.query(
                "INSERT INTO agent_path (org_id, ancestor_id, agent_id) SELECT %s, unnest(%s::text[]), %s",
                self.org_id, [*path, agent_id], agent_id,
            )  # fmt: skip
            self.query(
                """INSERT INTO budget (agent_id, org_id, limit_micro, period, period_start)
                   VALUES (%s, %s, %s, %s, start_of(%s, instant()))""",
                agent_id, self.org_id, limit, period, period,
            )  # fmt: skip
        return agent_id

    def pod(self, agent_id: str | None = None, *, jti: str | None = None) -> str:
        """A pod without a hold."""
        return self.value(
            """INSERT INTO pod (id, org_id, agent_id, token_jti, state, ends_at, hard_stop_at, spec)
               SELECT %s, org_id, id, %s, 'requested', instant() + interval '1 hour', instant() + interval '2 hours', '{}'
                 FROM agent WHERE id = %s RETURNING id""",
            new_id("pod"), jti, agent_id or self.agents[-1],
        )  # fmt: skip

    def hold(self, pod_id: str, amount: int, cause: str = "create") -> int:
        """A hold taken as every caller takes it."""
        agent_id = self.value("SELECT agent_id FROM pod WHERE id = %s", pod_id)
        return self.value("SELECT take_hold(%s, %s, %s, %s)", pod_id, cause, agent_id, amount)

    def instance(
        self,
        pod_id: str,
        known_at: datetime = NOON,
        *,
        price: int = PRICE,
        minimum: int = 0,
        increment: int = 1,
        role: str = "live",
        gpu: str | None = "H100 SXM",
        gpu_count: int = 1,
        provider: str = "simulated",
    ) -> str:
        """An instance of a new attempt of a pod."""
        n = self.value("SELECT count(*)::int + 1 FROM attempt WHERE pod_id = %s", pod_id)
        attempt_id = new_id("att")
        offer = {"min_billing_s": minimum, "increment_s": increment}
        self.query(
            """INSERT INTO attempt (id, org_id, pod_id, n, account_id, provider, offer_id, offer, gpu, gpu_count,
                                    price_micro_h, ref, send_before, over_at, state)
               SELECT %s, org_id, id, %s, %s, %s, 'ofr', %s, %s, %s, %s, %s, %s, %s, 'created' FROM pod WHERE id = %s""",
            attempt_id, n, self.account_id, provider, Jsonb(offer), gpu, gpu_count, price, f"gb-{attempt_id[4:]}",
            known_at, known_at, pod_id,
        )  # fmt: skip
        return self.value(
            """INSERT INTO instance (id, org_id, attempt_id, pod_id, account_id, provider_instance_id, role, known_at,
                                     billed_until)
               SELECT %s, org_id, %s, id, %s, %s, %s, %s, date_trunc('second', %s::timestamptz)
                 FROM pod WHERE id = %s RETURNING id""",
            new_id("ins"), attempt_id, self.account_id, attempt_id, role, known_at, known_at, pod_id,
        )  # fmt: skip

    def phase(
        self, instance_id: str, at: datetime, billing: str = "full", price: int = PRICE, payer: str = "customer"
    ) -> None:
        self.query("SELECT change_phase(%s, %s, %s, %s, %s)", instance_id, at, billing, price, payer)

    def bill(self, instance_id: str, until: datetime) -> int:
        return self.value("SELECT bill(%s, %s)", instance_id, until)

    def gone(self, instance_id: str, ended_at: datetime) -> None:
        """Close the last phase and prove the end, as `sightings.finish_instance` does."""
        self.phase(instance_id, ended_at, "none", 0, "operator")
        self.query(
            "UPDATE instance SET gone_at = instant(), ended_at = %s, gone_evidence = '{}' WHERE id = %s",
            ended_at,
            instance_id,
        )

    def settle(self, pod_id: str) -> None:
        self.query("SELECT settle(%s)", pod_id)

    def running(self, seconds: int = 3600, *, hold: int | None = None, **options: Any) -> tuple[str, str]:
        """A pod whose instance runs from NOON on, its agent paying out of a hold for so many seconds."""
        pod_id = self.pod()
        self.hold(pod_id, hold or -(-options.get("price", PRICE) * seconds // 3600))
        instance_id = self.instance(pod_id, **options)
        self.phase(instance_id, NOON, price=options.get("price", PRICE))
        return pod_id, instance_id

    # What is to be read

    def posted(self, pod_id: str) -> dict[str, int]:
        """Micro-USD by account of the ledger."""
        found = self.query(
            "SELECT account, sum(amount_micro)::bigint AS sum FROM ledger WHERE pod_id = %s GROUP BY account", pod_id
        )
        return {row["account"]: row["sum"] for row in found}

    def intervals(self, instance_id: str) -> list[dict[str, Any]]:
        return self.query(
            """SELECT lower(during) AS a, upper(during) AS z, phase_seq, amount_micro, charged_micro, payer FROM usage_interval
                WHERE instance_id = %s ORDER BY during""",
            instance_id,
        )

    def standing(self, agent_id: str) -> int:
        """What is committed in the present period."""
        return self.value(
            """SELECT CASE WHEN period_start >= start_of(period, instant()) THEN committed_micro ELSE 0 END
                 FROM budget WHERE agent_id = %s""",
            agent_id,
        )

    def check(self) -> None:
        """What must be true of the money at every moment, whatever was done to limits meanwhile."""
        wrong = self.query(
            """SELECT b.agent_id, b.committed_micro, s.sum FROM budget b JOIN LATERAL (
                 SELECT coalesce(sum(CASE WHEN h.closed_at IS NULL THEN h.amount_micro ELSE h.drawn_micro END), 0) AS sum
                   FROM hold_budget hb JOIN hold h ON h.id = hb.hold_id
                  WHERE hb.agent_id = b.agent_id AND hb.period_start = b.period_start) s ON true
                WHERE b.committed_micro <> s.sum"""
        )
        assert not wrong, f"committed is not what the holds say: {wrong}"
        unequal = self.query(
            """SELECT h.id, h.drawn_micro, coalesce(sum(l.amount_micro), 0) AS posted
                 FROM hold h LEFT JOIN ledger l ON l.hold_id = h.id
                GROUP BY h.id HAVING h.drawn_micro <> coalesce(sum(l.amount_micro), 0)"""
        )
        assert not unequal, f"drawn is not what the ledger says: {unequal}"


def after(seconds: float) -> datetime:
    """So long after NOON."""
    return NOON + timedelta(seconds=seconds)
