"""What a server counts, for Prometheus. Numbers and names of tiers; nothing of what was asked or answered."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from dop_compile.serving.http.answers import Answer
from dop_compile.serving.scheduler import Scheduler

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own: several servers of one process do not mix."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, scheduler: Scheduler):
        self._registry = registry = CollectorRegistry()
        self.finished = Counter(
            "dop_compile_requests", "Requests for text by how they ended", ("tier", "outcome"), registry=registry
        )
        self.refused = Counter("dop_compile_refused", "Requests that were not begun", ("status",), registry=registry)
        self.prompt_tokens = Counter("dop_compile_prompt_tokens", "Of prompts", ("tier",), registry=registry)
        self.new_tokens = Counter("dop_compile_generated_tokens", "Of answers", ("tier",), registry=registry)
        self.first_token = Histogram(
            "dop_compile_first_token_seconds",
            "From the whole request to the first token, waiting included",
            ("tier",),
            registry=registry,
            buckets=SECONDS,
        )
        self.whole = Histogram(
            "dop_compile_request_seconds",
            "From the whole request to the last token, waiting included",
            ("tier",),
            registry=registry,
            buckets=SECONDS,
        )
        waiting = Gauge("dop_compile_waiting_requests", "Requests that wait", registry=registry)
        running = Gauge("dop_compile_running_requests", "Requests that run", registry=registry)
        waiting.set_function(lambda: scheduler.waiting)
        running.set_function(lambda: scheduler.running)

    def count(self, answer: Answer, outcome: str) -> None:
        """A request has ended: by a finish reason, an error's code, or "cancelled"."""
        self.finished.labels(answer.tier, outcome).inc()
        self.prompt_tokens.labels(answer.tier).inc(answer.prompt_tokens)
        self.new_tokens.labels(answer.tier).inc(answer.tokens)
        if answer.first_seconds is not None:
            self.first_token.labels(answer.tier).observe(answer.first_seconds)
            self.whole.labels(answer.tier).observe(answer.seconds)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self._registry)
