"""Nothing but a whole copy of just these files is read, whatever happened to it or to who wrote it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modules import copies
from modules.errors import LoadstoneError
from modules.protocol import LOAD, LoadOrder
from tests import checkpoints
from tests.conftest import StartWorker
from tests.worker.quantized import (
    MADE,
    NF4,
    READ,
    everything,
    kept,
    load,
    noted,
    order_for,
    weights,
)
from tests.worker.test_transformers_loader import greedy


@pytest.fixture(scope="module")
def whole(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A cache folder with one whole copy of the demo model in nf4, and the tokens that it answers with."""
    work = tmp_path_factory.mktemp("whole")
    return work / "cache", greedy(load(demo_model, work, **NF4))


def truncate(folder: Path) -> None:
    with weights(folder).open("r+b") as file:
        file.truncate(weights(folder).stat().st_size - 1)


def flip(folder: Path) -> None:
    stat = weights(folder).stat()
    with weights(folder).open("r+b") as file:
        file.seek(stat.st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(weights(folder), ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk would do it


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def add_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')


def drop_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_manifest(folder: Path) -> None:
    manifest = folder / copies.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-10])


def forge_manifest(folder: Path) -> None:
    """Weights of another recipe, sealed anew under this copy's identity: only the layers themselves tell."""
    data = json.loads((folder / copies.MANIFEST).read_text())
    made = folder.parent.parent.parent / "fp4"
    source = data["identity"]["source"]
    load(Path(source), made, load_in_4bit=True, quant_type="fp4")
    shutil.copyfile(weights(kept(made)[0].path), weights(folder))
    copies.write_manifest(folder, data["model"], data["identity"])


DAMAGES = (truncate, flip, edit_config, add_weights, drop_file, cut_manifest, forge_manifest)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_copy_is_removed_and_made_again(
    demo_model: Path,
    tmp_path: Path,
    whole: tuple[Path, list[int]],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="modules.worker.quantized_copies")
    cache, tokens = whole
    shutil.copytree(cache, tmp_path / "cache")
    [copy] = kept(tmp_path)
    damage(copy.path)
    loaded = load(demo_model, tmp_path, **NF4)
    assert not noted(loaded, READ)
    assert noted(loaded, MADE)
    assert greedy(loaded) == tokens
    assert any("is removed" in message for message in caplog.messages)
    [again] = kept(tmp_path)
    copies.check(copies.read(again.path))
    assert everything(tmp_path) == [copy.key]


def test_a_changed_source_makes_its_copies_stale(demo_model: Path, tmp_path: Path) -> None:
    source = checkpoints.copied(demo_model, tmp_path / "source")
    load(source, tmp_path, **NF4)
    [first] = kept(tmp_path)
    file = weights(source)
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    assert not noted(load(source, tmp_path, **NF4), READ)
    [second] = kept(tmp_path)
    assert second.key != first.key
    assert noted(load(source, tmp_path, **NF4), READ)


def test_an_edited_source_config_makes_its_copies_stale_and_other_models_keep_theirs(tmp_path: Path) -> None:
    source = checkpoints.copied(checkpoints.llama(), tmp_path / "source")
    other = checkpoints.copied(checkpoints.llama(), tmp_path / "other")
    for path in (source, other):
        load(path, tmp_path, **NF4)
        load(path, tmp_path, load_in_8bit=True)
    edit_config(source)
    fresh = load(source, tmp_path, quantized_cache=False, **NF4)
    loaded = load(source, tmp_path, **NF4)
    assert not noted(loaded, READ)
    assert loaded.model.config.rms_norm_eps == 0.5
    assert greedy(loaded) == greedy(fresh)
    assert [(copy.model, copy.what) for copy in kept(tmp_path)] == [
        ("other", "8-bit"), ("other", "nf4"), ("source", "nf4"),
    ]  # fmt: skip


def test_a_moved_models_copy_goes_when_the_model_is_loaded_from_its_new_place(tmp_path: Path) -> None:
    source = checkpoints.copied(checkpoints.llama(), tmp_path / "one" / "model")
    load(source, tmp_path, **NF4)
    (tmp_path / "two").mkdir()
    source.rename(tmp_path / "two" / "model")
    assert noted(load(tmp_path / "two" / "model", tmp_path, **NF4), MADE)
    assert [copy.identity["source"] for copy in kept(tmp_path)] == [str((tmp_path / "two" / "model").resolve())]


