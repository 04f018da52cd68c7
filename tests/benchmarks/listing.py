"""How long it takes to list a thousand model folders: the first time, again, and after one more was added."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from modules.library import Library
from tests.benchmarks.common import Row, ratio_row

FOLDERS = 1000
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")
_YESTERDAY_S = 86_400


def make_models(root: Path, count: int) -> None:
    """``count`` folders, some of them under organisations, downloaded some time ago."""
    for number in range(count):
        name = f"org-{number % 30}/model-{number}" if number % 3 == 0 else f"model-{number}"
        make_model(root / name, sharded=number % 2 == 0)
    _age(root)


def make_model(folder: Path, *, sharded: bool) -> None:
    """A folder with the files of a model, in one weight file or in shards with an index; each a byte long."""
    shards = [f"model-{shard:05}-of-00004.safetensors" for shard in range(1, 5)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in (*_FILES, *(shards if sharded else ["model.safetensors"])):
        (folder / name).write_bytes(b"x")
    if sharded:
        weight_map = {f"model.layers.{layer}.weight": shards[layer % 4] for layer in range(200)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _age(root: Path) -> None:
    """As folders are that were downloaded some time ago."""
    then = time.time() - _YESTERDAY_S
    for place, _, _ in os.walk(root):
        os.utime(place, (then, then))


def bare_listing(root: Path) -> int:
    """What a script without a cache does: every folder with a config.json and weights beside it."""
    return sum(any(config.parent.glob("*.safetensors")) for config in root.rglob("config.json"))


def _seconds_of(library: Library, expected: int) -> float:
    start = time.perf_counter()
    found = len(library.models())
    seconds = time.perf_counter() - start
    assert found == expected, f"{found} models listed of {expected}"
    return seconds


def rows(runs: int = 5) -> list[Row]:
    first, again, added, bare = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root, FOLDERS)
        for run in range(runs):
            start = time.perf_counter()
            assert bare_listing(root) == FOLDERS + run
            bare.append(time.perf_counter() - start)
            library = Library([root])
            first.append(_seconds_of(library, FOLDERS + run))
            again.append(_seconds_of(library, FOLDERS + run))
            make_model(root / f"added-{run}", sharded=False)
            added.append(_seconds_of(library, FOLDERS + run + 1))
            _age(root)
    return [
        ratio_row(f"list {FOLDERS:,} model folders, {name}, against globbing", median(times), median(bare), "s", goal)
        for name, times, goal in (
            ("the first time", first, "≤ 0.3 s"),
            ("again", again, "≤ 0.05 s"),
            ("after one was added", added, "≤ 0.05 s"),
        )
    ]


def main() -> None:
    for row in rows():
        print(f"{row.what}: {row.ours} (bare {row.bare}, {row.ratio}; aim {row.goal})")


if __name__ == "__main__":
    main()
