"""A run's folder: its order, its data, its checkpoints and the best LoRA so far. What is written appears whole.

::

    <name>/order.json            the order's line
    <name>/data.jsonl            a copy of the data, so that a resumed run learns from the same
    <name>/checkpoint-30/        as transformers' Trainer writes it
    <name>/best/                 the LoRA with the smallest evaluation loss so far, and best.json
    <name>/lock                  held by the process that trains
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from modules.protocol import decode, encode
from modules.training.messages import TrainOrder

ORDER, BEST, BEST_FILE, LOCK, STATE = "order.json", "best", "best.json", "lock", "trainer_state.json"
CHECKPOINT = "checkpoint-"


def write_order(folder: Path, order: TrainOrder) -> None:
    """Make the folder a run's. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ORDER}"
    partial.write_bytes(encode(order))
    os.replace(partial, folder / ORDER)


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