def test_copies_of_other_versions_go(tmp_path: Path) -> None:
    source = checkpoints.copied(checkpoints.llama(), tmp_path / "source")
    load(source, tmp_path, **NF4)
    [copy] = kept(tmp_path)
    identity = {**copy.identity, "versions": {**copy.identity["versions"], "bitsandbytes": "0.1"}}
    older = copy.path.with_name(copies.key_of(identity))
    copy.path.rename(older)
    copies.write_manifest(older, copy.model, identity)
    assert not noted(load(source, tmp_path, **NF4), READ)
    assert everything(tmp_path) == [copy.key]


# --- processes that end while they write ---

# The kernel ends the process at the weight file, which is longer than a file of this process may be.
KILLED_AT_THE_FILE = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))
"""
# Writing fails there instead, as on a disk that is full.
FAILS_AT_THE_FILE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))"


def partials(work: Path) -> list[Path]:
    return sorted(copies.folder_of(work / "cache").glob("*.partial-*"))


def test_a_process_that_ends_at_the_weight_file_leaves_nothing_that_is_read(
    demo_model: Path, tmp_path: Path, whole: tuple[Path, list[int]], start_worker: StartWorker
) -> None:
    worker = start_worker(code=KILLED_AT_THE_FILE)
    assert worker.post(LOAD, order_for(demo_model, tmp_path, **NF4)).status_code == 202
    assert worker.process.wait(120) == -signal.SIGXFSZ
    [left] = partials(tmp_path)
    assert copies.MANIFEST not in os.listdir(left)
    assert kept(tmp_path) == []
    loaded = load(demo_model, tmp_path, **NF4)
    assert not noted(loaded, READ)
    assert greedy(loaded) == whole[1]
    assert everything(tmp_path) == [kept(tmp_path)[0].key]


def kill_while_writing(start: StartWorker, order: LoadOrder, work: Path) -> None:
    """kill -9 a worker as soon as its copy has begun to appear."""
    worker = start()
    assert worker.post(LOAD, order).status_code == 202
    end = time.monotonic() + 120
    while not partials(work):
        assert time.monotonic() < end
        assert worker.process.poll() is None
    worker.process.kill()
    worker.process.wait()


def test_kill_9_while_writing_leaves_nothing_that_is_read(
    demo_model: Path, tmp_path: Path, whole: tuple[Path, list[int]], start_worker: StartWorker
) -> None:
    order = order_for(demo_model, tmp_path, **NF4)
    for _ in range(5):  # writing takes 0.2 s: on a busy machine it may be over before the signal comes
        kill_while_writing(start_worker, order, tmp_path)
        if partials(tmp_path):
            break
        shutil.rmtree(tmp_path / "cache")
    assert partials(tmp_path)
    assert kept(tmp_path) == []
    loaded = load(demo_model, tmp_path, **NF4)
    assert not noted(loaded, READ)
    assert greedy(loaded) == whole[1]
    assert everything(tmp_path) == [kept(tmp_path)[0].key]


def test_a_disk_that_fills_up_while_writing_costs_a_note_alone(
    demo_model: Path, tmp_path: Path, start_worker: StartWorker
) -> None:
    worker = start_worker(code=FAILS_AT_THE_FILE)
    ready = worker.load(order_for(demo_model, tmp_path, **NF4))
    assert any("No quantized copy could be kept" in note for note in ready.report.notes)
    assert everything(tmp_path) == []


def test_a_worker_reads_the_copy_that_another_one_kept(
    demo_model: Path, whole: tuple[Path, list[int]], tmp_path: Path, start_worker: StartWorker
) -> None:
    order = order_for(demo_model, tmp_path, cache_dir=str(whole[0]), **NF4)
    ready = start_worker().load(order)
    assert any(READ in note for note in ready.report.notes)
    assert ready.report.layer_classes == {"Linear4bit": 210, "Linear": 1}


def test_two_processes_that_write_the_same_copy_leave_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.worker.quantized import load, NF4; "
        "from tests import checkpoints; load(checkpoints.llama(), Path(sys.argv[1]), **NF4)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(180) for process in both] == [0, 0]
    [copy] = kept(tmp_path)
    copies.check(copies.read(copy.path))
    assert everything(tmp_path) == [copy.key]


def test_an_unusable_copy_is_an_error_of_the_tree(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match="cannot be read"):
        copies.read(tmp_path)
