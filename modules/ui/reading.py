"""Files that are read through while somebody looks: how far it is, how long it takes, and its end before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import gradio as gr

from modules.errors import Cancelled, LoadstoneError
from modules.hub.keeping import Reading, Told
from modules.ui.common import MOVING_BAR, bar, small, warn
from modules.units import format_bytes, format_seconds

_LOOK_S = 0.3
_CANCELLED = "Cancelled; nothing was changed."


class Readings:
    """The readings under way, one of each tab of a browser at most. May be used from any thread."""

    def __init__(self) -> None:
        self._ends: dict[str | None, threading.Event] = {}

    def follow(self, tab: gr.Request, work: Callable[[Told], str]) -> Iterator[list[Any]]:
        """Updates for a line and for the button that ends the reading; at last the line that ``work`` gives, which
        tells meanwhile how far it is.
        """
        self.end(tab)
        end = self._ends[tab.session_hash] = threading.Event()
        told, begin = _Told(end), time.monotonic()
        with ThreadPoolExecutor(1, "reading") as pool:
            job = pool.submit(work, told)
            try:
                while not wait([job], _LOOK_S).done:
                    yield [progress_html(told.last, time.monotonic() - begin), gr.update(visible=True)]
                yield [_outcome(job.result), gr.update(visible="hidden")]
            finally:
                end.set()
                if self._ends.get(tab.session_hash) is end:
                    del self._ends[tab.session_hash]

    def end(self, tab: gr.Request) -> None:
        """End what this tab reads, if anything."""
        if (end := self._ends.pop(tab.session_hash, None)) is not None:
            end.set()


class _Told:
    """What was told last. Raises Cancelled in whoever tells it, once ``end`` is set."""

    def __init__(self, end: threading.Event) -> None:
        self.last: Reading | None = None
        self._end = end

    def __call__(self, reading: Reading) -> None:
        if self._end.is_set():
            raise Cancelled("The reading was ended.")
        self.last = reading


def _outcome(result: Callable[[], str]) -> str:
    try:
        return result()
    except Cancelled:
        return small(_CANCELLED)
    except LoadstoneError as error:
        warn(error)
        return ""


def progress_html(reading: Reading | None, elapsed_s: float) -> str:
    """A bar, the file, the bytes and the time that is left, as far as all that is known."""
    if reading is None or not reading.total_bytes:
        return MOVING_BAR + small("Looking at the files …")
    done, total = reading.done_bytes, reading.total_bytes
    left = f" · {format_seconds(elapsed_s * (total - done) / done)} left" if done else ""
    return bar("reading", 100 * done / total) + small(
        f"{reading.name} · {format_bytes(done)} of {format_bytes(total)} read{left}"
    )
