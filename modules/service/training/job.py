"""The training that runs: its process, its state, and the model that makes room for it. One at a time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from modules.errors import Busy, Cancelled, LoadstoneError, UserError, WorkerCrashed
from modules.protocol import Failed, Progress, decode, encode
from modules.service.jobs import Watched, end, remove_leftovers, start
from modules.service.training.state import Phase, TrainState
from modules.supervisor.exits import decode_exit, oom_kills
from modules.training import runs
from modules.training.messages import (
    TrainCommand,
    Trained,
    TrainEvaluation,
    TrainOrder,
    TrainPaused,
    TrainStarted,
    TrainStep,
)

COMMAND = (sys.executable, "-m", "modules.worker.train")
_LOG_BYTES = 8000

Outcome = Trained | TrainPaused


@dataclass(frozen=True)
class Room:
    """How the model that answers makes room for a training, and comes back afterwards."""

    name: str = ""  # the model that is unloaded; "": none
    empty: Callable[[], None] = lambda: None
    bring_back: Callable[[], None] = lambda: None


class TrainJob(Watched[TrainState]):
    """The one owner of the training that runs. May be used from any thread."""

    def __init__(self, on_over: Callable[[TrainState], None]) -> None:
        super().__init__(TrainState())
        self._on_over = on_over  # gets the last state of each training
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: Literal["", "pause", "keep", "cancel"] = ""
        self._new = False  # the run's folder was made for the training that runs
        self._closed = False

    def start(self, order: TrainOrder, room: Room, prepare: Callable[[], None] | None = None) -> None:
        """Begin, in the folder that ``prepare`` makes, or go on in the one that is there. Raises Busy while one runs.

        Raises what ``prepare`` raises: then nothing was begun. A folder that it made goes with a training that could
        not be; one that was there stays.
        """
        with self._changed:
            if self._closed:
                raise Cancelled("Loadstone is shutting down.")
            if self._state.running:
                raise Busy(f"{self._state.name} is being trained.", "Wait for it to finish, pause it, or cancel it.")
            if prepare is not None:
                prepare()
            self._new, self._asked = prepare is not None, ""
            self._state = TrainState(
                self._state.version + 1, Phase.STARTING, order, Progress("starting"), ends_first=room.name,
                notes=order.notes,
            )  # fmt: skip
            self._changed.notify_all()
        threading.Thread(target=self._run, args=(order, room), daemon=True, name="train").start()

    def ask(self, action: Literal["pause", "keep"]) -> None:
        """Tell the process to pause, or to end and keep what it has; returns at once. Without one: nothing."""
        with self._changed:
            if not self._state.running or self._asked:
                return
            self._asked = action
            stage = "writing a checkpoint" if action == "pause" else "finishing"
            self._change(replace(self._state, phase=Phase.ENDING, progress=Progress(stage)))
            self._tell()

    def _tell(self) -> None:
        """Hand on what was asked for, with the lock held; later, where there is no process yet."""
        if self._process is None or self._process.stdin is None or self._asked not in ("pause", "keep"):
            return
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self._process.stdin.write(encode(TrainCommand(self._asked)))
            self._process.stdin.flush()

    def cancel(self) -> None:
        """End the training and delete its run; returns when its process is gone. Without one: nothing."""
        with self._changed:
            if not self._state.running:
                return
            self._asked = "cancel"
            process = self._process
        if process is not None:
            end(process)
        self.wait_over()

    def close(self) -> None:
        """End the process where one runs; the run can go on with the next start. Nothing can begin afterwards."""
        with self._changed:
            self._closed = True
            process = self._process
        if process is not None:
            end(process)

    # --- the thread of one training ---

    def _run(self, order: TrainOrder, room: Room) -> None:
        outcome: Outcome | None = None
        error: LoadstoneError | None = None
        try:
            if room.name:
                self._stage(f"unloading {room.name}")
                room.empty()
            outcome = self._train(order)
        except LoadstoneError as problem:
            error = problem
        except Exception as problem:
            error = WorkerCrashed(f"Training failed: {type(problem).__name__}: {problem}")
        if room.name and not self._closed:
            with contextlib.suppress(LoadstoneError):  # another load is under way: the user's choice stands
                room.bring_back()
        with self._changed:
            self._process = None
            self._on_over(self._state)
            self._finish(order, outcome, error)

    def _stage(self, stage: str) -> None:
        with self._changed:
            self._change(replace(self._state, progress=Progress(stage)))

    def _finish(self, order: TrainOrder, outcome: Outcome | None, error: LoadstoneError | None) -> None:
        """Write the outcome down, and remove what is of no more use, with the lock held."""
        phase = Phase.FAILED
        if isinstance(outcome, Trained):
            phase, error = Phase.DONE, None
        elif isinstance(outcome, TrainPaused):
            phase, error = Phase.PAUSED, None
        elif self._asked == "cancel":
            phase = Phase.CANCELLED
            error = Cancelled(f"The training of {order.name} was cancelled.", "Nothing was kept.")
        if phase in (Phase.DONE, Phase.CANCELLED) or self._useless(order, error):
            with contextlib.suppress(Busy):  # another process is at it, which came first
                runs.remove(order)
        trained = outcome if isinstance(outcome, Trained) else None
        self._change(replace(self._state, phase=phase, progress=None, trained=trained, error=error))

    def _useless(self, order: TrainOrder, error: LoadstoneError | None) -> bool:
        """Whether the run's folder was made for a training that could not begin."""
        refused = isinstance(error, UserError) and not isinstance(error, Busy)
        return self._new and refused and not runs.checkpoints(Path(order.folder))

    def _train(self, order: TrainOrder) -> Outcome:
        """Follow one process to its end. Raises what it reports, and what its end without a word means."""
        kills = oom_kills()
        with tempfile.TemporaryFile() as log, start(COMMAND, log) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if self._hand_over(process, order) and (outcome := self._follow(process.stdout)) is not None:
                    return outcome
            finally:
                with contextlib.suppress(OSError):  # it is gone, with the order unread
                    process.stdin.close()
                end(process)
                if not runs.held(order):
                    remove_leftovers(Path(order.out))
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _LOG_BYTES))
            tail = log.read().decode(errors="replace").splitlines()
            raise decode_exit(process.returncode, kills, oom_kills(), tail)

    def _hand_over(self, process: subprocess.Popen[bytes], order: TrainOrder) -> bool:
        """Give the order to the process; False where it was cancelled before."""
        with self._changed:
            self._process = process
            if self._asked == "cancel" or self._closed:
                return False
            with contextlib.suppress(BrokenPipeError):  # it ended at once: its log tells why
                assert process.stdin is not None
                process.stdin.write(encode(order))
                process.stdin.flush()
            self._tell()
        return True

    def _follow(self, lines: IO[bytes]) -> Outcome | None:
        for line in lines:
            event = decode(line)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Trained | TrainPaused):
                return event
            with self._changed:
                self._change(_after(self._state, event))
        return None


def _after(state: TrainState, event: Any) -> TrainState:
    """The state after one line of the process."""
    if isinstance(event, TrainStarted):
        phase = Phase.ENDING if state.phase is Phase.ENDING else Phase.TRAINING
        return replace(state, phase=phase, started=event, progress=None, notes=(*state.notes, *event.notes))
    if isinstance(event, TrainStep):
        return state.with_step(event)
    if isinstance(event, TrainEvaluation):
        return replace(state, evaluations=(*state.evaluations, event))
    if isinstance(event, Progress):
        return replace(state, progress=event)
    return state
