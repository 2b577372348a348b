"""The public names: what answers carry, no more and no less, and which calls there are."""

from typing import Any

import httpx
import pytest
from tests.factories import World, app_named

from gpubroker import bundle
from gpubroker.local.gateway import Gateway

pytestmark = pytest.mark.anyio

RESOURCES = {
    "Agent": """id org_id parent_id name scopes effective_scopes expires_at revoked_at metadata may_act grants limits created_at""",
    "Limits": "max_pods max_usd_per_hour max_creates_per_minute",
    "NewKey": "id key",
    "Key": "id agent_id name start scopes created_at used_at expires_at revoked_at",
    "Whoami": "agent organisation scopes delegation budgets limits",
    "Organisation": "id name plan",
    "Offer": """id provider provider_offer_id gpu gpu_count vram_gb vcpus ram_gb disk_gb region country spot price_usd_per_hour
        price_usd_per_gpu_hour min_billing_seconds billing_increment_seconds stopped_price_usd_per_hour supports reliability
        availability observed_at stale""",
    "ChosenOffer": """id provider provider_offer_id gpu gpu_count vram_gb vcpus ram_gb disk_gb region country spot
        price_usd_per_hour price_usd_per_gpu_hour min_billing_seconds billing_increment_seconds stopped_price_usd_per_hour supports
        reliability availability observed_at stale""",
    "NoMatch": "considered removed_by nearest",
    "Near": "offer change",
    "Quote": "id offer price_usd_per_hour duration_seconds total_usd expires_at pod_id",
    "Pod": """id name state state_reason billing provider provider_instance_id provider_status offer price_usd_per_hour spent_usd
        budget_usd committed_usd endpoints labels agent_id attempts allowed_actions version settled poll_after_seconds eta_seconds
        ends_because exit_code links created_at running_at expires_at terminated_at""",
    "Endpoint": "name port protocol host external_port url command",
    "AttemptView": "provider offer_id outcome code at",
    "DryRun": "offer alternatives commit_usd available_usd affordable_seconds boot_seconds",
    "ExecAnswer": "exit_code stdout stderr truncated duration_ms",
    "UsageRow": "key seconds gpu_seconds amount_usd",
    "Usage": "from to items total",
    "UsageRecord": """id pod_id agent_id instance provider gpu gpu_count billing from to seconds price_usd_per_hour amount_usd""",
    "Budget": """agent_id limit_usd period period_start spent_usd held_usd available_usd own_available_usd parent_id""",
    "Statement": "month state items minimum_usd total_usd",
    "StatementItem": "agent_id pod_id provider gpu seconds amount_usd",
    "LimitUse": "limit used",
    "MoneyLimitUse": "limit used",
    "Plan": "name limits",
    "PlanLimits": "requests_per_second",
    "Subscription": "org_id plan limits state since period_end ends_at",
    "SubscriptionRequest": "plan",
    "AgentRequest": "name scopes budget expires_in metadata",
    "AgentChange": "name metadata scopes expires_in may_act grants limits",
    "KeyRequest": "agent_id name scopes expires_in",
    "RotateRequest": "overlap_seconds",
    "BudgetRequest": "limit_usd period",
    "QuoteRequest": "requirements offer_id duration_seconds",
    "ExtendRequest": "max_lifetime_seconds budget_usd",
    "ExecRequest": "command timeout_seconds stdin",
    "PodRequest": """name image command env ports disk_gb ssh_public_key labels requirements offer_id quote_id budget_usd
        max_lifetime_seconds max_attempts restart_policy on_exit idle_timeout_seconds registry_auth""",
    "Requirements": """gpu gpu_count min_gpu_count min_vram_gb min_vcpus min_ram_gb min_disk_gb provider region country spot
        max_price_usd_per_hour max_price_usd_per_gpu_hour supports min_reliability""",
}
CALLS = """
POST GET /v1/agents; GET PATCH DELETE /v1/agents/{id}; POST GET /v1/keys; DELETE /v1/keys/{id}; POST /v1/keys/{id}/rotate;
POST /v1/token; POST /v1/introspect; POST /v1/revoke; GET /.well-known/jwks.json; GET /.well-known/oauth-authorization-server;
GET /v1/whoami; GET /v1/offers; GET /v1/offers/{id}; GET /v1/gpus; GET /v1/gpus/{model}/prices; POST /v1/quotes; GET /v1/providers;
POST GET DELETE /v1/pods; GET DELETE /v1/pods/{id}; POST /v1/pods/{id}/start; POST /v1/pods/{id}/stop; POST /v1/pods/{id}/restart;
POST /v1/pods/{id}/extend; GET /v1/pods/{id}/events; GET /v1/logs/{pod_id}; POST /v1/exec/{pod_id}; GET /v1/usage;
GET /v1/usage/records; GET /v1/budgets; PUT /v1/budgets/{agent_id}; GET /v1/statements/{month}; GET /v1/limits; GET /v1/plans;
GET PUT DELETE /v1/subscription
"""
QUERIES = {
    "GET /v1/pods": "state agent_id label created_after limit cursor",
    "DELETE /v1/pods": "state agent_id label created_after",
    "POST /v1/pods": "wait until after_version duplicate dry_run",
    "GET /v1/pods/{id}": "wait until after_version",
    "GET /v1/logs/{pod_id}": "tail since follow",
    "GET /v1/gpus/{model}/prices": "from to step provider",
}
PAGED = {"GET /v1/agents", "GET /v1/keys", "GET /v1/offers", "GET /v1/gpus", "GET /v1/providers", "GET /v1/pods",
         "GET /v1/pods/{id}/events", "GET /v1/usage/records", "GET /v1/budgets", "GET /v1/plans"}  # fmt: skip


