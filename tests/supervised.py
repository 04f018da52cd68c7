"""What the supervisor's tests share: supervisors over the fake worker, and a look at the real processes."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from modules.options import GenerationOptions, LoadOptions
from modules.protocol import Chunk, GenerateOrder, LoadOrder, Piece
from modules.supervisor import Snapshot, Supervisor

FAKE_WORKER = str(Path(__file__).with_name("fake_worker.py"))
LIMIT_S = 30.0  # for a condition on a busy machine; nothing takes nearly as long


def order(name: str) -> LoadOrder:
    """A load order; the words of its name tell the fake worker what to do."""
    return LoadOrder(name, "/models/fake", "safetensors", "causal", "", LoadOptions(), 2048, "", "")


def prompt(text: str) -> GenerateOrder:
    return GenerateOrder(GenerationOptions(), prompt=text)


def text_of(chunks: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Piece))


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """The condition's value as soon as it is true; fails after the limit."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.01)
    return value


class Workers:
    """The real workers that this process has started since, and not those that other tests keep."""

    def __init__(self) -> None:
        self._others = {worker.pid for worker in _workers()}

    def __call__(self) -> list[psutil.Process]:
        return [worker for worker in _workers() if worker.pid not in self._others]


def _workers() -> list[psutil.Process]:
    """One that ends while it is looked at is none."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if "modules.worker" in child.cmdline() else []
    return found


def living(tag: str) -> set[int]:
    """The processes, grandchildren included, that were started with this tag and are no zombies."""
    found = set()
    for process in psutil.process_iter():
        try:
            if tag in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass
class Supervised:
    """A supervisor and the tag that all its processes carry."""

    supervisor: Supervisor
    tag: str

    def pids(self) -> set[int]:
        return living(self.tag)

    def load(self, name: str, *, beside: bool = False) -> Snapshot:
        """Load and wait until it is over."""
        self.supervisor.load(order(name), beside=beside)
        return self.settled()

    def begin(self, name: str, *, beside: bool = False) -> Snapshot:
        """Load and wait until the worker is at it."""
        self.supervisor.load(order(name), beside=beside)
        return self.when(lambda s: s.progress is not None)

    def settled(self) -> Snapshot:
        """The snapshot when no load is under way and the next one would be taken."""
        snapshot = self.supervisor.wait_loaded(LIMIT_S)
        assert str(snapshot.state) not in ("starting", "loading")
        return snapshot

    def when(self, condition: Callable[[Snapshot], bool]) -> Snapshot:
        """The first snapshot of which the condition is true."""
        deadline = time.monotonic() + LIMIT_S
        snapshot = self.supervisor.snapshot()
        while not condition(snapshot):
            assert time.monotonic() < deadline, f"not within {LIMIT_S:g} s; last: {snapshot}"
            snapshot = self.supervisor.wait(snapshot.version, 1.0)
        return snapshot

    def worker_pid(self) -> int:
        """The process of the model that answers, as it says itself."""
        memory = self.supervisor.memory()
        assert memory is not None
        return memory.rss_bytes


@contextmanager
def supervised(*faults: str, warm_worker: bool = False, **rest: Any) -> Iterator[Supervised]:
    """A supervisor over fake workers; afterwards no process of it may be left."""
    tag = f"TAG={uuid.uuid4().hex}"
    supervisor = Supervisor(command=(sys.executable, FAKE_WORKER, tag, *faults), warm_worker=warm_worker, **rest)
    one = Supervised(supervisor, tag)
    try:
        yield one
    finally:
        supervisor.close()
        until(lambda: not one.pids(), "the workers' end after close", 2.0)
