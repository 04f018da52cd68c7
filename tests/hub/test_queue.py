"""The queue with real download processes: in the background, paused, ended, begun again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from modules.errors import BrokenDownload, ModelNotFound
from modules.hub import DownloadQueue, Job, JobState, placing
from modules.hub.words import job_in_words
from tests.conftest import wait_until
from tests.hub.test_placing import killed_between_the_two_renames
from tests.hub.test_running import assert_whole, offered
from tests.hub_models import order_for, tiny_files, weights
from tests.hub_server import Fault, Hub, Repo

ROWS = 32_768  # of a model of 4 MB, whose download can be watched
SIZE = len(weights(rows=ROWS))


@contextmanager
def queue_in(folder: Path) -> Iterator[DownloadQueue]:
    queue = DownloadQueue(folder / ".cache" / "downloads.json")
    queue.start()
    try:
        yield queue
    finally:
        queue.close()


@pytest.fixture
def slow(hub: Hub) -> Hub:
    """A Hub that takes two seconds for its model."""
    hub.repos["user/model"].branches["main"] = {**tiny_files(), "model.safetensors": weights(rows=ROWS)}
    hub.bytes_per_second = SIZE / 2
    return hub


def processes() -> list[psutil.Process]:
    """The download processes of this one. One that ends while it is looked at is none."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # and ZombieProcess, a kind of it
            if "modules.hub" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for_share(queue: DownloadQueue, key: str, share: float) -> Job:
    wait_until(lambda: queue.job(key).done_bytes >= share * queue.job(key).order.size_bytes)
    return queue.job(key)


def test_it_tells_how_far_it_is(slow: Hub, tmp_path: Path) -> None:
    seen: list[Job] = []
    with queue_in(tmp_path) as queue:
        job = queue.wait_for(queue.add(order_for(slow, tmp_path)).key, seen.append)
    assert job.state is JobState.DONE
    assert_whole(slow, job.order)
    done = [one.done_bytes for one in seen]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert any(one.speed > 0 and one.seconds_left for one in seen)
    assert job_in_words(job) == "4 MB · every file verified"
    assert not list((tmp_path / ".cache" / "downloads").iterdir())


def test_pause_and_resume(slow: Hub, tmp_path: Path) -> None:
    with queue_in(tmp_path) as queue:
        key = queue.add(order_for(slow, tmp_path)).key
        wait_for_share(queue, key, 0.3)
        begun = time.monotonic()
        assert queue.pause(key).state is JobState.PAUSED
        wait_until(lambda: not processes())
        assert time.monotonic() - begun < 5
        asked = len(slow.requests)
        time.sleep(0.5)  # a while in which something would come, if anything still fetched
        assert len(slow.requests) == asked
        assert offered(tmp_path) == []
        queue.resume(key)
        assert queue.wait_for(key).state is JobState.DONE
        assert_whole(slow, queue.job(key).order)
    assert slow.sent_bytes("model.safetensors") <= 1.3 * SIZE  # what was on the way when it was paused is lost


def test_cancel_leaves_nothing(slow: Hub, tmp_path: Path) -> None:
    with queue_in(tmp_path) as queue:
        key = queue.add(order_for(slow, tmp_path)).key
        order = wait_for_share(queue, key, 0.3).order
        begun = time.monotonic()
        assert queue.cancel(key).state is JobState.CANCELLED
        wait_until(lambda: not processes() and not Path(order.partial).exists())
        assert time.monotonic() - begun < 5
        assert not Path(order.target).exists()
        queue.clear()
        with pytest.raises(ModelNotFound):
            queue.job(key)


def test_cancelled_between_the_two_renames_the_old_model_is_there_again(hub: Hub, tmp_path: Path) -> None:
    order = killed_between_the_two_renames(hub, tmp_path)
    with queue_in(tmp_path) as queue:
        assert queue.cancel(queue.add(order).key).state is JobState.CANCELLED
        wait_until(lambda: not [p for p in (tmp_path / ".cache" / "downloads").iterdir() if p.is_dir()])
    assert (tmp_path / "user_model" / "model.safetensors").read_bytes() == weights()
    assert (tmp_path / "user_model" / "notes.txt").is_file()


