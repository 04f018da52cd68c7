"""Damaged, incomplete and unsafe files, each refused by name before anything is loaded."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modules.checkpoint import check_files, code_hashes, read_json, safetensors_header, weight_files
from modules.errors import BrokenCheckpoint, NotAModel, UnsafeCheckpoint
from tests import checkpoints

INDEX = "model.safetensors.index.json"


def point_index_at(folder: Path, name: str) -> None:
    """Make the index name another file for its first tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))


def test_whole_checkpoints_pass() -> None:
    check_files(checkpoints.llama(), "safetensors")
    check_files(checkpoints.sharded(), "safetensors")
    check_files(checkpoints.pytorch(), "pytorch")
    check_files(checkpoints.gguf_file(), "gguf")


def test_the_header_names_every_tensor() -> None:
    header = safetensors_header(checkpoints.llama() / "model.safetensors")
    assert header["model.embed_tokens.weight"]["shape"] == [checkpoints.VOCABULARY, 128]
    assert header["model.embed_tokens.weight"]["dtype"] == "BF16"


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "..\\secret.safetensors", "C:\\x.safetensors", "a/../../b", ""]
)
def test_an_index_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = checkpoints.copied(checkpoints.sharded(), tmp_path / "model")
    point_index_at(folder, name)
    with pytest.raises(UnsafeCheckpoint, match="outside the model's folder"):
        check_files(folder, "safetensors")


def test_a_config_that_names_weights_outside_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    with pytest.raises(UnsafeCheckpoint, match=r"config\.json in model names a file outside"):
        check_files(folder, "safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_a_config_names_are_found(tmp_path: Path, name: str) -> None:
    source = checkpoints.sharded() if name.endswith("index.json") else checkpoints.llama()
    folder = checkpoints.copied(source, tmp_path / "model")
    expected = [file.stat().st_size for file in weight_files(folder, "safetensors")]
    (folder / name).rename(folder / f"own-{name}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": f"own-{name}"}))
    assert [file.stat().st_size for file in weight_files(folder, "safetensors")] == expected
    check_files(folder, "safetensors")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.sharded(), tmp_path / "model")
    gone = weight_files(folder, "safetensors")[1]
    gone.unlink()
    with pytest.raises(BrokenCheckpoint, match=gone.name):
        check_files(folder, "safetensors")


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.sharded(), tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.none.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=r"lacks model\.none\.weight"):
        check_files(folder, "safetensors")


@pytest.mark.parametrize("keep", [100_000, 500, 4, 0])
def test_a_file_cut_short_is_named_with_its_size(tmp_path: Path, keep: int) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BrokenCheckpoint, match=rf"model\.safetensors .*{keep:,} bytes"):
        check_files(folder, "safetensors")


def test_a_header_of_noise_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((50).to_bytes(8, "little") + b"x" * 200)
    with pytest.raises(BrokenCheckpoint, match="header"):
        safetensors_header(file)


@contextmanager
def at_most(most_bytes: int) -> Iterator[None]:
    """Fails where more memory than that is taken meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


def write_header(file: Path, header: object) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return file


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": ["x", 1_000_000]},  # which would be multiplied into a text of so many letters
        {"shape": [[0], 1_000_000]},
        {"shape": [True]},
        {"shape": [1.0]},
        {"shape": [-1, -1]},
        {"shape": [2**70], "dtype": "ZZ"},
        {"shape": [1] * 17},
        {"shape": 5},
        {"shape": "1"},
        {"shape": None, "dtype": "ZZ"},
        {"dtype": 32},
        {"dtype": ["F32"]},
        {"data_offsets": [0, float("inf")], "dtype": "ZZ"},
        {"data_offsets": [4, 0], "dtype": "ZZ"},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": 4},
    ],
    ids=str,
)
def test_a_tensor_that_makes_no_sense_is_damage(tmp_path: Path, wrong: dict[str, Any]) -> None:
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert safetensors_header(write_header(tmp_path / "good.safetensors", {"a": good, "__metadata__": {"k": "v"}}))
    file = write_header(tmp_path / "model.safetensors", {"a": good | wrong})
    with at_most(1_000_000), pytest.raises(BrokenCheckpoint, match=r"header of model\.safetensors is damaged"):
        safetensors_header(file)


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_tensor_without_its_type_shape_or_place_is_damage(tmp_path: Path, missing: str) -> None:
    entry = {"dtype": "ZZ", "shape": [1], "data_offsets": [0, 1]}
    del entry[missing]
    with pytest.raises(BrokenCheckpoint, match="is damaged"):
        safetensors_header(write_header(tmp_path / "model.safetensors", {"a": entry}))


def test_json_that_is_nested_too_deep_is_damage(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / "config.json").write_bytes(b'{"a":' + deep + b"}")
    with pytest.raises(BrokenCheckpoint, match=r"config\.json .* nested too deep"):
        read_json(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(BrokenCheckpoint, match="is damaged"):
        safetensors_header(tmp_path / "model.safetensors")


def test_of_a_file_of_any_length_little_is_read(tmp_path: Path) -> None:
    """The files are sparse: so long, and nothing in them."""
    for name in ("config.json", "modeling.py", "model.safetensors"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 80_000_000)
    with at_most(1_000_000):
        with pytest.raises(BrokenCheckpoint, match=r"config\.json in .* has 80,000,000 bytes"):
            read_json(tmp_path / "config.json")
        with pytest.raises(BrokenCheckpoint, match=r"Python files of .* have 80,000,000 bytes"):
            code_hashes(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write((90_000_000).to_bytes(8, "little"))
    os.truncate(tmp_path / "model.safetensors", 1000)
    with at_most(1_000_000), pytest.raises(BrokenCheckpoint, match="cut short"):
        safetensors_header(tmp_path / "model.safetensors")


def test_a_pytorch_file_cut_short_is_named(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.pytorch(), tmp_path / "model")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-70_000])
    with pytest.raises(BrokenCheckpoint, match=r"pytorch_model\.bin is cut short"):
        check_files(folder, "pytorch")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(BrokenCheckpoint, match="Git LFS pointer"):
        check_files(folder, "safetensors")


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    (folder / "config.json").write_text("{not json")
    with pytest.raises(BrokenCheckpoint, match=r"config\.json in model is not JSON"):
        check_files(folder, "safetensors")


def test_a_folder_without_weights_or_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match=r"no config\.json"):
        check_files(tmp_path, "safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotAModel, match=r"neither model\.safetensors"):
        check_files(tmp_path, "safetensors")


def test_links_to_another_folder_are_followed(tmp_path: Path) -> None:
    """A download cache's snapshot is a folder of links into its blobs."""
    for file in checkpoints.sharded().iterdir():
        (tmp_path / file.name).symlink_to(file)
    check_files(tmp_path, "safetensors")
