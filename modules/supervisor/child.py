"""One worker process: started, listened to, commanded, and ended together with whatever it started."""

from __future__ import annotations

import os
import secrets
import site
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import modules
from modules.errors import Cancelled, LoadstoneError, WorkerCrashed, WorkerTimeout, error_from_dict
from modules.protocol import Event, Failed, Hello, Listening, Progress, Ready, Warm, decode, encode
from modules.supervisor import client, process_group
from modules.supervisor.exits import decode_exit, oom_kills
from modules.supervisor.log_tail import LogTail

if TYPE_CHECKING:
    from http.client import HTTPConnection

ROOT = Path(modules.__file__).resolve().parent.parent
GRACE_S = 0.5  # between asking a group to end and ending it
_GROUP_END_S = 10.0  # a process with much GPU memory takes the driver a while
_LAST_WORDS_S = 0.5  # a grandchild that left the group may hold the pipes open for ever
_LONGEST_LINE = 1 << 20  # bytes; what is longer is no message
_MOST_KEPT = 16  # connections
_NOTICE_EXIT_S = 2.0  # between a broken connection and the exit that broke it
_EVENTS = (Listening, Warm, Progress, Ready, Failed)

_SET = {
    "HF_HUB_OFFLINE": "1",  # the web process downloads; a load never waits for a network
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # nor is a token read that is stored on disk
    "TOKENIZERS_PARALLELISM": "false",  # it warns, and can hang, after a fork
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a worker that only waits takes no GPU memory for a CUDA context
}
_REMOVED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def environment() -> dict[str, str]:
    """The environment of a worker: the own one, offline and without the Hub's token."""
    own = {name: value for name, value in os.environ.items() if name not in _REMOVED}
    path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH", "")]))
    return {**own, **_SET, "PYTHONPATH": path}


def packages_changed_since(moment: float) -> bool:
    """Whether a package was installed or removed since then, in seconds since the epoch: its folder tells."""
    for folder in site.getsitepackages():
        try:
            if os.stat(folder).st_mtime > moment:
                return True
        except OSError:
            continue  # Python names folders that need not be there
    return False


