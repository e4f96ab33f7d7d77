"""Counts and times for Prometheus, in a registry of the application's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from rmfast.integrations.serve.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rmfast_requests", "Requests, by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "rmfast_request_seconds", "From the body to the answer.", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.disconnects = Counter(
            "rmfast_disconnects", "Clients that left before their answer.", registry=self.registry
        )
        self.batch_texts = Histogram(
            "rmfast_batch_texts", "Texts of a batch.", ["model", "work"], buckets=_TEXTS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "rmfast_batch_seconds", "Of a batch.", ["model", "work"], buckets=_SECONDS, registry=self.registry
        )
        self.tokens = Counter("rmfast_tokens", "Tokens of all texts that were run.", ["model"], registry=self.registry)
        self.asked = Gauge("rmfast_texts_without_answer", "Texts that wait or run.", ["model"], registry=self.registry)

    def batched(self, model: str, work: str, texts: int, tokens: int, seconds: float) -> None:
        self.batch_texts.labels(model, work).observe(texts)
        self.batch_seconds.labels(model, work).observe(seconds)
        self.tokens.labels(model).inc(tokens)

    def watch(self, model: str, scheduler: Scheduler) -> None:
        self.asked.labels(model).set_function(lambda: scheduler.asked)

    def page(self) -> tuple[bytes, str]:
        """The text of all, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4
