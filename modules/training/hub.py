"""A data set on the Hub as JSON lines. The package ``datasets``, an extra, reads it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from modules import packages
from modules.errors import BrokenData, HubUnreachable, MissingPackage

FEATURE = "hub-datasets"
MOST_ROWS = 100_000
_LIMIT_S = 1800.0
_ROOT = Path(__file__).resolve().parent.parent.parent


def parts(text: str) -> tuple[str, str, str]:
    """Name, configuration and split of ``USER/NAME``, ``USER/NAME/CONFIG:SPLIT``. Raises BrokenData."""
    name, _, split = text.partition(":")
    words = name.strip("/").split("/")
    if not 1 <= len(words) <= 3 or not all(words) or any(word.startswith(".") for word in words):
        raise BrokenData(f"{text!r} names no data set.", "Write USER/NAME, USER/NAME:SPLIT or USER/NAME/CONFIG:SPLIT.")
    return "/".join(words[:2]), words[2] if len(words) == 3 else "", split or "train"


def fetch(text: str, file: Path) -> None:
    """Write the rows to ``file``. Raises BrokenData, MissingPackage, and HubUnreachable with what the library said."""
    name, config, split = parts(text)
    if missing := packages.missing(FEATURE):
        raise MissingPackage(
            f"A data set on the Hub needs {', '.join(missing)}.", f"Run: {packages.install_line(*missing)}"
        )
    command = [sys.executable, "-m", "modules.training.hub", name, config, split, str(file)]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise HubUnreachable(f"{text} has not come within {_LIMIT_S / 60:g} minutes.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise HubUnreachable(f"{text} could not be read: {last}", details=done.stderr[-4000:])


def main(name: str, config: str, split: str, file: str) -> None:
    """Runs in the process of its own."""
    from datasets import load_dataset

    os.chdir(Path(file).parent)  # a folder of this machine is not to be taken for a data set of that name
    rows = load_dataset(name, config or None, split=split, streaming=True)
    with open(file, "w", encoding="utf-8") as out:
        for number, row in enumerate(rows):
            if number >= MOST_ROWS:
                break
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
