"""GET /metrics: what the microkernel counts, GPUs, and this worker's own requests, in Prometheus' text format. docs/metrics.md lists them.

All but the requests comes from the microkernel at the moment of asking, so every worker says the same of it, and a worker that is new
loses nothing. Invariant: labels are bounded. Models and services are those of the configuration, reasons and states are enumerated, routes
are those of the table, and of tenants the `MOST_TENANTS` largest have names while the others are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.responses import Response
from starlette.types import ASGIApp

from llmos.codes import FinishReason, ServiceState
from llmos.protocol.messages import (
    HistogramRow,
    LaneMeasures,
    LaneStatus,
    MeasuresGet,
    MeasuresReply,
    StatusGet,
    StatusReply,
    TenantRow,
    TenantsGet,
    TenantsReply,
)
from llmos.services.gateway.http import gpus
from llmos.services.gateway.http.context import Call

MOST_TENANTS = 100
OTHERS = "(others)"
_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PAGE_STATES = ("free", "cached", "used")
_SEQUENCE_STATES = ("waiting", "running", "blocked", "suspended")
_HISTOGRAMS = {
    "queue": ("llmos_queue_seconds", "From a request to its first row."),
    "first_token": ("llmos_time_to_first_token_seconds", "From a request to its first token."),
    "between_tokens": ("llmos_inter_token_seconds", "From one decode step's result to the next one's, once a token."),
    "step": ("llmos_step_seconds", "What an executor's step took."),
}
_LANE_COUNTERS = (
    ("steps", "llmos_steps", "Steps that were issued."),
    ("tokens_committed", "llmos_output_tokens", "Output tokens."),
    ("prefix_query_tokens", "llmos_prompt_tokens", "Prompt tokens of sequences that began."),
    ("prefix_hit_tokens", "llmos_prompt_tokens_cached", "Of these, found in the prefix cache."),
    ("preemptions", "llmos_preemptions", "Sequences that gave way to others."),
    ("swaps_out", "llmos_swaps_out", "Sequences whose pages went to the host."),
    ("swaps_in", "llmos_swaps_in", "Sequences whose pages came back."),
    ("pages_copied", "llmos_pages_copied", "Shared pages that were copied because a holder wrote to them."),
    ("deadline_misses", "llmos_deadline_misses", "Outputs that were not done by their deadline."),
    ("results_dropped", "llmos_results_dropped", "Step results that came too late to count."),
)


class _Given:
    """A collector of what is there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


async def metrics(call: Call) -> ASGIApp:
    """A key whose role is below admin sees its own tenant only."""
    status = await call.session.ask(StatusGet, StatusReply)
    measures = await call.session.ask(MeasuresGet, MeasuresReply)
    tenants = await call.session.ask(TenantsGet, TenantsReply)
    registry = CollectorRegistry()
    registry.register(_Given(_families(status, measures, tenants.tenants)))
    return Response(generate_latest(registry) + generate_latest(call.site.metrics.registry), media_type=_TYPE)


def _families(status: StatusReply, measures: MeasuresReply, tenants: tuple[TenantRow, ...]) -> Iterator[Metric]:
    build = GaugeMetricFamily("llmos_build_info", "1, with the version as label.", labels=("version",))
    build.add_metric((status.version,), 1)
    yield build
    yield GaugeMetricFamily(
        "llmos_microkernel_uptime_seconds", "Since the microkernel started.", value=status.uptime_ms / 1e3
    )
    yield from _of_models(status.lanes)
    yield from _of_measures(measures.lanes)
    yield from _of_tenants(tenants)
    yield from _of_services(status)
    yield from gpus.families()


