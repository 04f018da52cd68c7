"""What goes on, counted: requests, answers, loads, failures. No text of any message is kept.

The figures are Prometheus's, in a registry of their own; the last requests are kept for the Session tab, and each of
them is a line of the log. May be used from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from modules.errors import LoadstoneError
from modules.protocol import Done, LoadOrder, Memory
from modules.supervisor import Place

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PAGE = "page"  # the route of all that is not the API's
_MOST_RECENT = 50
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_POLLED = frozenset({"/v1/internal/model/status", "/healthz", "/metrics"})  # logged where --verbose asks for more
_QUICK_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass
class Seen:
    """One request, filled in by whoever learns more of it. ``kind``: of the error that it ended with."""

    method: str = ""
    route: str = PAGE  # as it is declared, without what stands in its place for a name
    role: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    status: int = 0
    seconds: float = 0.0
    kind: str = ""
    began: float = field(default_factory=time.time)  # seconds since the epoch
    clock: float = field(default_factory=time.monotonic)

    def first_token(self) -> None:
        """The first part of an answer is there."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.clock

    def line(self) -> str:
        """The request as a line of the log."""
        parts = [f"{self.method} {self.route}", str(self.status), f"{self.seconds:.3f} s"]
        parts += [part for part in (self.role, self.model, self.kind) if part]
        if self.prompt_tokens or self.completion_tokens:
            parts.append(f"{self.prompt_tokens}+{self.completion_tokens} tokens")
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s * 1000:.0f} ms")
        return " · ".join(parts)


SEEN = "loadstone.seen"  # the place of a request's Seen in its ASGI scope


def seen_of(scope: Mapping[str, Any]) -> Seen:
    """Where to write what is learnt of a request; nobody reads it where nobody watches."""
    seen = scope.get(SEEN)
    return seen if isinstance(seen, Seen) else Seen()


@dataclass(frozen=True)
class Totals:
    """Since the start. ``first_token_s``: on average, from an answer's request on; None: there was no answer yet."""

    requests: int  # of the API
    failures: int
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float | None