def test_nobody_waits_for_a_disk_that_hangs(slow: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of downloads is being written, and a cancelled one's files removed, for as long as it takes."""
    goes_on = threading.Event()
    at_it: list[str] = []

    def hanging(function: Callable[..., None]) -> Callable[..., None]:
        def hang(*arguments: Any) -> None:
            at_it.append(function.__name__)
            assert goes_on.wait(60)
            function(*arguments)

        return hang

    for name in ("write_json", "remove_tree"):
        monkeypatch.setattr(placing, name, hanging(getattr(placing, name)))
    with queue_in(tmp_path) as queue:
        key = queue.add(order_for(slow, tmp_path)).key
        wait_for_share(queue, key, 0.1)
        assert queue.cancel(key).state is JobState.CANCELLED
        wait_until(lambda: {"write_json", "remove_tree"} <= set(at_it))
        assert [job.state for job in queue.jobs()] == [JobState.CANCELLED]
        assert queue.add(order_for(slow, tmp_path)).state in (JobState.WAITING, JobState.RUNNING)  # the same again
        wait_for_share(queue, key, 0.1)
        queue.shown()
        goes_on.set()
    assert key in (tmp_path / ".cache" / "downloads.json").read_text()


def test_the_same_asked_for_twice_is_one_download(slow: Hub, tmp_path: Path) -> None:
    with queue_in(tmp_path) as queue:
        first, second = (queue.add(order_for(slow, tmp_path)) for _ in range(2))
        assert first.key == second.key
        queue.wait_for(first.key)
        assert len(queue.jobs()) == 1
    assert slow.sent_bytes("model.safetensors") == SIZE


def test_two_files_for_one_folder_come_one_after_the_other(hub: Hub, tmp_path: Path) -> None:
    files = {name: b"GGUF" + os.urandom(90_000) for name in ("a.gguf", "b.gguf")}
    hub.repos["user/model"].branches["main"] = dict(files)
    hub.bytes_per_second = 400_000
    with queue_in(tmp_path) as queue:
        jobs = [queue.add(order_for(hub, tmp_path, pattern=name)) for name in files]
        wait_until(lambda: queue.job(jobs[0].key).state is not JobState.WAITING)
        assert queue.job(jobs[1].key).state is JobState.WAITING
        assert [queue.wait_for(job.key).state for job in jobs] == [JobState.DONE] * 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "user_model").glob("*.gguf")} == files


def test_what_is_open_goes_on_after_a_restart(slow: Hub, tmp_path: Path) -> None:
    slow.repos["user/other"] = Repo({"main": tiny_files(seed=3)})
    with queue_in(tmp_path) as queue:
        running = queue.add(order_for(slow, tmp_path)).key
        wait_for_share(queue, running, 0.4)
        paused = queue.add(order_for(slow, tmp_path, "user/other")).key
        queue.pause(paused)
    wait_until(lambda: not processes())
    with queue_in(tmp_path) as again:
        assert again.job(running).done_bytes >= 0.3 * SIZE
        assert again.wait_for(running).state is JobState.DONE
        assert again.job(paused).state is JobState.PAUSED
        assert_whole(slow, again.job(running).order)
        again.resume(paused)
        assert again.wait_for(paused).state is JobState.DONE


def test_a_killed_process_is_an_error_that_can_be_resumed(slow: Hub, tmp_path: Path) -> None:
    with queue_in(tmp_path) as queue:
        key = queue.add(order_for(slow, tmp_path)).key
        wait_for_share(queue, key, 0.3)
        os.kill(processes()[0].pid, signal.SIGKILL)
        job = queue.wait_for(key)
        assert job.state is JobState.FAILED
        assert "status -9" in str(job.error)
        queue.resume(key)
        assert queue.wait_for(key).state is JobState.DONE


def test_an_error_of_the_process_arrives_as_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {"config.json": [Fault(flip=1)] * 2}
    with queue_in(tmp_path) as queue:
        job = queue.wait_for(queue.add(order_for(hub, tmp_path)).key)
        assert type(job.error) is BrokenDownload
        assert offered(tmp_path) == []
    kept = json.loads((tmp_path / ".cache" / "downloads.json").read_text())["jobs"]
    assert kept[0]["error"]["kind"] == "broken_download"


def test_a_download_that_cannot_be_begun_is_an_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with queue_in(tmp_path) as queue:
        with monkeypatch.context() as without_temporary_files:
            without_temporary_files.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
            job = queue.wait_for(queue.add(order_for(hub, tmp_path)).key)
        assert "cannot be started" in str(job.error)
        queue.resume(job.key)
        assert queue.wait_for(job.key).state is JobState.DONE


@pytest.mark.parametrize("text", ["", "{", '{"jobs": [{"key": 1}]}', "[]", '{"jobs": [1]}'])
def test_a_damaged_list_is_no_list(hub: Hub, tmp_path: Path, text: str) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "downloads.json").write_text(text)
    with queue_in(tmp_path) as queue:
        assert queue.jobs() == []
        assert queue.wait_for(queue.add(order_for(hub, tmp_path)).key).state is JobState.DONE
