"""Which models are offered, under which names, and which are not. The weights here are only names and sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modules.library import Library
from tests import checkpoints

LONG_AGO = 1_500_000_000.0


def make(folder: Path, *names: str, config: bool = True) -> Path:
    """A folder with files of those names, each with a byte in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    if config:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def index(folder: Path, *shards: str, name: str = "model.safetensors.index.json") -> None:
    weight_map = {f"layer.{number}": shard for number, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def names(*roots: Path, hf_cache: Path | None = None) -> list[str]:
    return [model.name for model in Library(roots, hf_cache).models()]


def test_every_form_of_model_is_offered(tmp_path: Path) -> None:
    make(tmp_path / "plain", "model.safetensors")
    make(tmp_path / "pickle", "pytorch_model.bin")
    make(tmp_path / "org" / "nested-v0.1", "model.safetensors")
    make(tmp_path / "quants", "q4.gguf", "q8.gguf", config=False)
    make(tmp_path / "org" / "q", "one.gguf", config=False)
    make(tmp_path, "single.gguf", config=False)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index(make(tmp_path / "sharded", *shards), *shards)
    found = {model.name: model.file_format for model in Library([tmp_path]).models()}
    assert found == {
        "org/nested-v0.1": "safetensors",
        "org/q/one.gguf": "gguf",
        "pickle": "pytorch",
        "plain": "safetensors",
        "quants/q4.gguf": "gguf",
        "quants/q8.gguf": "gguf",
        "sharded": "safetensors",
        "single.gguf": "gguf",
    }
    assert list(found) == sorted(found)


def test_names_are_sorted_whatever_the_case(tmp_path: Path) -> None:
    for name in ("b", "A", "C", "a"):
        make(tmp_path / name, "model.safetensors")
    assert names(tmp_path) == ["A", "a", "b", "C"]


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    make(tmp_path / "both", "model.safetensors", "pytorch_model.bin")
    assert Library([tmp_path]).find("both").file_format == "safetensors"


def test_weights_under_the_name_that_config_gives_them(tmp_path: Path) -> None:
    folder = make(tmp_path / "own", "own.safetensors", config=False)
    (folder / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    other = make(tmp_path / "unnamed", "own.safetensors")
    assert other.is_dir()
    assert names(tmp_path) == ["own"]


@pytest.mark.parametrize(
    "files",
    [
        (),
        ("tokenizer.json",),
        ("model.safetensors.part",),
        ("model.safetensors.incomplete",),
        ("model.safetensors", "tokenizer.json.aria2"),
        ("adapter_config.json", "adapter_model.safetensors"),
        ("model_index.json", "model.safetensors"),
        ("tf_model.h5",),
        ("mmproj-f16.gguf",),
        ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf"),
    ],
)
def test_what_is_no_whole_model_is_not_offered(tmp_path: Path, files: tuple[str, ...]) -> None:
    make(tmp_path / "thing", *files)
    assert names(tmp_path) == []


def test_the_parts_of_an_image_pipeline_are_not_offered(tmp_path: Path) -> None:
    pipeline = make(tmp_path / "pipeline", "model_index.json", config=False)
    make(pipeline / "text_encoder", "model.safetensors")
    assert names(tmp_path) == []


def test_hidden_and_unfinished_folders_are_not_offered(tmp_path: Path) -> None:
    for name in (".cache", ".hidden", "coming.partial"):
        make(tmp_path / name, "model.safetensors")
        make(tmp_path / "org" / name, "model.safetensors")
    assert names(tmp_path) == []


@pytest.mark.parametrize("missing", ["absent", "empty"])
def test_a_shard_that_is_missing_or_empty(tmp_path: Path, missing: str) -> None:
    folder = make(tmp_path / "sharded", "a.safetensors")
    index(folder, "a.safetensors", "b.safetensors")
    if missing == "empty":
        (folder / "b.safetensors").touch()
    library = Library([tmp_path])
    assert library.models() == []
    (folder / "b.safetensors").write_bytes(b"x")
    assert [model.name for model in library.models()] == ["sharded"]


@pytest.mark.parametrize("file", ["model.safetensors", "q4.gguf"])
def test_a_file_that_grows_is_seen_though_its_folder_does_not_change(tmp_path: Path, file: str) -> None:
    folder = make(tmp_path / "growing", config=file == "model.safetensors")
    (folder / file).touch()
    os.utime(folder, (LONG_AGO, LONG_AGO))
    library = Library([tmp_path])
    assert library.models() == []
    (folder / file).write_bytes(b"x")
    os.utime(folder, (LONG_AGO, LONG_AGO))
    assert len(library.models()) == 1


def test_changes_are_seen_without_a_restart(tmp_path: Path) -> None:
    library = Library([tmp_path])
    assert library.models() == []
    make(tmp_path / "new", "model.safetensors")
    assert [model.name for model in library.models()] == ["new"]
    make(tmp_path / "new", "model.safetensors.part")  # within the same tick of the clock, most likely
    assert library.models() == []
    shutil.rmtree(tmp_path / "new")
    make(tmp_path / "org" / "other", "model.safetensors")
    assert [model.name for model in library.models()] == ["org/other"]


def test_a_folder_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "old", "model.safetensors")
    os.utime(folder, (LONG_AGO, LONG_AGO))
    library = Library([tmp_path])
    assert len(library.models()) == 1
    (folder / "model.safetensors").unlink()
    os.utime(folder, (LONG_AGO, LONG_AGO))  # as nothing but a test does
    assert len(library.models()) == 1


def test_links_to_folders_and_files(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere" / "m", "model.safetensors")
    root = tmp_path / "models"
    root.mkdir()
    (root / "linked").symlink_to(elsewhere)
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "loop").symlink_to(root)
    target = tmp_path / "blob"
    linked = make(root / "waiting")
    (linked / "model.safetensors").symlink_to(target)
    library = Library([root])
    assert "linked" in [model.name for model in library.models()]
    assert "waiting" not in [model.name for model in library.models()]
    target.write_bytes(b"x")
    assert "waiting" in [model.name for model in library.models()]


def test_a_link_that_cannot_be_followed_hides_nothing_else(tmp_path: Path) -> None:
    """As one does that leads to a mount that is gone."""
    models = tmp_path / "models"
    make(models / "good", "model.safetensors")
    make(models / "org" / "inner", "model.safetensors")
    for folder in (models, models / "org", models / "good"):
        (folder / "loop").symlink_to(folder / "loop")
    assert names(models) == ["good", "org/inner"]
    assert Library([models]).find("good").path == models / "good"


def test_what_a_link_leads_to_is_offered_when_it_is_there(tmp_path: Path) -> None:
    """A mount that comes back changes nothing in the folder of the link."""
    library, org = Library([tmp_path / "models"]), tmp_path / "models" / "org"
    org.mkdir(parents=True)
    (org / "far").symlink_to(tmp_path / "mount")
    os.utime(org, (LONG_AGO, LONG_AGO))
    assert library.models() == []
    make(tmp_path / "mount", "model.safetensors")
    assert [model.name for model in library.models()] == ["org/far"]


def test_a_name_taken_twice_tells_its_folder(tmp_path: Path) -> None:
    roots = [tmp_path / "first", tmp_path / "disk", tmp_path / "other" / "disk"]
    for root in roots:
        make(root / "same", "model.safetensors")
    library = Library(roots)
    assert [model.name for model in library.models()] == ["same", "same (disk)", "same (disk) 2"]
    assert library.find("same").path == roots[0] / "same"
    assert library.find("same (disk)").path == roots[1] / "same"
    assert library.find("same (disk) 2").path == roots[2] / "same"


def test_roots_that_cannot_be_read_are_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert names(tmp_path / "nowhere", tmp_path / "file") == []


class TestHubCache:
    def repository(self, cache: Path, name: str, *files: str, main: str = "abc") -> Path:
        """A repository as huggingface_hub keeps it: blobs, links to them, and a branch."""
        repository = cache / name
        snapshot = repository / "snapshots" / "abc"
        make(repository / "blobs", config=False)
        snapshot.mkdir(parents=True)
        for file in ("config.json", *files):
            blob = repository / "blobs" / f"hash-of-{file}"
            blob.write_text("{}")
            (snapshot / file).symlink_to(blob)
        if main:
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(main)
        return snapshot

    def test_models_are_offered_in_place(self, tmp_path: Path) -> None:
        snapshot = self.repository(tmp_path, "models--org--name--x", "model.safetensors")
        self.repository(tmp_path, "models--gpt2", "pytorch_model.bin")
        self.repository(tmp_path, "models--org--gguf", "q4.gguf")
        self.repository(tmp_path, "datasets--org--data", "model.safetensors")
        library = Library([], tmp_path)
        assert [model.name for model in library.models()] == ["gpt2", "org/gguf/q4.gguf", "org/name--x"]
        assert library.find("org/name--x").path == snapshot

    def test_incomplete_ones_are_not(self, tmp_path: Path) -> None:
        self.repository(tmp_path, "models--org--config-only")
        snapshot = self.repository(tmp_path, "models--org--no-blob", "model.safetensors")
        (snapshot / "model.safetensors").resolve().unlink()
        self.repository(tmp_path, "models--org--other-commit", "model.safetensors", main="def")
        assert names(hf_cache=tmp_path) == []

    def test_a_commit_fetched_by_its_hash_is_offered_where_it_is_the_only_one(self, tmp_path: Path) -> None:
        self.repository(tmp_path, "models--org--name", "model.safetensors", main="")
        assert names(hf_cache=tmp_path) == ["org/name"]

    def test_a_model_of_the_folders_keeps_its_name(self, tmp_path: Path) -> None:
        make(tmp_path / "models" / "org" / "name", "model.safetensors")
        self.repository(tmp_path / "hub", "models--org--name", "model.safetensors")
        assert names(tmp_path / "models", hf_cache=tmp_path / "hub") == [
            "org/name",
            "org/name (Hugging Face cache)",
        ]

    def test_no_cache(self, tmp_path: Path) -> None:
        assert names(hf_cache=tmp_path / "nowhere") == []

    @pytest.mark.parametrize(
        "variables",
        [{}, {"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b", "HF_HOME": "/a"}, {"XDG_CACHE_HOME": "/c"}, {"HF_HOME": "~/d"}],
    )
    def test_it_is_where_huggingface_hub_looks(self, variables: dict[str, str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
        code = (
            "import huggingface_hub.constants as c; from modules.library import default_hf_cache as d; "
            "print(c.HF_HUB_CACHE, d(), sep='\\n')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True
        )
        theirs, ours = done.stdout.splitlines()
        assert ours == theirs


def test_real_checkpoints_are_offered(demo_model: Path) -> None:
    sharded, pytorch = checkpoints.sharded(), checkpoints.pytorch()
    library = Library([demo_model.parent, sharded.parent])
    found = {model.name: model.file_format for model in library.models()}
    assert found[demo_model.name] == "safetensors"
    assert found[pytorch.name] == "pytorch"
    assert found[sharded.name] == "safetensors"