class Traffic:
    """See the module."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._recent: deque[Seen] = deque(maxlen=_MOST_RECENT)
        self._lock = threading.Lock()
        self._requests = Counter(
            "loadstone_requests", "Requests by route and status.", ["method", "route", "status", "model"],
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "loadstone_request_seconds", "How long requests of the API took, to the last byte.", ["route"],
            buckets=(*_QUICK_S, *_LONG_S[-3:]), registry=registry,
        )  # fmt: skip
        self._prompt = Counter("loadstone_prompt_tokens", "Tokens read.", ["model"], registry=registry)
        self._completion = Counter("loadstone_completion_tokens", "Tokens generated.", ["model"], registry=registry)
        self._first = Histogram(
            "loadstone_first_token_seconds", "From when a model is asked to the first token, its queue included.",
            ["model"], buckets=_QUICK_S, registry=registry,
        )  # fmt: skip
        self._loads = Counter("loadstone_loads", "Loads by outcome.", ["model", "outcome"], registry=registry)
        self._load_seconds = Histogram(
            "loadstone_load_seconds", "How long loads took that succeeded.", ["model"], buckets=_LONG_S,
            registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "loadstone_failures", "What failed or was refused, by the error's kind.", ["source", "kind"],
            registry=registry,
        )  # fmt: skip

    # --- what is told ---

    def begin(self, method: str) -> Seen:
        """A request has come."""
        return Seen(method if method in _METHODS else "other")

    def end(self, seen: Seen) -> None:
        """It has been answered."""
        seen.seconds = time.monotonic() - seen.clock
        self._requests.labels(seen.method, seen.route, seen.status, seen.model).inc()
        if seen.kind:
            self._failures.labels("request", seen.kind).inc()
        if seen.route == PAGE and not seen.kind:
            return
        self._seconds.labels(seen.route).observe(seen.seconds)
        polled = seen.route in _POLLED and not seen.kind
        if not polled:
            with self._lock:
                self._recent.append(seen)
        log.log(logging.DEBUG if polled else logging.INFO, "%s", seen.line())

    def answered(self, model: str, done: Done, first_token_s: float | None) -> None:
        """An answer is there, of the API or of the page."""
        self.read(model, done.prompt_tokens)
        self._completion.labels(model).inc(done.completion_tokens)
        if first_token_s is not None:
            self._first.labels(model).observe(first_token_s)

    def read(self, model: str, tokens: int) -> None:
        """So many tokens of a prompt, or of a text to be embedded, were read."""
        self._prompt.labels(model).inc(tokens)

    def load_ended(self, order: LoadOrder, seconds: float, error: LoadstoneError | None) -> None:
        """A load has ended."""
        self._loads.labels(order.name, error.kind if error else "loaded").inc()
        if error is None:
            self._load_seconds.labels(order.name).observe(seconds)
        else:
            self.failed("load", error)

    def failed(self, source: str, error: LoadstoneError) -> None:
        """``source``: "load", "page" or "request"."""
        self._failures.labels(source, error.kind).inc()

    # --- what others see ---

    def recent(self) -> list[Seen]:
        """The API's last requests, the latest first."""
        with self._lock:
            return list(reversed(self._recent))

    def totals(self) -> Totals:
        """The figures summed up."""
        sums: dict[str, float] = {}
        for metric in self._registry.collect():
            for sample in metric.samples:
                route, source = sample.labels.get("route"), sample.labels.get("source", "request")
                if route not in (PAGE, *_POLLED) and source == "request":
                    sums[sample.name] = sums.get(sample.name, 0) + sample.value
        answers = sums.get("loadstone_first_token_seconds_count", 0)
        return Totals(
            requests=int(sums.get("loadstone_requests_total", 0)),
            failures=int(sums.get("loadstone_failures_total", 0)),
            prompt_tokens=int(sums.get("loadstone_prompt_tokens_total", 0)),
            completion_tokens=int(sums.get("loadstone_completion_tokens_total", 0)),
            first_token_s=sums["loadstone_first_token_seconds_sum"] / answers if answers else None,
        )

    def exposition(self, places: Iterable[Place], memory: Iterable[tuple[str, Memory]], waiting: int) -> bytes:
        """All of it in Prometheus's text format, beside how things stand now."""
        registry = CollectorRegistry()
        registry.register(_Now(list(places), list(memory), waiting))
        return generate_latest(self._registry) + generate_latest(registry)


class _Now(Collector):
    """How things stand at one moment. ``memory``: of each loaded model's process."""

    def __init__(self, places: list[Place], memory: list[tuple[str, Memory]], waiting: int) -> None:
        self._places, self._memory, self._waiting = places, memory, waiting

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, value in (
            ("model_loaded", "1 for each model that answers.", lambda place: int(place.loaded is not None)),
            ("model_uses", "Requests that hold a model.", lambda place: place.uses),
            ("answers", "Answers running or waiting.", lambda place: place.answers),
            ("queue", "Answers without text yet: in line, or their prompts being read.", lambda place: place.waiting),
            ("tokens_per_second", "Tokens generated a second now.", lambda place: place.tokens_per_second),
        ):
            gauge = GaugeMetricFamily(f"loadstone_{name}", text, labels=["model"])
            for place in self._places:
                gauge.add_metric([place.name], value(place))
            yield gauge
        yield GaugeMetricFamily("loadstone_waiting_for_load", "Requests that wait for a model.", value=self._waiting)
        held = GaugeMetricFamily(
            "loadstone_memory_bytes", "Memory that a model's process holds.", labels=["model", "device"]
        )
        for model, memory in self._memory:
            held.add_metric([model, "RAM"], memory.rss_bytes)
            for number, size in enumerate(memory.gpu_bytes):
                held.add_metric([model, f"GPU {number}"], size)
        yield held