async def test_every_name_is_there_and_no_other(world: World, subtests: pytest.Subtests):
    transport = httpx.ASGITransport(Gateway({name: app_named(name) for name in bundle.BY_NAME}))
    async with httpx.AsyncClient(transport=transport, base_url="http://broker") as http:
        document: dict[str, Any] = (await http.get("/openapi.json")).json()
    operations = {
        f"{m.upper()} {p}": described for p, methods in document["paths"].items() for m, described in methods.items()
    }
    for line in CALLS.split(";"):
        *methods, path = line.split()
        assert {f"{method} {path}" for method in methods} <= set(operations), path
    for name, fields in RESOURCES.items():
        with subtests.test(name):
            assert set(document["components"]["schemas"][name]["properties"]) == set(fields.split())
    for label, described in operations.items():
        given = {parameter["name"] for parameter in described["parameters"] if parameter["in"] == "query"}
        with subtests.test(label):
            assert label not in QUERIES or given == set(QUERIES[label].split())
            assert ({"limit", "cursor"} <= given) == (label in PAGED)
            for parameter in described["parameters"]:
                if parameter["name"] == "limit":
                    assert (parameter["schema"]["minimum"], parameter["schema"]["maximum"]) == (1, 200)
            answers = {int(status): answer for status, answer in described["responses"].items()}
            assert {422, 429, 500, 503} <= set(answers)
            assert (
                bool(described["security"]) == (401 in answers and "/v1/token" not in label)
                or not described["security"]
            )
            if label.startswith(("POST", "PUT", "PATCH")):
                assert {400, 413} <= set(answers)


async def test_answers_have_the_fields_that_their_schemas_name(world: World):
    pod = await world.run(world.root)
    await world.pass_time(minutes=5)
    await world.tick()
    quote = await world.root.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 60})
    dry = {"image": "b", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 60}
    shown: dict[str, Any] = {
        "Pod": await world.root.get(f"/v1/pods/{pod['id']}"), "Quote": quote, "ChosenOffer": quote["offer"],
        "DryRun": await world.root.post("/v1/pods?dry_run=true", dry, 200), "AttemptView": pod["attempts"][0],
        "Whoami": await world.root.get("/v1/whoami"), "Agent": await world.root.get(f"/v1/agents/{world.root.agent_id}"),
        "Offer": (await world.root.get("/v1/offers"))["items"][0], "Key": (await world.root.get("/v1/keys"))["items"][0],
        "Usage": await world.root.get("/v1/usage"), "UsageRow": (await world.root.get("/v1/usage?group_by=pod"))["items"][0],
        "UsageRecord": (await world.root.get("/v1/usage/records"))["items"][0],
        "Budget": (await world.root.get("/v1/budgets"))["items"][0],
    }  # fmt: skip
    for name, answer in shown.items():
        assert set(answer) == set(RESOURCES[name].split()), name
    for chosen in (quote["offer"], shown["Pod"]["offer"], shown["DryRun"]["offer"]):
        assert (chosen["availability"], chosen["stale"]) == ("high", False)
        assert chosen["observed_at"].endswith("Z")
    prefixes = {"Pod": "pod", "Quote": "qte", "Agent": "agt", "Offer": "ofr", "Key": "key", "UsageRecord": "use"}
    assert {name: shown[name]["id"].partition("_")[0] for name in prefixes} == prefixes


async def test_an_operator_sets_the_budget_of_any_organisations_root_and_of_nobody_below_it(world: World):
    from tests.integration.test_auth import second

    other = second(world)
    below = await other.child(budget={"limit_usd": "5"})
    path = f"/v1/budgets/{other.agent_id}"
    assert (await world.root.put(path, {"limit_usd": "7", "period": "month"}))["limit_usd"] == "7.000000"
    assert (await other.get("/v1/budgets"))["items"][0]["period"] == "month"
    await world.root.put(f"/v1/budgets/{below.agent_id}", {"limit_usd": "1"}, 404)
    powerless = await world.root.child()
    await powerless.put(path, {"limit_usd": "1"}, 404)
    await other.put(f"/v1/budgets/{world.root.agent_id}", {"limit_usd": "1"}, 404)
    assert (await other.get("/v1/budgets"))["items"][0]["limit_usd"] == "7.000000"
