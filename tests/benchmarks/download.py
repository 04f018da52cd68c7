"""How fast a download is against a bare snapshot_download of the same files, from a Hub on this machine.

The Hub runs in a process of its own; both sides take turns. Ours is verified (SHA-256), the bare one is not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modules.hub import DownloadQueue, Hub, JobState, choose, parse
from modules.hub.job import Order
from modules.hub.placing import partial_folder
from tests.benchmarks.common import FIXTURES, ROOT, Row, environment, medians, ratio_row

_BARE = """
import sys, time, json
from huggingface_hub import snapshot_download
begun = time.perf_counter()
snapshot_download("user/model", local_dir=sys.argv[2], endpoint=sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""


def online() -> dict[str, str]:
    return {**environment(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """The address of a Hub in a process of its own that holds the folder as ``user/model``."""
    command = [sys.executable, "-m", "tests.hub_server", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def _bare(url: str) -> float:
    with tempfile.TemporaryDirectory(dir=FIXTURES) as folder:
        done = subprocess.run(
            [sys.executable, "-c", _BARE, url, folder], cwd=ROOT, env=online(), check=True, capture_output=True,
            text=True,
        )  # fmt: skip
        return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def order_of(url: str, root: Path) -> Order:
    """The order for all of ``user/model``."""
    repository = Hub(url).repository(parse("user/model"))
    choice = choose(repository.name, repository.files, "*")
    return Order(
        repository.name, "main", repository.commit, choice.kind, choice.wanted, str(root / "user_model"),
        str(partial_folder(root, "x")), url,
    )  # fmt: skip


def _ours(url: str) -> float:
    """From the order to the whole verified model; the interpreter's start and its imports are ours alone."""
    with tempfile.TemporaryDirectory(dir=FIXTURES) as folder:
        queue = DownloadQueue(None)
        order = order_of(url, Path(folder))
        begun = time.perf_counter()
        job = queue.wait_for(queue.add(order).key)
        seconds = time.perf_counter() - begun
        assert job.state is JobState.DONE, job.error
        return seconds


def rows(runs: int = 5) -> list[Row]:
    model = FIXTURES / "models" / "SmolLM2-135M-Instruct"
    import os

    os.environ["HF_HUB_OFFLINE"] = "0"
    with hub_of(model) as url, tempfile.TemporaryDirectory(dir=FIXTURES) as _:
        _bare(url)  # the file is in the page cache afterwards
        bare, ours = medians([lambda: _bare(url), lambda: _ours(url)], runs)
    return [ratio_row("download 269 MB, against snapshot_download", ours, bare, "s", "≤ 1.05 ×")]


def main() -> None:
    shutil.rmtree(FIXTURES / "download", ignore_errors=True)
    for row in rows():
        print(f"{row.what}: {row.ours} (bare {row.bare}, {row.ratio}; aim {row.goal})")


if __name__ == "__main__":
    main()
