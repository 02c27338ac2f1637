"""GET /metrics, read by the official parser: names, labels, histograms, bounds of labels, rights."""

from __future__ import annotations

import json
import re
from pathlib import Path

from http_world import HttpWorld
from prometheus_client.parser import text_string_to_metric_families

from llmos.codes import FinishReason
from llmos.keys.roles import Role
from llmos.protocol import messages as m
from llmos.services.gateway.http import metrics

ROOT = Path(__file__).parents[3]


def scrape(world: HttpWorld) -> dict:
    """{name: {labels: value}}; what the parser does not understand raises."""
    with world.http() as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        family.name: {(sample.name, *sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(answer.text)
    }


def test_the_microkernels_figures(world: HttpWorld) -> None:
    found = scrape(world)
    pages = {dict(key[1:])["state"]: value for key, value in found["llmos_pages"].items()}
    assert pages == {"free": 60.0, "cached": 2.0, "used": 2.0}  # of the echoing microkernel's 64
    assert found["llmos_service_up"] == {("llmos_service_up", ("service", "microkernel")): 1.0}
    assert found["llmos_build_info"]


def test_requests_are_counted_by_route_and_never_by_path(world: HttpWorld) -> None:
    with world.http() as client:
        for path in ("/v1/models/echo", "/v1/models/nothing", "/nowhere/1", "/nowhere/2"):
            client.get(path)
    counts = scrape(world)["llmos_http_requests"]
    by_route = {
        (dict(key[1:])["route"], dict(key[1:])["code"]): value
        for key, value in counts.items()
        if key[0] == "llmos_http_requests_total"
    }
    assert by_route["/v1/models/{name:path}", "200"] == 1.0
    assert by_route["/v1/models/{name:path}", "404"] == 1.0
    assert by_route["(none)", "404"] == 2.0
    assert not any("nowhere" in route for route, _ in by_route)


def test_metrics_need_the_right_to_look(world: HttpWorld) -> None:
    submitter, inspector = world.add_key("bob", Role.SUBMIT), world.add_key("bob", Role.INSPECT)
    with world.stranger() as nobody:
        assert nobody.get("/metrics").status_code == 401
    with world.http(submitter) as client:
        assert client.get("/metrics").status_code == 403
    with world.http(inspector) as client:
        assert client.get("/metrics").status_code == 200


def test_histograms_are_cumulative_and_all_reasons_have_a_series() -> None:
    row = m.HistogramRow("first_token", (0.5, 1.0), (2, 0, 3), 9.25)
    lane = m.LaneMeasures("demo", (row,), (m.EndedRow(int(FinishReason.STOP), 4),))
    families = {family.name: family for family in metrics._of_measures((lane,))}
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in families["llmos_time_to_first_token_seconds"].samples
    }
    name = "llmos_time_to_first_token_seconds"
    assert samples == {
        (f"{name}_bucket", "0.5"): 2.0, (f"{name}_bucket", "1.0"): 2.0, (f"{name}_bucket", "+Inf"): 5.0,
        (f"{name}_count", None): 5.0, (f"{name}_sum", None): 9.25,
    }  # fmt: skip
    ended = {sample.labels["reason"]: sample.value for sample in families["llmos_outputs_ended"].samples}
    assert ended == {reason.name.lower(): 4.0 if reason is FinishReason.STOP else 0.0 for reason in FinishReason}


def test_many_tenants_are_a_bounded_number_of_series() -> None:
    rows = tuple(
        m.TenantRow(f"t{number}", "demo", 1.0, 10, 0, 1, 1, 0.0, pages=1, running=0, waiting=0, tokens=number)
        for number in range(300)
    )
    families = {family.name: family for family in metrics._of_tenants(rows)}
    tokens = {sample.labels["tenant"]: sample.value for sample in families["llmos_tenant_tokens"].samples}
    assert len(tokens) == metrics.MOST_TENANTS + 1
    assert tokens["t299"] == 299.0
    assert tokens[metrics.OTHERS] == sum(range(200))


def test_the_page_and_the_dashboard_name_exactly_what_there_is(world: HttpWorld) -> None:
    names = {name for name in scrape(world) if name.startswith("llmos_")} | {
        "llmos_gpu_memory_bytes", "llmos_gpu_busy_ratio", "llmos_gpu_power_watts",
    }  # fmt: skip
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(llmos_\w+)`", page, re.MULTILINE))
    counters = {name for name in documented if name.endswith("_total")}
    assert documented - counters | {name.removesuffix("_total") for name in counters} == names
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    used = {
        re.sub(r"_(bucket|sum|count|total)$", "", name) for query in queries for name in re.findall(r"llmos_\w+", query)
    }
    assert queries
    assert used <= names, used - names
