"""``/metrics`` for Prometheus: vLLM's names with the prefix ``mixtral:``, and the tokens of every expert.

What the engine counts itself is read when somebody asks; what depends on the clock is observed here, per sequence.
"""

import time
from collections.abc import Iterator
from typing import Protocol

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

router = APIRouter()
disable_created_metrics()

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = tuple(scale * 10**power for power in range(6) for scale in (1, 2, 5))
LABELS = ["model_name", "engine"]


class Stats(Protocol):
    """What ``_C.EngineStats`` holds."""

    running: int
    waiting: int
    pages: int
    pages_in_use: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int


class CountingEngine(Protocol):
    def stats(self) -> Stats: ...

    def routing_counts(self) -> tuple[int, list[list[int]], list[list[int]]] | None: ...


class Metrics:
    """The metrics of one server."""

    def __init__(self, model_name: str, engine: CountingEngine) -> None:
        self.labels = [model_name, "0"]
        self.registry = CollectorRegistry()
        self.engine = engine
        self.registry.register(self)
        self.success = Counter(
            "mixtral:request_success", "Sequences that ended", [*LABELS, "finished_reason"], registry=self.registry
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "From submission", FIRST_TOKEN)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens", BETWEEN_TOKENS)
        self.whole = self._histogram("e2e_request_latency_seconds", "From submission to the end", REQUEST)
        self.queue = self._histogram("request_queue_time_seconds", "Until the first pass had run", REQUEST)
        self.prefill = self._histogram("request_prefill_time_seconds", "From there to the first token", REQUEST)
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last", REQUEST)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.new_tokens = self._histogram("request_generation_tokens", "Tokens of an answer", TOKENS)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request", TOKENS)

    def sequence(self, prompt_tokens: int, max_tokens: int) -> "SequenceTimes":
        """Begins to observe a sequence that is being submitted."""
        self.prompt_tokens.observe(prompt_tokens)
        self.params_max_tokens.observe(max_tokens)
        return SequenceTimes(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:  # asked for by the registry, to find names that come twice
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape."""
        stats = self.engine.stats()
        gauges = {
            "num_requests_running": ("Sequences that take part in passes", stats.running),
            "num_requests_waiting": ("Sequences that wait for their first pass", stats.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache's pages in use, 0 to 1",
                stats.pages_in_use / max(stats.pages, 1),
            ),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "generation_tokens": ("Tokens of answers", stats.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found there", stats.prefix_hits),
            "num_preemptions": ("Sequences that had to give up their pages", stats.preemptions),
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (help_, value) in values.items():
                metric = family(f"mixtral:{name}", help_, labels=LABELS)
                metric.add_metric(self.labels, value)
                yield metric
        yield self._expert_tokens()

    def _expert_tokens(self) -> Metric:
        metric = CounterMetricFamily(
            "mixtral:expert_tokens", "Tokens that went to an expert", labels=[*LABELS, "layer", "expert"]
        )
        counts = self.engine.routing_counts()
        for layer, row in enumerate(counts[2] if counts else []):
            for expert, tokens in enumerate(row):
                metric.add_metric([*self.labels, str(layer), str(expert)], tokens)
        return metric

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"mixtral:{name}", help_, LABELS, buckets=buckets, registry=self.registry)
        return histogram.labels(*self.labels)


class SequenceTimes:
    """The times of one sequence."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._first_pass = self._first_token = self._last_token = 0.0
        self._tokens = 0

    def progress(self, new_tokens: int) -> None:
        """A forward pass computed tokens of it, and ``new_tokens`` came out."""
        now = time.monotonic()
        if not self._first_pass:
            self._first_pass = now
            self._metrics.queue.observe(now - self._start)
        if new_tokens == 0:
            return
        waits = new_tokens
        if not self._tokens:
            self._first_token = self._last_token = now
            self._metrics.first_token.observe(now - self._start)
            self._metrics.prefill.observe(now - self._first_pass)
            waits -= 1
        for _ in range(waits):  # more than one came together, so the time is shared
            self._metrics.between_tokens.observe((now - self._last_token) / new_tokens)
        self._tokens += new_tokens
        self._last_token = now

    def end(self, finish_reason: str) -> None:
        metrics = self._metrics
        metrics.success.labels(*metrics.labels, finish_reason).inc()
        metrics.whole.observe(time.monotonic() - self._start)
        metrics.new_tokens.observe(self._tokens)
        if self._tokens:
            metrics.decode.observe(self._last_token - self._first_token)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """In Prometheus's text format."""
    return Response(request.app.state.served.metrics.text(), media_type=CONTENT_TYPE)
