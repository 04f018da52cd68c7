"""The file of what loads took against what was planned: a JSON list, newest last, written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock

from modules.planner.learning import Measurement

log = logging.getLogger(__name__)
KEPT = 200  # measurements; the oldest are forgotten
_LOCK_S = 10.0  # another process holds the file for some milliseconds
_LIMIT = 2**63  # of bytes and tokens
_TEXTS, _SIZES = ("model", "kind", "machine"), ("planned_bytes", "corrected_bytes", "measured_bytes")

Known: TypeAlias = tuple[Measurement, ...]


class Measurements:
    """See the module. May be used from any thread, and by several processes at once; a file that cannot be read counts
    as empty, and is replaced."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._adding = threading.Lock()
        self._read: tuple[object, Known] | None = None  # of the file as it was at the stamp
        self._unwritten: Known = ()

    def all(self) -> list[Measurement]:
        """Every measurement, oldest first."""
        unwritten, stamp, read = self._unwritten, _stamp(self._file), self._read  # in this order: a write takes it over
        if read is None or read[0] != stamp:
            self._read = read = (stamp, _known(self._file))
        return list(_with(read[1], unwritten))

    def add(self, new: Measurement) -> None:
        """Keep ``new`` in the place of an earlier one of the same model, kind and machine."""
        with self._adding:
            self._unwritten = _with(self._unwritten, [new])
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(self._file.with_name(f"{self._file.name}.lock"), timeout=_LOCK_S):
                    _write(self._file, _with(_known(self._file), self._unwritten))
            except OSError as error:  # a full disk costs what was learned, not the answer
                log.warning("what the load took could not be kept: %s", error)
            else:
                self._unwritten = ()


def _with(known: Known, more: Iterable[Measurement]) -> Known:
    for new in more:
        same = (new.model, new.kind, new.machine)
        known = (*(one for one in known if (one.model, one.kind, one.machine) != same), new)
    return known[-KEPT:]


def _stamp(file: Path) -> object:
    """What changes when the file is replaced; None where there is none."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _known(file: Path) -> Known:
    """The measurements in ``file``, without items that are none."""
    try:
        items = json.loads(file.read_bytes())
        if not isinstance(items, list):
            raise ValueError("it holds no list")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read and is begun anew: %s", file.name, error)
        return ()
    sound = tuple(Measurement(**item) for item in items if _is_sound(item))
    if len(sound) < len(items):
        log.warning("%s holds %d items that are no measurements: they are left out", file.name, len(items) - len(sound))
    return sound


def _is_sound(item: Any) -> bool:
    """Whether ``item`` has the fields of a measurement, with values that can be counted with."""
    if not isinstance(item, dict) or set(item) != {field.name for field in fields(Measurement)}:
        return False
    whole = all(type(item[name]) is int and item[name] < _LIMIT for name in (*_SIZES, "used_tokens"))
    return (
        whole
        and all(isinstance(item[name], str) for name in _TEXTS)
        and all(item[name] > 0 for name in _SIZES)
        and item["used_tokens"] >= 0
        and type(item["time"]) in (int, float)
        and math.isfinite(item["time"])
    )


def _write(file: Path, measurements: Known) -> None:
    """Raises OSError."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    aside.write_text(json.dumps([asdict(one) for one in measurements], indent=1), encoding="utf-8")
    os.replace(aside, file)