class Child:
    """A worker from its start to its end. ``on_event`` and ``on_exit`` are called on threads of its own.

    ``on_event`` gets None where only the log has grown. ``on_exit`` is called once, after :attr:`gone` is set.
    Raises OSError where the command cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_event: Callable[[Child, Event | None], None],
        on_exit: Callable[[Child], None],
        *,
        imports: bool,
    ) -> None:
        self.log = LogTail()
        self.gone = threading.Event()  # no process of the group lives any more
        self.ended_on_purpose = False
        self.port: int | None = None
        self.warm = False
        self.outcome: Ready | Failed | None = None
        self._on_event, self._on_exit = on_event, on_exit
        self.started = time.time()
        self._kept: list[HTTPConnection] = []  # open, and idle
        self._secret = secrets.token_urlsafe(32)
        self._signals = threading.Lock()  # none may be sent after the number was given back
        self._reaped = False
        self._oom_kills_before = self._oom_kills_after = oom_kills()
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            close_fds=True, cwd=ROOT, env=environment(), **process_group.popen_options(),
        )  # fmt: skip
        self._start_threads(imports)

    def _start_threads(self, imports: bool) -> None:
        readers = [
            threading.Thread(target=read, args=(pipe,), daemon=True, name=f"worker {self.pid} {name}")
            for name, read, pipe in (
                ("stdout", self._read_events, self._process.stdout),
                ("stderr", self._read_log, self._process.stderr),
            )
        ]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._watch, args=(readers,), daemon=True, name=f"worker {self.pid} exit").start()
        try:
            self._stdin.write(encode(Hello(self._secret, imports)))
            self._stdin.flush()  # and stays open: its end tells the worker that this process is gone
        except OSError:
            pass  # it has ended already; its exit tells why

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise AssertionError("the child was started with a pipe")
        return self._process.stdin

    # --- what it says ---

    def _read_events(self, pipe: IO[bytes]) -> None:
        while line := pipe.readline(_LONGEST_LINE):
            try:
                event = decode(line)
            except (ValueError, TypeError, KeyError, AttributeError):
                event = None
            if isinstance(event, _EVENTS):
                self._take(event)
            else:  # a library that printed: not ours, but worth reading
                self.log.add(line.decode("utf-8", "replace").rstrip())
            self._on_event(self, event if isinstance(event, _EVENTS) else None)

    def _take(self, event: Event) -> None:
        if isinstance(event, Listening):
            self.port = event.port
        elif isinstance(event, Warm):
            self.warm = True
        elif isinstance(event, Ready | Failed):
            self.outcome = event

    def _read_log(self, pipe: IO[bytes]) -> None:
        while data := os.read(pipe.fileno(), 1 << 16):
            self.log.feed(data)
            self._on_event(self, None)

    # --- its end ---

    def _watch(self, readers: list[threading.Thread]) -> None:
        process_group.wait_for_leader(self._process)
        process_group.kill(self._process)  # what it started ends with it
        if not process_group.wait_for_group(self.pid, _GROUP_END_S):
            self.log.add(f"A process of the group {self.pid} does not end.")
        self._oom_kills_after = oom_kills()
        with self._signals:
            self._process.wait()
            self._reaped = True
        deadline = time.monotonic() + _LAST_WORDS_S
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        self._close_pipes(readers)
        self.gone.set()
        while (connection := self._taken()) is not None:
            connection.close()
        self._on_exit(self)

    def _close_pipes(self, readers: list[threading.Thread]) -> None:
        pipes = [self._process.stdout, self._process.stderr]
        ended = [pipe for pipe, reader in zip(pipes, readers, strict=True) if not reader.is_alive()]
        for pipe in [self._process.stdin, *ended]:
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # a Hello that could not be written any more

    def end(self) -> None:
        """End the whole group; returns when no process of it lives. May be called again, and by several threads.

        Raises WorkerTimeout where the kernel does not end one, as with a driver that hangs.
        """
        if self.gone.is_set():
            return
        self.ask_to_end()
        if self.gone.wait(GRACE_S):
            return
        self._signal(process_group.kill)
        if not self.gone.wait(_GROUP_END_S + 2 * _LAST_WORDS_S):
            raise WorkerTimeout(
                f"The model's process {self.pid} does not end, even by SIGKILL: it may still hold memory.",
                "A driver that hangs can be the cause; restarting the machine frees the memory.",
            )

    def ask_to_end(self) -> None:
        """SIGTERM to the group, without waiting."""
        self.ended_on_purpose = self.ended_on_purpose or not self.gone.is_set()
        self._signal(process_group.terminate)

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        with self._signals:
            if not self._reaped:
                send(self._process)

    def death(self) -> LoadstoneError:
        """Why it is gone, in a new exception: what it said itself, or what its exit status means."""
        if self.ended_on_purpose:
            return Cancelled("The model was unloaded while it was in use.")
        if isinstance(self.outcome, Failed):
            return error_from_dict(self.outcome.error.to_dict())
        status = self._process.returncode
        return decode_exit(status, self._oom_kills_before, self._oom_kills_after, self.log.lines())

    # --- commands ---

    def connect(self, timeout_s: float | None) -> HTTPConnection:
        """A connection for one command: one that was kept, or a new one; see :func:`client.connect`."""
        if self.port is None:
            raise ConnectionRefusedError(f"the worker {self.pid} does not listen yet")
        while (kept := self._taken()) is not None:
            if (opened := kept.sock) is not None:  # else it was closed with the worker
                opened.settimeout(timeout_s)
                return kept
        try:
            return client.connect(self.port, timeout_s)
        except OSError:
            self._count_kills()
            raise

    def _taken(self) -> HTTPConnection | None:
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def keep(self, connection: HTTPConnection) -> None:
        """Keep one that has answered, for the next command; few, and none that the worker has closed."""
        if connection.sock is not None and len(self._kept) < _MOST_KEPT and not self.gone.is_set():
            self._kept.append(connection)
        else:
            connection.close()

    def _count_kills(self) -> None:
        """As late as can be: a process that the kernel killed elsewhere, hours ago, says nothing about this one.

        And not before a command is sent, which would have to wait for it.
        """
        self._oom_kills_before = oom_kills()

    def send(self, connection: HTTPConnection, method: str, path: str, message: Any = None) -> None:
        client.send(connection, self._secret, method, path, message)
        self._count_kills()

    def call(self, method: str, path: str, message: Any = None, *, timeout_s: float) -> bytes:
        """The body of the answer to one command. Raises what it was refused with, and :meth:`broken`."""
        from http.client import HTTPException

        connection, body = None, None
        try:
            connection = self.connect(timeout_s)
            self.send(connection, method, path, message)
            body = client.accepted(connection.getresponse()).read()
        except (OSError, HTTPException) as error:
            raise self.broken(error) from error
        finally:
            if connection is not None and body is None:
                connection.close()
        self.keep(connection)
        return body

    def broken(self, error: Exception) -> LoadstoneError:
        """What a connection that broke means: its end on purpose, its death, or that it does not answer."""
        if isinstance(error, TimeoutError):
            return WorkerTimeout(f"The model's process {self.pid} does not answer.")
        if self.gone.wait(_NOTICE_EXIT_S) or self.ended_on_purpose:
            return self.death()
        return WorkerCrashed(
            f"The model's process {self.pid} broke the connection: {error}.",
            "Unload the model and load it again.",
            details="\n".join(self.log.lines()),
        )
