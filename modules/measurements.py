"""The file of what loads took against what was planned: a JSON list, newest last, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict
from pathlib import Path

from modules.planner.learning import Measurement

log = logging.getLogger(__name__)
KEPT = 200  # measurements; the oldest are forgotten


class Measurements:
    """See the module. May be used from any thread; a file that cannot be read counts as empty, and is replaced."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._known: list[Measurement] | None = None

    def all(self) -> list[Measurement]:
        """Every measurement, oldest first."""
        with self._lock:
            return list(self._read())

    def add(self, new: Measurement) -> None:
        """Keep ``new`` in the place of an earlier one of the same model, kind and machine."""
        with self._lock:
            same = (new.model, new.kind, new.machine)
            others = [one for one in self._read() if (one.model, one.kind, one.machine) != same]
            self._known = [*others, new][-KEPT:]
            self._write(self._known)

    def _read(self) -> list[Measurement]:
        if self._known is None:
            try:
                self._known = [Measurement(**item) for item in json.loads(self._file.read_bytes())]
            except FileNotFoundError:
                self._known = []
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read and is begun anew: %s", self._file.name, error)
                self._known = []
        return self._known

    def _write(self, measurements: list[Measurement]) -> None:
        aside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps([asdict(one) for one in measurements], indent=1), encoding="utf-8")
            os.replace(aside, self._file)
        except OSError as error:  # a full disk costs what was learned, not the answer
            log.warning("what the load took could not be kept: %s", error)
