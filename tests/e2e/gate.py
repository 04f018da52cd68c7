"""A model whose load takes as long as a test wants: its own code waits for a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from modules.settings import CodeApprovals
from tests import checkpoints

GATED = "gated"
_WAITING = """
import pathlib as _pathlib, time as _time
while not _pathlib.Path({gate!r}).exists():
    _time.sleep(0.02)
"""


@dataclass(frozen=True)
class CodeFile:
    name: str
    sha256: str


@dataclass(frozen=True)
class Gate:
    """Holds the loads of the model GATED until it is opened."""

    file: Path

    def open(self) -> None:
        self.file.touch()

    def close(self) -> None:
        self.file.unlink(missing_ok=True)


def gated_model(models: Path) -> Gate:
    """Put the model GATED into the folder, its code allowed. Before the server starts."""
    gate = Gate(models.parent / "gate")
    code = checkpoints.copied(checkpoints.custom_code(), models / GATED) / "modeling_own.py"
    code.write_text(_WAITING.format(gate=str(gate.file)) + code.read_text())
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    CodeApprovals(models / ".cache" / "allowed-code.json").allow(GATED, [CodeFile(code.name, digest)])
    return gate
