"""Models that are here: verified against what the Hub said, deleted at once, marked, compared."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.errors import Cancelled
from modules.hub import keeping
from modules.hub.keeping import Marks
from modules.hub.placing import read_record
from modules.hub.running import run
from tests.hub.test_running import QUICK, offered
from tests.hub_models import order_for, tiny_files, weights
from tests.hub_server import Hub


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Path:
    """A downloaded model."""
    order = order_for(hub, tmp_path)
    run(order, lambda stage, done: None, QUICK)
    return Path(order.target)


def test_every_kind_of_damage_is_found_and_named(model: Path) -> None:
    record = read_record(model)
    assert record is not None
    assert keeping.verify(model, record.files.values()).broken == {}
    (model / "config.json").unlink()
    (model / "tokenizer.json").write_bytes(b"short")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[1000] ^= 1
    (model / "model.safetensors").write_bytes(data)
    found = keeping.verify(model, record.files.values())
    assert found.checked == 5
    assert found.broken == {
        "config.json": "missing",
        "tokenizer.json": "5 bytes, not 5,002",
        "model.safetensors": "another content",
    }


def test_how_far_a_verification_is_is_told(model: Path) -> None:
    record = read_record(model)
    assert record is not None
    told: list[keeping.Reading] = []
    found = keeping.verify(model, record.files.values(), told.append)
    assert [one.done_bytes for one in told] == sorted(one.done_bytes for one in told)
    assert {one.total_bytes for one in told} == {found.checked_bytes}
    assert told[-1].done_bytes == found.checked_bytes
    assert {one.name for one in told} == set(record.files)

    def end(_: keeping.Reading) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        keeping.verify(model, record.files.values(), end)


def test_a_deleted_model_is_offered_no_more_and_leaves_nothing(model: Path) -> None:
    root = model.parent
    assert keeping.size_of(model) > len(weights())
    keeping.remove(model, root)
    assert offered(root) == []
    assert not model.exists()
    assert not list((root / ".cache" / "removed").iterdir())


def test_of_a_link_only_the_link_goes(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "roots"
    other.mkdir()
    (other / "linked").symlink_to(model, target_is_directory=True)
    keeping.remove(other / "linked", other)
    assert not (other / "linked").is_symlink()
    assert (model / "config.json").is_file()


def test_the_last_gguf_file_takes_its_folder_along(hub: Hub, tmp_path: Path) -> None:
    hub.repos["user/model"].branches["main"] = {"a.gguf": b"GGUF" + bytes(5000), "b.gguf": b"GGUF" * 2000}
    for name in ("a.gguf", "b.gguf"):
        run(order_for(hub, tmp_path, pattern=name), lambda stage, done: None, QUICK)
    folder = tmp_path / "user_model"
    keeping.remove(folder / "a.gguf", tmp_path)
    record = read_record(folder)
    assert record is not None
    assert set(record.files) == {"b.gguf"}
    keeping.remove(folder / "b.gguf", tmp_path)
    assert not folder.exists()


def test_with_the_last_gguf_file_goes_nothing_that_was_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.repos["user/model"].branches["main"] = {"a.gguf": b"GGUF" * 2000, "README.md": b"x", "docs/more.md": b"y"}
    run(order_for(hub, tmp_path, pattern="*"), lambda stage, done: None, QUICK)
    folder = tmp_path / "user_model"
    (folder / "my-prompts.txt").write_text("mine")
    keeping.remove(folder / "a.gguf", tmp_path)
    assert [path.name for path in folder.iterdir()] == ["my-prompts.txt"]


def test_of_an_owners_last_model_the_owners_folder_goes_where_nothing_is_in_it(tmp_path: Path) -> None:
    for name in ("org/model", "other/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name in ("org/model", "other/model"):
        keeping.remove(tmp_path / name, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["other"]
    assert (tmp_path / "other" / "notes.txt").is_file()


@pytest.mark.parametrize("named", ["../outside.txt", "/etc/hostname", ""])
def test_a_record_that_names_files_elsewhere_is_none(model: Path, named: str) -> None:
    """As one may that a copied folder brings: what it names is verified, and removed with the model."""
    record = json.loads((model / ".download.json").read_text())
    record["files"]["config.json"]["name"] = named
    (model / ".download.json").write_text(json.dumps(record))
    assert read_record(model) is None


@pytest.mark.parametrize(
    ("key", "value"), [("commit", 5), ("repo", None), ("files", {"a": {"name": "a", "size": "b"}})]
)
def test_a_damaged_record_is_none(model: Path, key: str, value: object) -> None:
    record = json.loads((model / ".download.json").read_text())
    (model / ".download.json").write_text(json.dumps({**record, key: value}))
    assert read_record(model) is None


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on another disk than ``tmp_path``: in memory."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other disk here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_model_on_another_disk_is_deleted(tmp_path: Path, other_disk: Path) -> None:
    """Of a folder of models to which a link leads."""
    (tmp_path / "hdd").symlink_to(other_disk, target_is_directory=True)
    (other_disk / "model").mkdir()
    for name in ("model/config.json", "single.gguf", "notes.txt"):
        (other_disk / name).write_text("x")
    keeping.remove(tmp_path / "hdd" / "model", tmp_path)
    keeping.remove(tmp_path / "hdd" / "single.gguf", tmp_path)
    assert [path.name for path in other_disk.iterdir()] == ["notes.txt"]
    left = other_disk / ".model.removed-0123abcd"  # by a server that was ended meanwhile
    left.mkdir()
    keeping.empty_trash(tmp_path)
    assert [path.name for path in other_disk.iterdir()] == ["notes.txt"]


def test_duplicates_are_named_and_links_are_none(model: Path, tmp_path: Path) -> None:
    copy, linked, other = (tmp_path / name for name in ("copy", "linked", "other"))
    for folder in (copy, linked, other):
        folder.mkdir()
    (copy / "model.safetensors").write_bytes(weights())
    os.link(model / "model.safetensors", linked / "model.safetensors")
    (other / "model.safetensors").write_bytes(weights(seed=7))
    models = {path.name: path for path in (model, copy, other)}
    told: list[keeping.Reading] = []
    [same] = keeping.duplicates(models, told.append)
    assert {one.total_bytes for one in told} == {3 * len(weights())}
    assert told[-1].name.startswith("other/")
    assert same.names == ("copy/model.safetensors", "user_model/model.safetensors")
    assert same.size_bytes == len(weights())
    assert keeping.duplicates({"user_model": model, "linked": linked}) == []


def test_what_the_record_says_is_not_read_again(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.repos["user/model"].branches["twin"] = {**tiny_files(), "README.md": b"another"}
    twin = order_for(hub, tmp_path, "user/model:twin")
    run(twin, lambda stage, done: None, QUICK)
    weights_file = Path(twin.target, "model.safetensors")
    weights_file.write_bytes(bytes(len(weights())))  # which nobody looks at: the record tells the hash
    assert len(keeping.duplicates({"a": model, "b": Path(twin.target)})) == 1


def test_marks_are_kept(tmp_path: Path) -> None:
    marks = Marks(tmp_path / ".cache" / "library.json")
    marks.set_favourite("b", True)
    marks.set_favourite("a", True)
    marks.set_favourite("b", False)
    marks.used("c", 1000.4)
    again = Marks(tmp_path / ".cache" / "library.json")
    assert again.favourites() == {"a"}
    assert again.last_used() == {"c": 1000.0}
    again.forget("c")
    assert again.last_used() == {}
    (tmp_path / ".cache" / "library.json").write_text("[")
    assert again.favourites() == frozenset()


@pytest.mark.parametrize("text", ["[1]", "null", '"x"', "{}", '{"favourites": {}, "last_used": []}', "[" * 100_000])
def test_marks_of_a_damaged_file_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "library.json").write_text(text)
    marks = Marks(tmp_path / "library.json")
    assert (marks.favourites(), marks.last_used()) == (frozenset(), {})
    marks.set_favourite("a", True)
    assert marks.favourites() == {"a"}


def test_of_damaged_marks_the_whole_ones_are_left(tmp_path: Path) -> None:
    times = '{"b": 5, "c": "soon", "d": null, "e": NaN, "f": 1e999, "g": -1, "h": true, "i": ' + "9" * 400 + "}"
    (tmp_path / "library.json").write_text('{"favourites": ["a", ["b"], 3, null], "last_used": ' + times + "}")
    marks = Marks(tmp_path / "library.json")
    assert (set(marks.favourites()), marks.last_used()) == ({"a"}, {"b": 5.0})
    marks.used("a", 7.2)
    marks.forget("b")
    assert (set(marks.favourites()), marks.last_used()) == ({"a"}, {"a": 7.0})
