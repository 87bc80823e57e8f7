"""What Prometheus reads: the engine's counters, and requests by what became of them."""

from collections.abc import Iterator
from typing import Any

from ..engine import Engine

# The engine's counters that only grow, and those that tell what is now.
GROWS = {
    "finished": "Requests that have ended",
    "tokens": "Tokens that became final",
    "turns": "Turns of the decoding loop",
    "refreshes": "Forwards at the beginning of a block",
    "cached_steps": "Forwards of a block alone",
    "compiled": "Kernels compiled",
    "captured": "Forwards captured in CUDA graphs",
}
IS = {
    "rows": "Requests that can be decoded at once",
    "busy": "Requests that are being decoded",
    "waiting": "Requests in line",
    "bytes": "Bytes of canvas, cache and logits",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        known: dict[str, Any] = {"registry": self.registry, "namespace": "fastdllm"}
        self.requests = Counter(
            "http_requests", "Answered HTTP requests", ("path", "status"), **known
        )
        self.seconds = Histogram(
            "request_seconds", "Until an answer was whole", buckets=SECONDS, **known
        )
        self.first_token = Histogram(
            "first_token_seconds", "Until a stream's first tokens", buckets=SECONDS, **known
        )

    def text(self) -> tuple[bytes, str]:
        """(what there is to read, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _EngineCollector:
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self.engine.stats()
        for name, words in GROWS.items():
            yield CounterMetricFamily(f"fastdllm_{name}", words, value=stats[name])
        for name, words in IS.items():
            yield GaugeMetricFamily(f"fastdllm_{name}", words, value=stats[name])


class Counted:
    """ASGI middleware: counts answers by path and status. Paths that nobody serves are one."""

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counting(message):
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)
