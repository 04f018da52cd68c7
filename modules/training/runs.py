"""A run's folder: its order, its data, its checkpoints and the best LoRA so far. What is written appears whole.

::

    <name>/order.json            the order's line
    <name>/data.jsonl            a copy of the data, so that a resumed run learns from the same
    <name>/checkpoint-30/        as transformers' Trainer writes it
    <name>/best/                 the LoRA with the smallest evaluation loss so far, and best.json
    <name>/base.json             what tells the base model's files from others, when the first step was made
    <name>/lock                  held by the process that trains
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modules.errors import Busy
from modules.protocol import decode, encode
from modules.training.messages import TrainOrder

ORDER, BEST, BEST_FILE, LOCK, STATE = "order.json", "best", "best.json", "lock", "trainer_state.json"
BASE = "base.json"
CHECKPOINT = "checkpoint-"


@contextmanager
def alone(order: TrainOrder, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the order's run, so that nobody else trains or deletes it.

    Raises Busy where another process holds it for longer than ``wait_s``, and OSError where it cannot be held.
    """
    lock = FileLock(os.path.join(order.folder, LOCK))
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise Busy(f"Another process is training {order.name}.", "Wait until it has ended.") from None
    try:
        yield
    finally:
        lock.release()


def held(order: TrainOrder) -> bool:
    """Whether a process is training as the order says. Does not wait, and makes no file."""
    if not os.path.exists(os.path.join(order.folder, LOCK)):
        return False
    try:
        with alone(order):
            return False
    except Busy:
        return True
    except OSError:  # nobody could train in such a folder
        return False


def remove(order: TrainOrder) -> None:
    """Delete the order's run, if it is there. Raises Busy where another process is training it: nothing is touched."""
    if not os.path.isdir(order.folder):
        return
    with suppress(OSError), alone(order):
        shutil.rmtree(order.folder, ignore_errors=True)
    if os.name == "nt" and not os.path.exists(os.path.join(order.folder, ORDER)):  # an open file, the lock, stays there
        shutil.rmtree(order.folder, ignore_errors=True)


def write_order(folder: Path, order: TrainOrder) -> None:
    """Make the folder a run's. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / ORDER, encode(order))


def write_base(folder: Path, files: list[Any]) -> None:
    """Note the base model's files, as JSON data. Raises OSError."""
    _write(folder / BASE, json.dumps({"files": files}).encode())


def read_base(folder: Path) -> list[Any] | None:
    """The base model's files when the training began; None where that was not noted."""
    files = read_json(folder / BASE).get("files")
    return files if isinstance(files, list) else None


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(content)
    os.replace(partial, file)


def read_order(folder: Path) -> TrainOrder | None:
    """The run's order; None where the folder is none of this version's runs."""
    try:
        order = decode((folder / ORDER).read_bytes())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return order if isinstance(order, TrainOrder) else None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints with their steps, the first one first."""
    found = []
    with suppress(OSError):
        for entry in folder.iterdir():
            step = entry.name.removeprefix(CHECKPOINT)
            if entry.name != step and step.isdigit() and (entry / STATE).is_file():
                found.append((int(step), entry))
    return sorted(found)


def total_steps(folder: Path) -> int:
    """Of the whole training, by the last checkpoint; 0 where there is none."""
    last = checkpoints(folder)[-1:]
    return int(read_json(last[0][1] / STATE).get("max_steps", 0)) if last else 0


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def put_in_place(written: Path, place: Path) -> None:
    """Move a folder that was written aside to ``place``, after its files have reached the disk. What was there goes."""
    for file in written.rglob("*"):
        if file.is_file():
            _flush(file)
    _flush(written)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        place.rename(old)
    written.rename(place)
    _flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with suppress(OSError):  # some file systems know no fsync of a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
