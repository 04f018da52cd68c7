"""The downloads, one after another in the background: each in a process of its own, that can be ended at any moment.

Pausing and cancelling end the process; resuming starts one that goes on from the bytes on disk. What is open when the
server ends, however it ends, is in the state file and goes on when the server starts again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO
from zlib import crc32

from modules.errors import InternalError, LoadstoneError, ModelNotFound
from modules.hub import placing
from modules.hub.job import Job, JobState, Order, job_from_dict
from modules.protocol import Failed, Progress, decode

log = logging.getLogger("loadstone")
_ROOT = Path(__file__).resolve().parent.parent.parent
_AT_ONCE = 2
_KEPT = 12  # ended downloads that are still listed
_WINDOW_S = 5.0  # over which the speed is measured


@dataclass
class _Running:
    """The process of one job, and what it has brought lately: (time, bytes)."""

    process: subprocess.Popen[bytes] | None = None
    samples: deque[tuple[float, int]] = field(default_factory=deque)
    error: LoadstoneError | None = None


def key_of(order: Order) -> str:
    """The same for the same files of the same commit in the same folder."""
    names = sorted(file.name for file in order.files)
    identity = json.dumps([order.repo, order.commit, order.target, order.endpoint, names, order.check_all])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


class DownloadQueue:
    """Every download of this server. May be used from any thread; nothing runs before :meth:`start`.

    Without a ``state_file`` nothing is remembered.
    """

    def __init__(self, state_file: Path | None) -> None:
        self._state_file = state_file
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, _Running] = {}
        self._started = False
        self._closed = False
        self._unsaved = False
        self._saver: threading.Thread | None = None  # while there is something to write

    # --- what there is ---

    def jobs(self) -> list[Job]:
        """Every download that is open, and those that ended lately; in the order in which they were asked for."""
        with self._lock:
            return list(self._jobs.values())

    def job(self, key: str) -> Job:
        """Raises ModelNotFound where there is none."""
        with self._lock:
            if key not in self._jobs:
                raise ModelNotFound(f"There is no download {key!r}.", "It may have been cleared away: look again.")
            return self._jobs[key]

    def shown(self) -> int:
        """A number that changes with what a page shows of the downloads.

        Without the lock: the event loop asks for it. A list is made of the jobs in one step, and none of them changes.
        """
        jobs = list(self._jobs.values())
        return crc32(repr([(j.key, j.state.value, j.done_bytes, j.stage, str(j.error)) for j in jobs]).encode())

    def wait_for(self, key: str, told: Callable[[Job], None] | None = None) -> Job:
        """The job once it is not open any more, or paused. ``told`` is given each change."""
        seen: Job | None = None
        while True:
            with self._changed:
                while (job := self.job(key)) == seen and not self._closed:
                    self._changed.wait(1.0)
                seen = job
                ended = self._closed or job.state not in (JobState.WAITING, JobState.RUNNING)
            if told:
                told(job)
            if ended:
                return job

    # --- what can be done ---

    def start(self) -> None:
        """Go on with what was open when the server ended."""
        with self._lock:
            if not self._started:
                self._started = True
                self._jobs = {**self._read_state(), **self._jobs}
                self._next()

    def add(self, order: Order, notes: tuple[str, ...] = ()) -> Job:
        """Queue a download; the one that is open already where the same is asked for twice."""
        with self._lock:
            self.start()
            order = replace(order, partial=str(Path(order.partial).with_name(key_of(order))))
            key = key_of(order)
            known = self._jobs.get(key)
            if known and known.state.is_open:
                return self.resume(key) if known.state is JobState.PAUSED else known
            self._jobs.pop(key, None)  # asked for anew, it stands last
            self._put(Job(key, order, done_bytes=placing.fetched_bytes(order), notes=notes))
            self._next()
            return self._jobs[key]

    def pause(self, key: str) -> Job:
        """End its process; the bytes stay."""
        return self._end(key, JobState.PAUSED)

    def cancel(self, key: str) -> Job:
        """End it and remove what has come."""
        return self._end(key, JobState.CANCELLED)

    def resume(self, key: str) -> Job:
        """Go on with a download that is paused or has failed."""
        with self._lock:
            job = self.job(key)
            if job.state in (JobState.PAUSED, JobState.FAILED):
                self._put(replace(job, state=JobState.WAITING, error=None, stage=""))
                self._next()
            return self._jobs[key]

    def clear(self) -> None:
        """Forget the downloads that have ended. What a failed one has brought is removed with it."""
        with self._lock:
            for key, job in list(self._jobs.items()):
                if not job.state.is_open and key not in self._running:
                    self._forget(key)
            self._save()

    def close(self) -> None:
        """End the processes. What is open goes on when the server starts again."""
        with self._changed:
            self._closed = True
            running = list(self._running.values())
            for one in running:
                _kill(one)
            self._changed.notify_all()
            saver = self._saver
        for one in running:
            if one.process:
                one.process.wait()
        if saver:
            saver.join()

    # --- under the lock ---

    def _end(self, key: str, state: JobState) -> Job:
        with self._lock:
            job = self.job(key)
            if job.state.is_open or (job.state is JobState.FAILED and state is JobState.CANCELLED):
                self._put(replace(job, state=state, stage="", speed=0.0))
                if key in self._running:
                    _kill(self._running[key])
                else:
                    self._after(key)
            return self._jobs[key]

    def _put(self, job: Job, *, save: bool = True) -> None:
        self._jobs[job.key] = job
        if save:
            self._save()
        self._changed.notify_all()

    def _next(self) -> None:
        """Start what may start: two at a time, and one for a folder."""
        if self._closed or not self._started:
            return
        busy = {self._jobs[key].order.target for key in self._running}
        for key, job in list(self._jobs.items()):
            if len(self._running) >= _AT_ONCE:
                return
            if job.state is JobState.WAITING and key not in self._running and job.order.target not in busy:
                busy.add(job.order.target)
                self._running[key] = _Running()
                self._put(replace(job, state=JobState.RUNNING, done_bytes=placing.fetched_bytes(job.order)))
                threading.Thread(target=self._run, args=(key,), name=f"download-{key}", daemon=True).start()

    def _after(self, key: str) -> None:
        """What is left to do when a job has no process any more."""
        if self._jobs[key].state in (JobState.CANCELLED, JobState.DONE):
            _remove_partial(self._jobs[key].order)
        ended = [key for key, job in self._jobs.items() if not job.state.is_open and key not in self._running]
        for old in ended[:-_KEPT]:
            self._forget(old)
        self._next()

    def _forget(self, key: str) -> None:
        job = self._jobs.pop(key)
        _remove_partial(job.order)
        self._changed.notify_all()

    # --- a thread for each running job ---

    def _run(self, key: str) -> None:
        running = self._running[key]
        order = self._jobs[key].order
        details = ""
        try:
            with tempfile.TemporaryFile() as log_file:
                status = self._follow(key, order, running, log_file)
                log_file.seek(max(0, log_file.tell() - 4000))
                details = log_file.read().decode(errors="replace")
        except OSError as error:  # no process could be started, or no file for its log
            status, running.error = 1, InternalError(f"The download's process cannot be started: {error}.")
        with self._lock:
            del self._running[key]
            job = self._jobs[key]
            if job.state is JobState.RUNNING and not self._closed:
                self._put(_ended(job, status, running.error, details))
            self._after(key)

    def _follow(self, key: str, order: Order, running: _Running, log_file: IO[bytes]) -> int:
        """Start the process and follow it to its end; its exit status."""
        with self._lock:
            if self._jobs[key].state is not JobState.RUNNING or self._closed:
                return 0
            running.process = process = _start(log_file)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(order.to_dict()).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    self._heard(key, running, decode(line))
            return process.wait()
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]

    def _heard(self, key: str, running: _Running, event: object) -> None:
        if isinstance(event, Failed):
            running.error = event.error
        if not isinstance(event, Progress):
            return
        now = time.monotonic()
        if event.stage:
            running.samples.clear()
        else:
            running.samples.append((now, event.done))
            while now - running.samples[0][0] > _WINDOW_S:
                running.samples.popleft()
        with self._lock:
            job = self._jobs[key]
            if job.state is JobState.RUNNING:
                speed = _speed(running.samples)
                self._put(replace(job, done_bytes=event.done, stage=event.stage, speed=speed), save=False)

    # --- the state file ---

    def _save(self) -> None:
        """Have the list written soon, by a thread that does not hold the lock while the disk is at it."""
        self._unsaved = self._state_file is not None
        if self._unsaved and self._saver is None:
            self._saver = threading.Thread(target=self._write_state, name="downloads-state", daemon=True)
            self._saver.start()

    def _write_state(self) -> None:
        """Write the list until there is no newer one. A file that cannot be written costs it, and no download."""
        while True:
            with self._lock:
                if not self._unsaved or self._state_file is None:
                    self._saver = None
                    return
                self._unsaved = False
                data = {"jobs": [job.kept() for job in self._jobs.values()]}
            try:
                placing.write_json(self._state_file, data)
            except OSError as error:
                log.warning("%s cannot be written: %s", self._state_file, error)

    def _read_state(self) -> dict[str, Job]:
        if self._state_file is None:
            return {}
        try:
            jobs = [job_from_dict(data) for data in json.loads(self._state_file.read_bytes())["jobs"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("The list of downloads in %s cannot be read: %s", self._state_file, error)
            return {}
        return {job.key: replace(job, done_bytes=_bytes_of(job)) for job in jobs}


def _bytes_of(job: Job) -> int:
    return job.order.size_bytes if job.state is JobState.DONE else placing.fetched_bytes(job.order)


def _ended(job: Job, status: int, error: LoadstoneError | None, details: str) -> Job:
    if status == 0 and error is None:
        return replace(job, state=JobState.DONE, done_bytes=job.order.size_bytes, stage="", speed=0.0)
    crash = InternalError(
        f"The download's process ended with status {status}.", "Resume the download; what has come is kept.",
        details=details,
    )  # fmt: skip
    return replace(job, state=JobState.FAILED, stage="", speed=0.0, error=error or crash)


def _speed(samples: deque[tuple[float, int]]) -> float:
    """Bytes a second over the last few seconds; 0 where that is not known yet."""
    if len(samples) < 2 or (seconds := samples[-1][0] - samples[0][0]) <= 0:
        return 0.0
    return max(0.0, (samples[-1][1] - samples[0][1]) / seconds)


def _start(log_file: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "modules.hub"], cwd=_ROOT, env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=log_file,
        start_new_session=sys.platform != "win32",
    )  # fmt: skip


def _kill(running: _Running) -> None:
    """End the process at once: it keeps nothing that is not on disk."""
    process = running.process
    if process is None or process.poll() is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _remove_partial(order: Order) -> None:
    """Put what has come out of the way at once; large files take the disk a while.

    The old model stands in its place again where the process was ended between the two renames.
    """
    partial = Path(order.partial)
    with contextlib.suppress(OSError):
        placing.put_back(order)
    for left in (partial, placing.replaced_by(order)):
        aside = left.with_name(f"{left.name}{placing.REMOVED}-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            left.rename(aside)
            threading.Thread(target=placing.remove_tree, args=(aside,), name="download-remove", daemon=True).start()
    with contextlib.suppress(OSError):
        partial.with_name(f"{partial.name}.lock").unlink(missing_ok=True)
