"""What a process that speaks the protocol owes to its surroundings: its pipes, its end, its environment."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil

from modules import collector
from modules.protocol import HEAP_LIMIT_BYTES, decode, encode

T = TypeVar("T")

# Defaults only: what the supervisor, or the user, has set is kept.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # a load reads local files; the web process alone talks to the Hub
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asks the driver's library, so that waiting warm takes no GPU memory
}
OOM_SCORE = 500  # of 1000: before any process of the user's that has not asked for the same


@cache
def import_packages() -> None:
    """Import the ML packages, and no more: no GPU is touched."""
    with collector.spared():
        # transformers resolves its names when they are asked for: without them it would import nothing.
        import peft  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        import modules.worker.adapters
        import modules.worker.transformers_loader  # noqa: F401

        get_checkpoint_conversion_mapping("llama")  # makes its table of all models, which the first load waits for


def set_environment() -> None:
    """Set the defaults that the ML packages read when they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Whatever the user has set: in another order than the machine lists its GPUs in, a plan would be for others.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


def claim_stdout() -> Callable[[Any], None]:
    """Take stdout for the protocol and return the function that writes one message to it.

    What libraries print goes to stderr from now on, from Python and from C alike. A message that nobody
    can read any more means that the web process is gone: the process ends.
    """
    sys.stdout.flush()
    fd = os.dup(1)  # not inherited by children
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(message: Any) -> None:
        line = encode(message)
        try:
            with lock:
                while line:
                    line = line[os.write(fd, line) :]
        except BrokenPipeError:
            end_group()

    return emit


def claim_stdin() -> int:
    """Take stdin for the protocol: the file descriptor to read. Libraries and their children see an empty one."""
    fd = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return fd


def read_line(fd: int) -> bytes:
    """The next line of ``fd`` without its newline; shorter where the pipe ends. Never reads beyond the line."""
    return b"".join(iter(lambda: _byte_of_line(fd), b""))


def read_order(fd: int, kind: type[T]) -> T | None:
    """The order in the next line; None, with a word on stderr, where there is none: a person has started this."""
    try:
        order = decode(read_line(fd))
        if isinstance(order, kind):
            return order
        problem = f"this is no {kind.__name__}"
    except (ValueError, TypeError, KeyError) as error:
        problem = str(error)
    print(f"The web process starts this, and says what to do: {problem}", file=sys.stderr)
    return None


def _byte_of_line(fd: int) -> bytes:
    byte = os.read(fd, 1)
    return b"" if byte == b"\n" else byte


def end_with(fd: int) -> None:
    """End the whole process group as soon as ``fd`` is at its end, whatever this process is doing."""
    threading.Thread(target=_watch, args=(fd,), name="stdin", daemon=True).start()


def _watch(fd: int) -> None:
    with suppress(OSError):
        for _ in _chunks(fd):
            pass
    end_group()


def _chunks(fd: int) -> Iterator[bytes]:
    while chunk := os.read(fd, 4096):
        yield chunk


def end_group() -> None:
    """End this process at once, and its children where it leads their group."""
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def offer_to_oom_killer() -> None:
    """Let Linux take this process first where memory runs out, and not the web process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def take_signals() -> None:
    """Ctrl-C in the terminal is the web process's to answer; a termination is obeyed at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def memory_of_this_process() -> tuple[int, int]:
    """The resident memory and its peak, in bytes."""
    if sys.platform == "win32":
        held = psutil.Process().memory_info()
        return held.rss, held.peak_wset
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        import resource  # which Windows has not

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    # Not ru_maxrss: it begins with what the parent held when it started this process.
    return _kib(lines["VmRSS"]), _kib(lines["VmHWM"])


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's, in malloc.h


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Inside, freed tensors of 1 MiB and more go back to the system at once; on Linux with glibc.

    By itself glibc soon keeps what is freed up to 32 MiB a piece. Quantizing frees as much as the model holds, and
    reading a long prompt several times as much: it then took up to twice the memory, and a different amount each
    time. Afterwards things are as they would have
    become by themselves: an answer allocates the same sizes for every token, and giving them back costs a tenth of
    its speed.
    """
    try:
        libc = ctypes.CDLL(None)
        set_limit, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; on Windows none is found without a name
        yield
        return
    set_limit(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        set_limit(_MMAP_THRESHOLD, HEAP_LIMIT_BYTES)
        set_limit(_TRIM_THRESHOLD, 2 * HEAP_LIMIT_BYTES)
        trim(0)
