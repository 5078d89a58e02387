"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The figures of one server."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and processor time
        name = "fusionroute_"
        self.requests = Counter(name + "requests", "Requests, by path and status.", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter(name + "generated_tokens", "Generated tokens, by the expert that answered.", ("expert",), registry=registry)
        self.switches = Counter(name + "expert_switches", "Tokens of another expert than the one before.", registry=registry)
        self.drafted = Counter(name + "drafted_tokens", "Tokens that speculation guessed.", registry=registry)
        self.accepted = Counter(name + "accepted_tokens", "Guessed tokens that held.", registry=registry)
        self.first = Histogram(name + "time_to_first_token_seconds", "From arrival.", buckets=FIRST, registry=registry)
        self.each = Histogram(name + "time_per_token_seconds", "Between two tokens.", buckets=EACH, registry=registry)
        Gauge(name + "requests_running", "Requests that generate.", registry=registry).set_function(running)
        Gauge(name + "requests_waiting", "Requests in the queue.", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)
