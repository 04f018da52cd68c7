"""What jobs have in common that run beside the page, one at a time of each kind: a state to wait for, an end."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Protocol, TypeVar

from modules.supervisor import process_group
from modules.supervisor.child import ROOT, environment

_END_S = 10.0  # for a process to clean up before it is killed


class JobState(Protocol):
    """A frozen dataclass that says how a job stands. ``version`` grows with every change."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def version(self) -> int: ...
    @property
    def running(self) -> bool: ...


S = TypeVar("S", bound=JobState)


class Watched(Generic[S]):
    """The one owner of a job's state, which may be read and waited for from any thread."""

    def __init__(self, state: S) -> None:
        self._changed = threading.Condition()
        self._state = state

    def state(self) -> S:
        with self._changed:
            return self._state

    def wait(self, version: int, timeout_s: float) -> S:
        """The state as soon as it is newer than ``version``, or as it stands after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.version > version, timeout_s)
            return self._state

    def wait_over(self, timeout_s: float | None = None) -> S:
        """The state as soon as the job does not run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._state.running, timeout_s)
            return self._state

    def _change(self, state: S) -> None:
        """Write down ``state`` as the next one, with the lock held."""
        self._state = replace(state, version=self._state.version + 1)
        self._changed.notify_all()


def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process for one job, its order to be written to stdin and what it tells to be read from stdout.

    Like a worker it is offline and has no token of the Hub: it may run a model's own code.
    """
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        **process_group.popen_options(),
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, and kill it if it does not; nothing where it has ended."""
    if process.poll() is not None:
        return
    process_group.terminate(process)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process_group.kill(process)
        process.wait()


def remove_leftovers(out: Path) -> None:
    """What a killed process that was writing the folder ``out`` could not remove itself."""
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
