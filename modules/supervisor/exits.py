"""Why a worker ended, read from its exit status, the kernel's counters and its last words."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from modules.errors import LoadstoneError, WorkerCrashed, WorkerKilled

# Signals with which a process dies of its own fault: what they mean for a model's process, and what to change.
_FAULTS: dict[str, tuple[str, str]] = {
    "SIGSEGV": (
        "native code read memory that is not its own",
        "A library does not fit the GPU driver or another library: reinstall the pinned versions, update the driver.",
    ),
    "SIGBUS": (
        "a file that was mapped into memory could not be read",
        "The checkpoint was cut short or its drive went away while it was read: check the files and the drive.",
    ),
    "SIGABRT": ("native code gave up", "The log's last lines say which library gave up, and why."),
    "SIGILL": (
        "a package was built for another processor",
        "Install builds of torch and bitsandbytes for this processor.",
    ),
    "SIGFPE": ("native code divided by zero", "The log's last lines may say where; please report it."),
}


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory, since start; 0 where it does not tell.

    The sum of what the machine counts and what the process's own control group counts: in some containers
    only one of them can be seen. Only growth means something.
    """
    return sum(_counter(path, "oom_kill") for path in [Path("/proc/vmstat"), *_cgroup_files()])


def _cgroup_files() -> list[Path]:
    """``memory.events`` of the own group (version 2), ``memory.oom_control`` (version 1)."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            found.append(Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control")
    return found


def _counter(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def decode_exit(status: int, oom_kills_before: int, oom_kills_after: int, stderr_tail: Sequence[str]) -> LoadstoneError:
    """The error that an exit without a message means.

    ``status`` is as Popen gives it: the exit status, or minus the signal's number. The counts are
    :func:`oom_kills` from before and after the exit. The tail goes into ``details``.
    """
    details = "\n".join(stderr_tail)
    if status >= 0:
        return WorkerCrashed(f"The model's process ended by itself with exit status {status}.", details=details)
    name = _signal_name(-status)
    if name == "SIGKILL":
        return _killed(oom_kills_after > oom_kills_before, details)
    if name in _FAULTS:
        meaning, hint = _FAULTS[name]
        return WorkerCrashed(f"The model's process crashed: {meaning} ({name}).", hint, details=details)
    return WorkerKilled(
        f"The model's process was ended from outside ({name}).",
        "Somebody, or a service of this machine, ended it. Load the model again.",
        details=details,
    )


def _killed(memory_ran_out: bool, details: str) -> WorkerKilled:
    if memory_ran_out:
        return WorkerKilled(
            "The model's process was killed by the kernel's out-of-memory killer (SIGKILL): the RAM ran out.",
            "Load in 4-bit, choose a shorter context, set cpu-memory, or close other programs.",
            details=details,
        )
    return WorkerKilled(
        "The model's process was killed (SIGKILL): most likely memory ran out, or someone ended it.", details=details
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