def _of_models(lanes: tuple[LaneStatus, ...]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("llmos_model_ready", "1 if an executor serves it.", labels=("model",))
    pages = GaugeMetricFamily("llmos_pages", "KV pages by state.", labels=("model", "state"))
    host = GaugeMetricFamily("llmos_host_pages", "KV pages in host memory by state.", labels=("model", "state"))
    size = GaugeMetricFamily("llmos_page_tokens", "Tokens a page holds.", labels=("model",))
    sequences = GaugeMetricFamily("llmos_sequences", "Live sequences by state.", labels=("model", "state"))
    for lane in lanes:
        ready.add_metric((lane.model,), float(lane.ready))
        size.add_metric((lane.model,), lane.page_size)
        used = lane.pages_total - lane.pages_free - lane.pages_cached
        for state, value in zip(_PAGE_STATES, (lane.pages_free, lane.pages_cached, used), strict=True):
            pages.add_metric((lane.model, state), value)
        host.add_metric((lane.model, "free"), lane.host_pages_free)
        host.add_metric((lane.model, "used"), lane.host_pages_total - lane.host_pages_free)
        for state in _SEQUENCE_STATES:
            sequences.add_metric((lane.model, state), getattr(lane, state))
    yield from (ready, pages, host, size, sequences)
    for field, name, text in _LANE_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=("model",))
        for lane in lanes:
            counter.add_metric((lane.model,), getattr(lane, field))
        yield counter


def _of_measures(lanes: tuple[LaneMeasures, ...]) -> Iterator[Metric]:
    for place, (name, text) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(name, text, labels=("model",))
        for lane in lanes:
            for row in lane.histograms:
                if row.name == place:
                    family.add_metric((lane.model,), *_cumulative(row))
        yield family
    ended = CounterMetricFamily("llmos_outputs_ended", "Outputs that ended, by reason.", labels=("model", "reason"))
    for lane in lanes:
        counts = {entry.reason: entry.count for entry in lane.ended}
        for reason in FinishReason:  # also those that have not happened: a rate needs a series to begin with
            ended.add_metric((lane.model, reason.name.lower()), counts.get(int(reason), 0))
    yield ended


def _cumulative(row: HistogramRow) -> tuple[list[tuple[str, float]], float]:
    buckets, total = [], 0
    for bound, count in zip((*map(str, row.bounds), "+Inf"), row.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets, row.sum


def _of_tenants(rows: tuple[TenantRow, ...]) -> Iterator[Metric]:
    used: dict[str, int] = {}
    for row in rows:
        used[row.tenant] = used.get(row.tenant, 0) + row.tokens
    named = set(sorted(used, key=lambda name: (-used[name], name))[:MOST_TENANTS])
    sums: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        key = (row.model, row.tenant if row.tenant in named else OTHERS)
        old = sums.get(key, [0, 0, 0, 0])
        sums[key] = [sum(pair) for pair in zip(old, (row.pages, row.running, row.waiting, row.tokens), strict=True)]
    labels = ("model", "tenant")
    pages = GaugeMetricFamily("llmos_tenant_pages", "KV pages that count for a tenant.", labels=labels)
    sequences = GaugeMetricFamily("llmos_tenant_sequences", "A tenant's sequences by state.", labels=(*labels, "state"))
    tokens = CounterMetricFamily(
        "llmos_tenant_tokens", "Tokens computed for a tenant, prompt and output.", labels=labels
    )
    for key, (num_pages, running, waiting, num_tokens) in sums.items():
        pages.add_metric(key, num_pages)
        sequences.add_metric((*key, "running"), running)
        sequences.add_metric((*key, "waiting"), waiting)
        tokens.add_metric(key, num_tokens)
    yield from (pages, sequences, tokens)


def _of_services(status: StatusReply) -> Iterator[Metric]:
    up = GaugeMetricFamily("llmos_service_up", "1 if this process of llmosd is ready.", labels=("service",))
    restarts = CounterMetricFamily("llmos_service_restarts", "How often it was started again.", labels=("service",))
    for service in status.services:
        up.add_metric((service.name,), float(service.state == ServiceState.RUNNING))
        restarts.add_metric((service.name,), service.restarts)
    yield from (up, restarts)
