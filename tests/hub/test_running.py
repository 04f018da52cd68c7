"""One download against a Hub on localhost: whole, from where it stopped, and each fault."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.errors import BrokenDownload, Busy, DiskFull, HubUnreachable, LoadstoneError, UnsafeCheckpoint, UserError
from modules.hub import fetching
from modules.hub.fetching import Patience, bring_whole
from modules.hub.job import Order
from modules.hub.placing import read_record
from modules.hub.running import run
from modules.library import Library
from tests.conftest import wait_until
from tests.hub_models import names_in, order_for, tiny_files, weights
from tests.hub_server import Fault, Hub, Repo, bytes_of

QUICK = Patience(wait_s=0.01)
WHOLE = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def fetch(order: Order) -> list[tuple[str, int]]:
    """Run an order; all that was told."""
    told: list[tuple[str, int]] = []
    run(order, lambda stage, done: told.append((stage, done)), QUICK)
    return told


def offered(root: Path) -> list[str]:
    return [model.name for model in Library([root]).models()]


def assert_whole(hub: Hub, order: Order) -> None:
    files = hub.repos[order.repo].branches[order.revision]
    for name in names_in(Path(order.target)):
        assert Path(order.target, name).read_bytes() == bytes_of(files[name]), name
    assert not Path(order.partial).exists()


def test_a_whole_model(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    told = fetch(order)
    assert names_in(Path(order.target)) == WHOLE
    assert_whole(hub, order)
    assert told[-1][1] == order.size_bytes
    assert offered(tmp_path) == ["user_model"]
    assert Library([tmp_path]).facts("user_model").parameters == 512 * 64
    record = read_record(Path(order.target))
    assert record is not None
    assert (record.repo, record.commit) == ("user/model", order.commit)


def test_each_byte_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    fetch(order)
    assert hub.sent_bytes() == order.size_bytes
    assert not [request for request in hub.requests if request.method == "HEAD"]


def test_a_branch_goes_to_a_folder_of_its_own(hub: Hub, tmp_path: Path) -> None:
    hub.repos["user/model"].branches["gptq/4bit"] = tiny_files(seed=5)
    order = order_for(hub, tmp_path, "user/model:gptq/4bit")
    fetch(order)
    assert Path(order.target).name == "user_model_gptq_4bit"
    assert_whole(hub, order)


def test_asking_again_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    fetch(order)
    inode = (Path(order.target) / "model.safetensors").stat().st_ino
    sent = hub.sent_bytes()
    fetch(order)
    assert hub.sent_bytes() == sent
    assert (Path(order.target) / "model.safetensors").stat().st_ino == inode
    assert not Path(order.partial).exists()


def test_an_update_fetches_what_changed_and_drops_what_is_gone(hub: Hub, tmp_path: Path) -> None:
    branch = hub.repos["user/model"].branches
    branch["main"] = {**branch["main"], "added_tokens.json": b"{}"}
    fetch(order_for(hub, tmp_path))
    folder = tmp_path / "user_model"
    (folder / "notes.txt").write_text("mine")
    branch["main"] = {**tiny_files(), "model.safetensors": weights(seed=9)}
    sent = hub.sent_bytes()
    order = order_for(hub, tmp_path)
    fetch(order)
    assert hub.sent_bytes() - sent == len(weights())
    assert names_in(folder) == {*WHOLE, "notes.txt"}
    assert (folder / "model.safetensors").read_bytes() == weights(seed=9)


def test_an_update_to_a_commit_that_only_removes_a_file_removes_it(hub: Hub, tmp_path: Path) -> None:
    branch = hub.repos["user/model"].branches
    branch["main"] = {**tiny_files(), "chat_template.jinja": b"wrong"}
    fetch(order_for(hub, tmp_path))
    sent = hub.sent_bytes()
    branch["main"] = tiny_files()
    fetch(order_for(hub, tmp_path))
    record = read_record(tmp_path / "user_model")
    assert record is not None
    assert names_in(tmp_path / "user_model") == set(record.files) == WHOLE
    assert hub.sent_bytes() == sent


def test_a_second_file_joins_the_first(hub: Hub, tmp_path: Path) -> None:
    hub.repos["user/model"].branches["main"] = {"a-Q4_0.gguf": b"GGUF" + bytes(9000), "a-Q8_0.gguf": b"GGUF" * 3000}
    fetch(order_for(hub, tmp_path, pattern="*Q4*"))
    assert names_in(tmp_path / "user_model") == {"a-Q4_0.gguf"}
    fetch(order_for(hub, tmp_path, pattern="a-Q8_0.gguf"))
    assert names_in(tmp_path / "user_model") == {"a-Q4_0.gguf", "a-Q8_0.gguf"}
    record = read_record(tmp_path / "user_model")
    assert record is not None
    assert set(record.files) == {"a-Q4_0.gguf", "a-Q8_0.gguf"}


@pytest.mark.parametrize("right", [True, False])
def test_what_another_library_brings_is_hashed_too(hub: Hub, tmp_path: Path, right: bool) -> None:
    """As hf_xet does, for the files that the Hub does not give by HTTP."""
    order = order_for(hub, tmp_path)
    file = next(file for file in order.files if file.name == "model.safetensors")
    content = bytes_of(hub.repos["user/model"].branches["main"][file.name])
    part = Path(order.partial, file.name)

    def bring(path: Path) -> None:
        path.write_bytes(content if right else content[:-1] + bytes([content[-1] ^ 1]))

    with contextlib.nullcontext() if right else pytest.raises(BrokenDownload, match="not what the Hub lists"):
        bring_whole(order, file, lambda _: None, bring)
    assert part.is_file() is right
    assert list(part.parent.iterdir()) == ([part] if right else [])


def test_repair_fetches_only_what_is_broken(hub: Hub, tmp_path: Path) -> None:
    fetch(order_for(hub, tmp_path))
    damaged = tmp_path / "user_model" / "tokenizer.json"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    sent = hub.sent_bytes()
    order = order_for(hub, tmp_path, check_all=True)
    fetch(order)
    assert hub.sent_bytes() - sent == 5002
    assert_whole(hub, order)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 70_000), max_size=4), small=st.lists(st.integers(0, 5_002), max_size=2))
def test_cut_connections_go_on_where_they_were_cut(
    hub: Hub, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], small: list[int]
) -> None:
    hub.faults = {
        "model.safetensors": [Fault(cut=cut) for cut in cuts], "tokenizer.json": [Fault(cut=cut) for cut in small],
    }  # fmt: skip
    hub.requests.clear()
    order = order_for(hub, tmp_path_factory.mktemp("models"))
    fetch(order)
    assert_whole(hub, order)
    assert hub.sent_bytes() == order.size_bytes


def test_a_network_that_keeps_failing_ends_in_an_error_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {"model.safetensors": [Fault(cut=0)] * 100}
    order = order_for(hub, tmp_path)
    with pytest.raises(HubUnreachable, match=r"cannot be reached|makes no sense"):
        fetch(order)
    assert len(hub.asked("model.safetensors", cdn=True)) == QUICK.tries
    assert offered(tmp_path) == []
    hub.faults = {}
    fetch(order)
    assert_whole(hub, order)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for_as_it_asks(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults = {"model.safetensors": [Fault(status=status, retry_after=1)]}
    order = order_for(hub, tmp_path)
    told = fetch(order)
    assert "the connection failed; trying again in 1 s" in [stage for stage, _ in told]
    assert_whole(hub, order)


def test_a_connection_that_brings_nothing_is_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.hub.fetching.SILENCE_S", 1.0)
    hub.faults = {"model.safetensors": [Fault(stall=30_000)]}
    order = order_for(hub, tmp_path)
    fetch(order)
    assert_whole(hub, order)
    assert hub.sent_bytes("model.safetensors") == len(weights())


def test_a_hub_that_asks_to_wait_for_an_hour_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {"model.safetensors": [Fault(status=429, retry_after=3600)]}
    with pytest.raises(HubUnreachable, match="429"):
        fetch(order_for(hub, tmp_path))


def test_a_wrong_byte_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {"model.safetensors": [Fault(flip=40_000)]}
    order = order_for(hub, tmp_path)
    fetch(order)
    assert_whole(hub, order)


@pytest.mark.parametrize(
    ("file", "fault", "words"),
    [
        ("model.safetensors", Fault(flip=40_000), "its SHA-256 begins with"),
        ("config.json", Fault(flip=3), "its SHA-1 begins with"),
        ("model.safetensors", Fault(short=100), "bytes, not"),
        ("model.safetensors", Fault(longer=100), "bytes, not"),
    ],
    ids=["wrong byte", "wrong byte of a small file", "short", "grown"],
)
def test_what_stays_wrong_is_an_error_and_nothing_is_offered(
    hub: Hub, tmp_path: Path, file: str, fault: Fault, words: str
) -> None:
    hub.faults = {file: [fault] * 5}
    with pytest.raises(BrokenDownload, match=f"{file} of user/model is not what the Hub lists.*{words}"):
        fetch(order_for(hub, tmp_path))
    assert offered(tmp_path) == []
    assert not (tmp_path / "user_model").exists()


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/absolute.json", "a/../../b.json", "C:\\x.json"])
def test_a_name_that_leaves_the_folder_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.renames = {"tokenizer.json": name}
    with pytest.raises(UnsafeCheckpoint, match="outside the model's folder"):
        order_for(hub, tmp_path / "models")
    assert not list(tmp_path.rglob("*.json"))


def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    """On a disk of 256 kB, of which another file takes most; then there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        (disk / "other").write_bytes(bytes(200_000))
        order = order_for(hub, disk)
        with pytest.raises(DiskFull, match="The disk is full"):
            fetch(order)
        assert offered(disk) == []
        (disk / "other").unlink()
        fetch(order)
        assert_whole(hub, order)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        fetch(order_for(hub, tmp_path / "models"))


