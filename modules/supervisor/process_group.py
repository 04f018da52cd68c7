"""Process groups: a worker and whatever it started, signalled and waited for together.

Windows has no process groups of this kind: there only the worker itself is ended (not tested).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_POLL_S = 0.005


def popen_options() -> dict[str, Any]:
    """The arguments of Popen that put a child into a group of its own, whose number is its pid."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end (SIGTERM)."""
    if sys.platform == "win32":
        process.terminate()
    else:
        _signal(process.pid, signal.SIGTERM)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole group (SIGKILL). The leader must not have been reaped: its number may be another's then."""
    if sys.platform == "win32":
        process.kill()
    else:
        _signal(process.pid, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; all zombies (macOS)
            os.killpg(group, number)


def wait_for_leader(process: subprocess.Popen[bytes]) -> None:
    """Wait until the leader has ended, and leave it unreaped where the system can, so that its number stays taken."""
    if not hasattr(os, "waitid"):
        process.wait()
        return
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored in this process: nothing to wait for
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def wait_for_group(group: int, timeout_s: float) -> bool:
    """Wait until no process of the group lives. False: one still does after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while alive(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def alive(group: int) -> bool:
    """Whether a process of the group lives. Zombies do not: they hold no memory, and nobody may reap them soon."""
    if sys.platform == "win32":
        return False
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    if not Path("/proc/self/stat").exists():
        return True
    return any(_lives_in(stat, group) for stat in Path("/proc").glob("[0-9]*/stat"))


def _lives_in(stat: Path, group: int) -> bool:
    try:
        text = stat.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # it has just ended
    state, _parent, member_of = text.rpartition(")")[2].split()[:3]  # the name before it may hold anything
    return int(member_of) == group and state not in "ZX"
