"""How well the loaded model predicts a text: measured one at a time, and a table of what came out before."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modules.errors import Busy, Cancelled, LoadstoneError, UserError, WorkerCrashed
from modules.options import changed
from modules.perplexity import PERPLEXITY, Perplexity, PerplexityOrder
from modules.protocol import Progress
from modules.service.jobs import Watched
from modules.service.loras import entries_of
from modules.supervisor import Loaded, Use
from modules.supervisor.told import Told

log = logging.getLogger(__name__)
FILE = "perplexity.json"
KEPT = 200  # results; the oldest are forgotten
MOST_BYTES = 64 * 2**20  # of a text; days of reading
_NOT_MATTERING = frozenset({"model", "lora", "ctx_size"})  # told by themselves


@dataclass(frozen=True)
class Measured:
    """One row of the table. ``options``: the loader's that differ from the defaults; ``loras``: names with weights."""

    model: str
    options: dict[str, Any]
    loras: tuple[str, ...]
    text: str  # its name
    window_tokens: int
    stride_tokens: int
    tokens: int
    perplexity: float
    stretch_tokens: int
    stretches: tuple[float | None, ...]
    seconds: float
    when: float  # in seconds since the epoch

    @property
    def alpha(self) -> float:
        return float(self.options.get("alpha_value", 1.0))


@dataclass(frozen=True)
class PerplexityState:
    """How the measurement that runs, or the last one, stands. ``text`` "": there was none."""

    version: int = 0  # grows with every change
    running: bool = False
    model: str = ""
    text: str = ""  # its name
    progress: Progress | None = None
    started: float = field(default=0.0)  # of time.monotonic()
    result: Measured | None = None
    error: LoadstoneError | None = None


class Perplexities(Watched[PerplexityState]):
    """The one owner of the measurement that runs, and of the table. May be used from any thread.

    ``need``: a hold on the model that would be measured now, see :meth:`Fleet.need`. ``cache_dir``: where the table
    is kept.
    """

    def __init__(self, need: Callable[[], Use], cache_dir: Path) -> None:
        super().__init__(PerplexityState())
        self._need = need
        self._table = _Table(cache_dir / FILE)
        self._told: Told | None = None
        self._cancelled = False

    def results(self) -> list[Measured]:
        """The table, the latest first."""
        return self._table.rows()[::-1]

    def forget(self) -> None:
        """Empty the table."""
        self._table.write([])
        with self._changed:
            self._change(self._state)

    def start(self, text: str, name: str, *, window: int = 0, stride: int = 0, most: int = 0) -> None:
        """Begin to measure the loaded model, with the LoRAs that are active, on ``text``; returns at once.

        ``window``, ``stride`` and ``most`` are tokens; see :class:`modules.perplexity.PerplexityOrder`. Raises
        NothingLoaded, Busy while another one runs, UserError for an empty text. What the worker refuses, such as a
        window beyond the context, is the state's error.
        """
        if not text.strip():
            raise UserError("There is no text to measure on.", "Choose a file, or paste a text.")
        use = self._need()
        try:
            told = self._begin(use, PerplexityOrder(text, window, stride, most, use.loaded.order.adapters), name)
        except BaseException:
            use.release()
            raise
        threading.Thread(target=self._run, args=(told, use, name), daemon=True, name="perplexity").start()

    def _begin(self, use: Use, order: PerplexityOrder, name: str) -> Told:
        with self._changed:
            if self._state.running:
                raise Busy("Another text is being measured.", "Wait for it to finish, or cancel it.")
            told = self._told = use.supervisor.tell(PERPLEXITY, order)
            self._cancelled = False
            self._state = PerplexityState(
                self._state.version + 1, True, use.name, name, Progress("starting"), time.monotonic()
            )
            self._changed.notify_all()
            return told

    def cancel(self) -> None:
        """End the measurement that runs; returns when it has. Without one: nothing."""
        with self._changed:
            if not self._state.running or self._told is None:
                return
            self._cancelled = True
            self._told.stop()
        self.wait_over()

    def _run(self, told: Told, use: Use, name: str) -> None:
        result: Measured | None = None
        error: LoadstoneError | None = None
        try:
            for message in told.messages():
                if isinstance(message, Progress):
                    with self._changed:
                        self._change(replace(self._state, progress=message))
                elif isinstance(message, Perplexity):
                    result = _measured(message, use.loaded, name)
        except LoadstoneError as problem:
            error = problem
        except Exception as problem:
            error = WorkerCrashed(f"Measuring failed: {type(problem).__name__}: {problem}")
        finally:
            use.release()
        if result is not None:
            self._table.add(result)
        elif error is None:
            words = "was cancelled" if self._cancelled else "broke off"
            error = Cancelled(f"Measuring {use.name} on {name} {words}.", "Start it again when you are ready.")
        with self._changed:
            self._told = None
            self._change(replace(self._state, running=False, progress=None, result=result, error=error))


def _measured(found: Perplexity, loaded: Loaded, name: str) -> Measured:
    order = loaded.order
    options = {key: value for key, value in changed(order.options).items() if key not in _NOT_MATTERING}
    return Measured(
        order.name, options, tuple(entries_of(order.adapters)), name, found.window_tokens, found.stride_tokens,
        found.tokens, found.perplexity, found.stretch_tokens, found.stretches, found.seconds, time.time(),
    )  # fmt: skip


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError where it cannot be read, is no text in UTF-8, or is too long."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path.name} is {size / 2**20:,.0f} MiB long.", f"Take {MOST_BYTES >> 20} MiB at most.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"{path.name} cannot be read: {reason}.", "Choose a text file.") from None


class _Table:
    """A JSON list of results, newest last, written whole or not at all; one that cannot be read counts as empty."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def rows(self) -> list[Measured]:
        try:
            return [
                Measured(**{**row, "loras": tuple(row["loras"]), "stretches": tuple(row["stretches"])})
                for row in json.loads(self._file.read_bytes())
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read and is begun anew: %s", self._file.name, error)
            return []

    def add(self, row: Measured) -> None:
        with self._lock:
            self._write([*self.rows(), row][-KEPT:])

    def write(self, rows: list[Measured]) -> None:
        with self._lock:
            self._write(rows)

    def _write(self, rows: list[Measured]) -> None:
        aside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
            os.replace(aside, self._file)
        except OSError as error:  # a full disk costs the table's row, not the result
            log.warning("the result could not be kept: %s", error)
