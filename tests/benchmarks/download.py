"""How fast a download is against a bare snapshot_download of the same files, from a Hub on this machine.

The Hub runs in a process of its own; both sides take turns, each with the start of the process that downloads.
Ours is verified (SHA-256), the bare one is not.
"""

from __future__ import annotations

import os
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
from tests.benchmarks.common import (
    FIXTURES,
    ROOT,
    Row,
    call,
    environment,
    free_port,
    medians,
    ratio_row,
    server_command,
    started,
)

_ONLINE = {**environment(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

_BARE = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("user/model", local_dir=sys.argv[2], endpoint=sys.argv[1])
"""


@contextmanager
def online() -> Iterator[None]:
    """Processes that are started meanwhile may ask a Hub."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE") if before is None else os.environ.update(HF_HUB_OFFLINE=before)


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
    """A script's seconds from its start to its end."""
    with tempfile.TemporaryDirectory(dir=FIXTURES) as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", _BARE, url, folder], cwd=ROOT, env=_ONLINE, check=True)
        return time.perf_counter() - begun


def order_of(url: str, root: Path) -> Order:
    """The order for all of ``user/model``."""
    repository = Hub(url).repository(parse("user/model"))
    choice = choose(repository.name, repository.files, "*")
    return Order(
        repository.name, "main", repository.commit, choice.kind, choice.wanted, str(root / "user_model"),
        str(partial_folder(root, "x")), url,
    )  # fmt: skip


def _ours(url: str) -> float:
    """From the question what there is to the whole verified model; the start of our process is counted too."""
    with tempfile.TemporaryDirectory(dir=FIXTURES) as folder:
        queue = DownloadQueue(None)
        begun = time.perf_counter()
        order = order_of(url, Path(folder))
        job = queue.wait_for(queue.add(order).key)
        seconds = time.perf_counter() - begun
        assert job.state is JobState.DONE, job.error
        return seconds


def _slowest_answer(url: str) -> float:
    """The longest that the server took to answer the page's question while it downloaded, in seconds."""
    home = Path(tempfile.mkdtemp(dir=FIXTURES))
    port = free_port()
    command = server_command(port, "--home", str(home), "--no-warm-worker")
    worst = 0.0
    try:
        with started(command, port, HF_ENDPOINT=url, HF_HUB_OFFLINE="0"):
            call(port, "/v1/internal/download", {"repo": "user/model"})
            while call(port, "/v1/internal/download")["downloads"][0]["state"] in ("waiting", "running"):
                begun = time.perf_counter()
                call(port, "/v1/internal/model/status")
                worst = max(worst, time.perf_counter() - begun)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return worst


def rows(runs: int = 5) -> list[Row]:
    model = FIXTURES / "models" / "SmolLM2-135M-Instruct"
    with online(), hub_of(model) as url:
        _bare(url)  # the file is in the page cache afterwards
        bare, ours = medians([lambda: _bare(url), lambda: _ours(url)], runs)
        [answer] = medians([lambda: _slowest_answer(url)], runs)
    return [
        ratio_row("download 269 MB, verified, against snapshot_download", ours, bare, "s", "≤ 1.05 ×"),
        Row("the page's slowest answer meanwhile", f"{answer:.3f} s", "", "", "≤ 0.2 s"),
    ]


def main() -> None:
    for row in rows():
        print(f"{row.what}: {row.ours} (bare {row.bare}, {row.ratio}; aim {row.goal})")


if __name__ == "__main__":
    main()