def test_two_processes_do_not_write_the_same_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.hub.running._LOCK_S", 0.2)
    hub.faults = {"model.safetensors": [Fault(stall=1000)]}
    order = order_for(hub, tmp_path)

    def fetch_until_cut() -> None:
        with contextlib.suppress(LoadstoneError):
            fetch(order)

    first = threading.Thread(target=fetch_until_cut, daemon=True)
    first.start()
    wait_until(lambda: bool(hub.asked("model.safetensors", cdn=True)))
    with pytest.raises(Busy, match="Another process"):
        fetch(order)
    hub.ending.set()
    first.join(30)
    assert not first.is_alive()


def test_large_files_are_hashed_beside(hub: Hub, tmp_path: Path) -> None:
    """A file above the size from which another thread hashes, cut twice."""
    data = random.Random(1).randbytes(12_000_000)
    hub.repos["user/big"] = Repo({"main": {**tiny_files(), "model.safetensors": data}})
    hub.faults = {"model.safetensors": [Fault(cut=3_000_000), Fault(cut=5_000_000)]}
    order = order_for(hub, tmp_path, "user/big")
    fetch(order)
    assert_whole(hub, order)
    assert hub.sent_bytes("model.safetensors") == len(data)


@pytest.mark.parametrize("size", [66_000, 12_000_000])
def test_a_server_without_ranges_begins_anew(hub: Hub, tmp_path: Path, size: int) -> None:
    """Below and above the size from which another thread hashes."""
    data = random.Random(2).randbytes(size)
    hub.repos["user/big"] = Repo({"main": {**tiny_files(), "model.safetensors": data}})
    hub.faults = {"model.safetensors": [Fault(cut=30_000), Fault(whole=True)]}
    order = order_for(hub, tmp_path, "user/big")
    told = fetch(order)
    assert_whole(hub, order)
    assert told[-1][1] == order.size_bytes
    assert hub.sent_bytes("model.safetensors") == 30_000 + size


def test_a_part_that_cannot_be_read_any_more_is_an_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that hashes gives up before more comes than may wait for it."""
    data = random.Random(3).randbytes(30_000_000)
    hub.repos["user/big"] = Repo({"main": {**tiny_files(), "model.safetensors": data}})
    order = order_for(hub, tmp_path, "user/big")

    readable = fetching._Sink._hash_prefix

    def unreadable(sink: fetching._Sink, have: int) -> None:
        if sink._file.size == len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        readable(sink, have)

    monkeypatch.setattr(fetching._Sink, "_hash_prefix", unreadable)
    said: list[UserError] = []

    def fetch_it() -> None:
        with pytest.raises(UserError, match="Input/output error") as raised:
            fetch(order)
        said.append(raised.value)

    thread = threading.Thread(target=fetch_it, daemon=True)
    thread.start()
    thread.join(60)
    assert said
