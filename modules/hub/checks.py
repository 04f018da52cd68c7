"""What can be known before the first byte: whether the folder can be written to, and whether the disk has room."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from modules.errors import DiskFull, UserError
from modules.units import format_bytes

_SPARE_BYTES = 64 * 2**20  # left for the system, so that a download does not take the last byte


def check_room(root: Path, needed_bytes: int) -> None:
    """Raises UserError where ``root`` cannot be written to, DiskFull where ``needed_bytes`` more do not fit."""
    folder = root / ".cache" / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{root} cannot be written to: {error.strerror}.", "Change its permissions, or start with another --home."
        ) from None
    free = free_bytes(root)
    if needed_bytes and needed_bytes + _SPARE_BYTES > free:
        raise DiskFull(f"{format_bytes(needed_bytes)} are needed in {root}, and {format_bytes(free)} are free.")


def free_bytes(root: Path) -> int:
    """The bytes that may still be written under ``root``, whether or not the folder exists yet."""
    while not root.exists() and root != root.parent:
        root = root.parent
    return shutil.disk_usage(root).free if os.path.isdir(root) else 0
