"""Chat templates are programs from strangers: they are ended where they do not end, or take the machine's memory.

transformers runs them in Jinja's sandbox, which keeps them from files and from Python, and bounds no time and no
memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import psutil
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modules.errors import BrokenTemplate
from modules.units import format_bytes

T = TypeVar("T")
LIMIT_S = 10.0  # ten thousand messages take a tenth of a second
MOST_GROWTH_BYTES = 2 << 30  # of the process while a template runs
_LOOK_S = 0.05
_STAYS_S = 60.0  # after the last template
_MOST_BITS = 100_000  # of a number: nothing can interrupt the arithmetic of longer ones
_MOST_REPEATED = 10_000_000  # characters, or members of a list, that one multiplication may give


class _Ended(BaseException):
    """Raised in the template's thread from outside. No ``except Exception`` on the way takes it for its own."""


def bounded(render: Callable[[], T], limit_s: float = LIMIT_S, most_growth_bytes: int = MOST_GROWTH_BYTES) -> T:
    """What ``render``, which runs a template of transformers, gives. Raises BrokenTemplate where it is ended."""
    _install()
    watch = _Watch(threading.get_ident(), limit_s, most_growth_bytes)
    try:
        try:
            return render()
        finally:
            watch.end()
    except _Ended:
        raise BrokenTemplate(f"The model's chat template {watch.reason}, and was ended.") from None


class _Watch:
    """One template's bounds. Raises _Ended in its thread, once at most and not after :meth:`end`."""

    def __init__(self, thread_id: int, limit_s: float, most_growth_bytes: int) -> None:
        self.reason = ""
        self._thread_id = ctypes.c_ulong(thread_id)
        self._limit_s = limit_s
        self._most_growth_bytes = most_growth_bytes
        self._lock = threading.Lock()
        self._over = False
        self._began = time.monotonic()
        self._before: int | None = None  # bytes that the process held when it was first looked at
        _watchman.add(self)

    def look(self) -> None:
        """End the template where it is beyond its bounds."""
        if time.monotonic() - self._began > self._limit_s:
            self._raise(f"has run for {self._limit_s:g} s")
            return
        held = psutil.Process().memory_info().rss
        self._before = held if self._before is None else self._before
        if (grown := held - self._before) > self._most_growth_bytes:
            self._raise(f"has taken {format_bytes(grown)} of memory")

    def _raise(self, reason: str) -> None:
        with self._lock:
            if not self._over and not self.reason:
                self.reason = reason
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, ctypes.py_object(_Ended))

    def end(self) -> None:
        """Raise nothing any more. Raises _Ended itself where that came at the last moment."""
        with self._lock:
            self._over = True
            if self.reason:  # what has not arrived yet must not arrive later
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, None)
        _watchman.remove(self)  # from here on nothing is raised, which could leave its lock held for ever


class _Watchman:
    """Looks after all templates that run, on one thread, which stays a while for the next ones: starting one for each
    takes longer than most templates run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._awake = False

    def add(self, watch: _Watch) -> None:
        """Look after it until :meth:`remove`, or until it was ended."""
        with self._lock:
            self._watches.add(watch)
            if not self._awake:
                threading.Thread(target=self._run, name="template-watch", daemon=True).start()
                self._awake = True

    def remove(self, watch: _Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        needed = time.monotonic()
        while True:
            time.sleep(_LOOK_S)
            with self._lock:
                self._watches = {watch for watch in self._watches if not watch.reason}
                watches = list(self._watches)
                needed = time.monotonic() if watches else needed
                if time.monotonic() - needed > _STAYS_S:
                    self._awake = False
                    return
            for watch in watches:
                with suppress(Exception):  # without this thread nothing would end a template any more
                    watch.look()


_watchman = _Watchman()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Without the multiplications and powers that take for ever in one step, which nothing can interrupt."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Raises SecurityError for a result that no prompt needs."""
        if _size(operator, left, right) > 1:
            raise SecurityError(f"{operator} would give more than a prompt can hold")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> float:
    """How large the result is, as a part of what it may be."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return bits / _MOST_BITS
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            return len(many) * times / _MOST_REPEATED
    return 0.0


def _install() -> None:
    """Have transformers compile templates in :class:`BoundedEnvironment`."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
