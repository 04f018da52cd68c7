"""What can be known of a model before its first byte of weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modules.errors import BrokenCheckpoint
from modules.hub import Hub as Remote
from modules.hub import choose, parse
from modules.hub.phantom import phantom
from modules.library import Model
from modules.library.facts import read_facts
from tests import checkpoints
from tests.hub_contents import bytes_of
from tests.hub_models import tiny_files
from tests.hub_server import Hub, Repo, folder_files


@pytest.mark.parametrize("kind", ["sharded", "pytorch", "gguf"])
def test_the_facts_are_those_of_the_whole_model(hub: Hub, tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        source = checkpoints.gguf_file()
        hub.repos["user/real"] = Repo({"main": {source.name: source}})
        real = Model("real", source, source.parent, "gguf")
    else:
        source = getattr(checkpoints, kind)()
        files = folder_files(source)
        if kind == "pytorch":
            files.pop("model.safetensors", None)
        hub.repos["user/real"] = Repo({"main": files})
        real = Model("real", source, source.parent, "safetensors" if kind == "sharded" else "pytorch")
    remote = Remote(hub.url)
    repository = remote.repository(parse("user/real"))
    choice = choose(repository.name, repository.files)
    folder = tmp_path / "phantom"
    phantom(remote, repository, choice.wanted, folder)
    path = folder / source.name if kind == "gguf" else folder
    known, true = read_facts(Model("real", path, folder, real.file_format)), read_facts(real)
    for name in ("architecture", "parameters", "dtype", "quantization_detail", "size_bytes", "context_tokens", "layers",
                 "tensors"):  # fmt: skip
        assert getattr(known, name) == getattr(true, name), name
    assert hub.sent_bytes() < max(0.2 * choice.size_bytes, 600_000)
    assert sum(file.stat().st_blocks * 512 for file in folder.rglob("*")) < max(0.2 * choice.size_bytes, 600_000)


def test_a_file_that_claims_to_be_long_is_not_made_long(hub: Hub, tmp_path: Path) -> None:
    """A configuration is read to its end, so that what was not fetched of it must not be there."""
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 3 << 20)
    hub.repos["user/long"] = Repo({"main": {**tiny_files(), "config.json": tmp_path / "config.json", "own.py": b"x=1"}})
    remote = Remote(hub.url)
    repository = remote.repository(parse("user/long"))
    phantom(remote, repository, repository.files, tmp_path / "phantom")
    assert {file.name for file in (tmp_path / "phantom").iterdir()} >= {"config.json", "own.py", "model.safetensors"}
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "phantom").iterdir()}
    assert (sizes["config.json"], sizes["own.py"]) == (0, 0)
    assert sizes["model.safetensors"] == len(bytes_of(tiny_files()["model.safetensors"]))
    with pytest.raises(BrokenCheckpoint, match=r"config\.json .* is not JSON"):
        read_facts(Model("long", tmp_path / "phantom", tmp_path, "safetensors"))


def test_a_long_list_of_tensors_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    """Of the largest models it has several megabytes."""
    files = folder_files(checkpoints.sharded())
    index = next(name for name in files if name.endswith(".index.json"))
    files[index] = bytes_of(files[index]) + b" " * (2 << 20)
    hub.repos["user/large"] = Repo({"main": files})
    remote = Remote(hub.url)
    repository = remote.repository(parse("user/large"))
    phantom(remote, repository, repository.files, tmp_path / "phantom")
    assert read_facts(Model("large", tmp_path / "phantom", tmp_path, "safetensors")).parameters
