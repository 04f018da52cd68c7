"""Writing a model with LoRAs merged in: one at a time, in a process of its own that can be ended at any moment."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from modules.errors import Busy, Cancelled, LoadstoneError, WorkerCrashed
from modules.protocol import Failed, Merged, MergeOrder, Progress, decode, encode
from modules.service.jobs import Watched, end, remove_leftovers, start

COMMAND = (sys.executable, "-m", "modules.worker.merge")


@dataclass(frozen=True)
class MergeState:
    """How the merge that runs, or the last one, stands. ``order`` None: there was none."""

    version: int = 0  # grows with every change
    order: MergeOrder | None = None
    running: bool = False
    progress: Progress | None = None
    merged: Merged | None = None
    error: LoadstoneError | None = None


class Merger(Watched[MergeState]):
    """The one owner of the merge that runs. May be used from any thread."""

    def __init__(self) -> None:
        super().__init__(MergeState())
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    def start(self, order: MergeOrder) -> None:
        """Begin; returns at once. Raises Busy while another one runs."""
        with self._changed:
            if self._state.running:
                raise Busy("Another model is being merged.", "Wait for it to finish, or cancel it.")
            self._cancelled = False
            self._state = MergeState(self._state.version + 1, order, running=True, progress=Progress("starting"))
            self._changed.notify_all()
        threading.Thread(target=self._run, args=(order,), daemon=True, name="merge").start()

    def cancel(self) -> None:
        """End the merge that runs; returns when its process is gone and nothing half is left. Without one: nothing."""
        with self._changed:
            if not self._state.running:
                return
            self._cancelled = True
            process = self._process
        if process is not None:
            end(process)
        self.wait_over()

    def _run(self, order: MergeOrder) -> None:
        merged: Merged | None = None
        error: LoadstoneError | None = None
        try:
            merged = self._merge(order)
        except LoadstoneError as problem:
            error = problem
        except Exception as problem:
            error = WorkerCrashed(f"Merging failed: {type(problem).__name__}: {problem}")
        with self._changed:
            if self._cancelled and merged is None:
                error = Cancelled(f"Merging into {Path(order.out).name} was cancelled.", "Nothing was kept.")
            self._process = None
            self._change(replace(self._state, running=False, progress=None, merged=merged, error=error))

    def _merge(self, order: MergeOrder) -> Merged:
        """Follow one process to its end. Raises what it reports, and WorkerCrashed where it ends without a word."""
        with tempfile.TemporaryFile() as log, start(COMMAND, log) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with self._changed:
                    self._process = process
                    cancelled = self._cancelled
                if not cancelled:
                    with contextlib.suppress(BrokenPipeError):  # it ended at once: its log tells why
                        process.stdin.write(encode(order))
                        process.stdin.flush()
                    if (merged := self._follow(process.stdout)) is not None:
                        return merged
            finally:
                with contextlib.suppress(OSError):  # it is gone, with the order unread
                    process.stdin.close()
                end(process)
                remove_leftovers(Path(order.out))
            log.seek(0)
            raise WorkerCrashed(
                f"The process that merges ended with status {process.returncode}.",
                details=log.read()[-4000:].decode(errors="replace"),
            )

    def _follow(self, lines: IO[bytes]) -> Merged | None:
        for line in lines:
            event = decode(line)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Merged):
                return event
            if isinstance(event, Progress):
                with self._changed:
                    self._change(replace(self._state, progress=event))
        return None
