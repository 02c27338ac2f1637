"""What one worker counts of its own requests. Of several workers each has its own counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of when it began, that nobody reads


class HttpMetrics:
    """This worker's own requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llmos_http_requests",
            "Requests that were answered, by this worker.",
            ("route", "code"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "llmos_http_request_seconds", "Until the answer began.", ("route",), registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0),
        )  # fmt: skip
        self.open = Gauge("llmos_http_open_requests", "Requests that are being answered.", registry=self.registry)

    def answered(self, route: str, code: int, seconds: float) -> None:
        self.requests.labels(route, str(code)).inc()
        self.seconds.labels(route).observe(seconds)
