"""Prometheus metrics, named after vLLM's with our prefix.

Counters and histograms are kept here as requests pass; gauges are read from the service's status when scraped. Every
interval is between two readings of this process's own monotonic clock. Labels are bounded: models, reasons, devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.api.context import API
from coordinator.service import ClusterStatus, DeviceStatus, DraftStatus, Service

PREFIX = "edge_runtime_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._model = service.model.name
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked for in kept pages.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found there, and not computed.")
        self._success = self._counter("request_success", "Finished generations.", "finished_reason")
        self._failures = self._counter(
            "request_failure", "Generations that failed or were cancelled.", "reason"
        )
        self._first = self._histogram("time_to_first_token_seconds", "From acceptance to the first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a generation.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From acceptance to the last token.")
        self._prompt_size = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a generation.", _TOKENS
        )
        self._answer_size = self._histogram("request_generation_tokens", "Tokens of a generation.", _TOKENS)
        self.registry.register(_StatusCollector(service))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _LATENCY) -> Histogram:
        return Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets)

    def generation(self, prompt_tokens: int) -> GenerationMetrics:
        """Starts the clock of one generation."""
        self._prompt_tokens.labels(self._model).inc(prompt_tokens)
        self._cache_queries.labels(self._model).inc(prompt_tokens)
        self._prompt_size.labels(self._model).observe(prompt_tokens)
        return GenerationMetrics(self, self._clock())

    def render(self) -> bytes:
        return generate_latest(self.registry)


class GenerationMetrics:
    """The intervals of one generation."""

    def __init__(self, metrics: Metrics, started_at: float) -> None:
        self._metrics = metrics
        self._started_at = self._last_at = started_at
        self._tokens = 0
        # Looked up once: every token asks for these.
        self._between = metrics._between.labels(metrics._model)
        self._generation_tokens = metrics._generation_tokens.labels(metrics._model)

    def token(self, cached_tokens: int = 0) -> None:
        """`cached_tokens` of the prompt come with the first."""
        metrics, now = self._metrics, self._metrics._clock()
        histogram = self._between if self._tokens else metrics._first.labels(metrics._model)
        histogram.observe(now - self._last_at)
        self._generation_tokens.inc()
        if cached_tokens or not self._tokens:
            metrics._cache_hits.labels(metrics._model).inc(cached_tokens)
        self._last_at = now
        self._tokens += 1

    def finished(self, reason: str) -> None:
        metrics = self._metrics
        metrics._success.labels(metrics._model, reason).inc()
        metrics._whole.labels(metrics._model).observe(metrics._clock() - self._started_at)
        metrics._answer_size.labels(metrics._model).observe(self._tokens)

    def failed(self, reason: str) -> None:
        self._metrics._failures.labels(self._metrics._model, reason).inc()


class _StatusCollector(Collector):
    """Gauges as they are at the moment of the scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: describing must not ask the service."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status = self._service.status()
        yield from _cluster_gauges(status)
        yield from _device_gauges(status)
        yield from _draft_counters(status)


def _draft_counters(status: ClusterStatus) -> Iterator[Metric]:
    columns: tuple[tuple[str, str, Callable[[DraftStatus], int]], ...] = (
        ("spec_decode_num_draft_tokens", "Guessed tokens sent to the first stage.", lambda d: d.drafted),
        ("spec_decode_num_accepted_tokens", "Those that were right.", lambda d: d.accepted),
        ("spec_decode_num_wasted_tokens", "Those that were run for nothing.", lambda d: d.wasted),
    )
    for name, text, value in columns:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name", "source"))
        for each in status.drafts:
            family.add_metric((status.model.name, each.source), value(each))
        yield family


def _cluster_gauges(status: ClusterStatus) -> Iterator[Metric]:
    waiting = sum(request.state == "waiting" for request in status.requests)
    plan = status.plan
    values = (
        ("num_requests_running", "Generations being computed.", len(status.requests) - waiting),
        ("num_requests_waiting", "Generations waiting for a slot.", waiting),
        ("pipeline_ready", "1 when a pipeline serves.", int(plan is not None and plan.ready)),
        (
            "predicted_tokens_per_second",
            "The plan's prediction.",
            plan.predicted_tokens_per_second if plan else 0,
        ),
        (
            "measured_tokens_per_second",
            "Of recent decoding, alone.",
            plan.measured_tokens_per_second if plan else 0,
        ),
        ("tokens_per_second", "Of the whole cluster, last few seconds.", status.tokens_per_second),
        ("uptime_seconds", "Since the coordinator started.", status.uptime_seconds),
    )
    for name, text, value in values:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((status.model.name,), float(value))
        yield family


def _device_gauges(status: ClusterStatus) -> Iterator[Metric]:
    columns: tuple[tuple[str, str, Callable[[DeviceStatus], float]], ...] = (
        (
            "device_up",
            "1 when the device serves or could.",
            lambda d: d.state in ("ready", "loading", "serving"),
        ),
        ("device_weight_bytes", "Weights the device holds.", lambda d: d.weight_bytes),
        ("device_memory_budget_bytes", "What the device may use.", lambda d: d.memory_budget_bytes),
        (
            "device_layers",
            "Layers the device runs.",
            lambda d: d.layers[1] - d.layers[0] + 1 if d.layers else 0,
        ),
        ("device_rtt_seconds", "Round trip from the coordinator.", lambda d: d.rtt_seconds),
    )
    for name, text, value in columns:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("device", "device_id"))
        for device in status.devices:
            family.add_metric((device.name, device.id), float(value(device)))
        yield family


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[API].metrics.render(), headers={"Content-Type": CONTENT_TYPE})
