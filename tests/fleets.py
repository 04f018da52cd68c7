"""Fleets over the fake worker, for the tests of several models at once."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modules.supervisor import Fleet, Supervisor
from tests.supervised import FAKE_WORKER, LIMIT_S, living, order, until


@dataclass
class Ships:
    """A fleet and the tag that all its processes carry. Models are loaded by the fake worker's words."""

    fleet: Fleet
    tag: str

    def load(self, name: str, *, beside: bool = True, ends: tuple[str, ...] = ()) -> None:
        """Load as a person does, and wait until it is over."""
        self.fleet.load(order(name), beside=beside, ends=ends)
        self.fleet.front.wait_loaded(LIMIT_S)

    def names(self) -> list[str]:
        """What answers, the front one first."""
        return [loaded.order.name for loaded in self.fleet.loaded()]

    def pids(self) -> set[int]:
        return living(self.tag)

    def until_names(self, *names: str) -> None:
        until(lambda: sorted(self.names()) == sorted(names), f"loaded: {names}; now {self.names()}")


@contextmanager
def fleets(*, most: int = 1, **rest: Any) -> Iterator[Ships]:
    """A fleet over fake workers; afterwards no process of it may be left."""
    tag = f"TAG={uuid.uuid4().hex}"

    def supervisor() -> Supervisor:
        return Supervisor(command=(sys.executable, FAKE_WORKER, tag), warm_worker=False)

    ships = Ships(Fleet(supervisor(), supervisor, most=most, **rest), tag)
    try:
        yield ships
    finally:
        ships.fleet.close()
        until(lambda: not ships.pids(), "the workers' end after close", 2.0)
