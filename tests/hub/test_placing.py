"""Where a download's files come to: beside what is there, in its place, or from another program's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from modules.hub import placing
from modules.hub.job import Order
from modules.hub.placing import read_record
from tests.hub.test_running import assert_whole, fetch
from tests.hub_models import names_in, order_for, tiny_files, weights
from tests.hub_server import Hub, bytes_of


def test_what_somebody_put_into_the_folder_stays_as_it_is(hub: Hub, tmp_path: Path) -> None:
    """Links to files and folders, also those that lead nowhere, and empty folders; through an update."""
    fetch(order_for(hub, tmp_path))
    folder, elsewhere = tmp_path / "user_model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("mine")
    links = {
        "file": elsewhere / "notes.txt",
        "folder": elsewhere,
        "nowhere": tmp_path / "gone",
        "inside": Path("config.json"),
    }
    for name, leads in links.items():
        (folder / name).symlink_to(leads)
    (folder / "empty" / "too").mkdir(parents=True)
    (folder / "model.safetensors").unlink()
    fetch(order_for(hub, tmp_path))
    assert {name: (folder / name).readlink() for name in links} == links
    assert (folder / "inside").read_bytes() == (folder / "config.json").read_bytes()
    assert (folder / "empty" / "too").is_dir()
    assert (folder / "model.safetensors").is_file()


def test_what_the_hugging_face_cache_holds_is_linked(hub: Hub, tmp_path: Path) -> None:
    cache, models = tmp_path / "cache", tmp_path / "models"
    repo = hub.repos["user/model"]
    blobs = cache / "models--user--model" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / repo.hashes(weights())[0]
    blob.write_bytes(weights())
    order = order_for(hub, models, cache=str(cache))
    fetch(order)
    assert (models / "user_model" / "model.safetensors").samefile(blob)
    assert not hub.asked("model.safetensors", cdn=True)
    assert_whole(hub, order)


def test_who_edits_a_configuration_edits_no_other_programs_cache(hub: Hub, tmp_path: Path) -> None:
    cache, models = tmp_path / "cache", tmp_path / "models"
    content = bytes_of(tiny_files()["config.json"])
    blob = cache / "models--user--model" / "blobs" / hub.repos["user/model"].hashes(content)[1]
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    fetch(order_for(hub, models, cache=str(cache)))
    assert not hub.asked("/config.json")
    edited = models / "user_model" / "config.json"
    assert edited.read_bytes() == content
    with edited.open("r+b") as file:  # in place, as many editors write
        file.write(b"edited")
    assert blob.read_bytes() == content


def killed_between_the_two_renames(hub: Hub, root: Path) -> Order:
    """An update whose process ended there: the old model, with a file of its owner, is aside, and none in its place."""
    fetch(order_for(hub, root))
    hub.repos["user/model"].branches["main"]["model.safetensors"] = weights(seed=2)
    order = order_for(hub, root)
    target, partial = Path(order.target), Path(order.partial)
    (target / "notes.txt").write_text("mine")
    shutil.copytree(target, partial, ignore=shutil.ignore_patterns("model.safetensors", ".*"))
    (partial / "model.safetensors").write_bytes(weights(seed=2))
    target.rename(partial.with_name(f"{partial.name}.replaced"))
    return order


def test_a_kill_between_the_two_renames_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    order = killed_between_the_two_renames(hub, tmp_path)
    target, partial = Path(order.target), Path(order.partial)
    fetch(order)
    assert (target / "model.safetensors").read_bytes() == weights(seed=2)
    assert (target / "notes.txt").is_file()
    assert not [path for path in partial.parent.iterdir() if path.is_dir()]


def test_a_kill_between_the_two_renames_forgets_no_other_file(hub: Hub, tmp_path: Path) -> None:
    """What is taken along stays recorded, so that it can be verified."""
    files = {"a.gguf": b"GGUF" * 2000, "b.gguf": b"GGUF" * 3000}
    hub.repos["user/model"].branches["main"] = dict(files)
    fetch(order_for(hub, tmp_path, pattern="a.gguf"))
    order = order_for(hub, tmp_path, pattern="b.gguf")
    target, partial = Path(order.target), Path(order.partial)
    partial.mkdir()
    for name, content in files.items():
        (partial / name).write_bytes(content)
    target.rename(partial.with_name(f"{partial.name}.replaced"))
    fetch(order)
    record = read_record(target)
    assert record is not None
    assert set(record.files) == set(files) == names_in(target)


def test_what_nobody_goes_on_with_is_removed_in_time(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "downloads"
    for name in ("known", "old", "new"):
        (folder / name).mkdir(parents=True)
    (folder / "old.lock").touch()
    for name in ("known", "old", "old.lock"):
        os.utime(folder / name, (0, 0))
    placing.remove_forgotten(tmp_path, {"known"})
    assert {path.name for path in folder.iterdir()} == {"known", "new"}
