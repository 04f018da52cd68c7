"""The quantized copies under the cache folder, as files: listed, checked, deleted, and left-overs told from work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import server
from modules import copies, flags
from modules.errors import BrokenCheckpoint, UserError

NF4 = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
INT8 = {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}


def make(cache: Path, model: str = "model", recipe: Mapping[str, Any] = NF4, size: int = 1000) -> Path:
    """A copy with one weight file of ``size`` bytes."""
    identity = {"source": f"/models/{model}", "recipe": dict(recipe)}
    folder = copies.folder_of(cache) / copies.key_of(identity)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    copies.write_manifest(folder, model, identity)
    return folder


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert copies.copies(tmp_path / "nowhere") == []
    copies.remove_leftovers(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_list_names_model_recipe_and_size(tmp_path: Path) -> None:
    make(tmp_path, "zephyr")
    make(tmp_path, "Albert", {**NF4, "bnb_4bit_use_double_quant": True})
    eight_bit = make(tmp_path, "Albert", INT8, size=5000)
    found = copies.copies(tmp_path)
    assert [(copy.model, copy.what) for copy in found] == [
        ("Albert", "8-bit"),
        ("Albert", "nf4, double quantization"),
        ("zephyr", "nf4"),
    ]
    assert found[0].path == eight_bit
    assert found[0].size_bytes == 5000 + (eight_bit / copies.MANIFEST).stat().st_size


def test_the_check_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_TELL_S", 0)
    copy = copies.read(make(tmp_path, size=64_000_000))
    told: list[tuple[int, int]] = []
    copies.check(copy, lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {64_000_000}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert any(0 < done < 64_000_000 for done, _ in told)


def test_a_whole_copy_passes_the_check_and_every_difference_fails(tmp_path: Path) -> None:
    folder = make(tmp_path)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    copies.check(copies.read(folder))
    for bad in (good[:-1], bytes([good[0] ^ 128]) + good[1:], good + b"\0"):
        weights.write_bytes(bad)
        with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors .* has changed"):
            copies.check(copies.read(folder))
    weights.write_bytes(good)
    (folder / "more").mkdir()
    with pytest.raises(BrokenCheckpoint, match="more"):
        copies.check(copies.read(folder))


def test_a_manifest_belongs_to_its_folder_alone(tmp_path: Path) -> None:
    one, other = make(tmp_path, "one"), make(tmp_path, "other")
    (one / copies.MANIFEST).write_bytes((other / copies.MANIFEST).read_bytes())
    with pytest.raises(BrokenCheckpoint, match="another copy's"):
        copies.read(one)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"identity": 1}', '{"identity": {}, "files": 3, "model": "m"}'])
def test_a_damaged_manifest_is_an_error_and_is_listed_with_its_size(tmp_path: Path, manifest: str) -> None:
    folder = make(tmp_path)
    (folder / copies.MANIFEST).write_text(manifest)
    with pytest.raises(BrokenCheckpoint):
        copies.read(folder)
    [copy] = copies.copies(tmp_path)
    assert (copy.model, copy.what, copy.size_bytes) == ("", "unreadable", 1000 + len(manifest))
    copies.delete(tmp_path, copy.key)
    assert copies.copies(tmp_path) == []


def test_a_copy_that_vanishes_while_it_is_listed_is_left_out(tmp_path: Path) -> None:
    """As when a worker removes a stale one, or a damaged one."""
    stays, damaged = make(tmp_path, "stays"), make(tmp_path, "damaged")
    goes = [make(tmp_path, f"goes {number}") for number in range(8)]
    (damaged / copies.MANIFEST).write_text("{")
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for folder in (damaged, *goes):
                aside = copies.partial(folder)
                folder.rename(aside)
                aside.rename(folder)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        seen = {len(found) for _ in range(400) if (found := copies.copies(tmp_path)) and stays in paths(found)}
    finally:
        over.set()
        thread.join()
    assert seen - {10}  # some were away
    assert len(copies.copies(tmp_path)) == 10


def paths(found: list[copies.QuantizedCopy]) -> list[Path]:
    return [copy.path for copy in found]


def test_delete_removes_one_copy_and_what_dead_processes_left(tmp_path: Path) -> None:
    one, other = make(tmp_path, "one"), make(tmp_path, "other")
    left = left_by_a_dead_process(one)
    copies.delete(tmp_path, one.name)
    assert os.listdir(copies.folder_of(tmp_path)) == [other.name]
    assert not left.exists()
    with pytest.raises(UserError, match="There is no quantized copy"):
        copies.delete(tmp_path, one.name)


@pytest.mark.parametrize("key", ["", ".", "..", "../../models", "/etc", "a" * 32 + "/..", "A" * 32])
def test_delete_takes_keys_alone(tmp_path: Path, key: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match="There is no quantized copy"):
        copies.delete(tmp_path, key)
    assert len(copies.copies(tmp_path)) == 1


def left_by_a_dead_process(folder: Path) -> Path:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = folder.with_name(f"{folder.name}.partial-{dead.pid}")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    return left


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    folder = make(tmp_path)
    working = copies.partial(folder)
    working.mkdir()
    left = left_by_a_dead_process(folder)
    copies.remove_leftovers(tmp_path)
    assert working.is_dir()
    assert not left.exists()
    assert [copy.path for copy in copies.copies(tmp_path)] == [folder]


def test_a_later_process_with_the_same_id_is_not_the_writer(tmp_path: Path) -> None:
    working = copies.partial(make(tmp_path))
    working.mkdir()
    os.utime(working, (0, 0))  # long before this process began
    copies.remove_leftovers(tmp_path)
    assert not working.exists()


@pytest.mark.parametrize(("arguments", "expected"), [([], True), (["--no-quantized-cache"], False)])
def test_the_flag_reaches_the_order(tmp_path: Path, demo_model: Path, arguments: list[str], expected: bool) -> None:
    argv = ["--home", str(tmp_path), "--model-dir", str(demo_model.parent), "--no-hf-cache", "--no-warm-worker"]
    service, _ = server.prepare(flags.parse([*argv, *arguments]))  # type: ignore[arg-type]
    try:
        order = service.order(demo_model.name, {"load_in_4bit": True})
    finally:
        service.supervisor.close()
    assert order.quantized_cache is expected
    assert copies.folder_of(Path(order.cache_dir)) == tmp_path / "models" / ".cache" / "quantized"
