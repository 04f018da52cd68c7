"""Models by the names and paths that people write, and what they are told where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modules.errors import BrokenCheckpoint, LoadstoneError, ModelNotFound, NotAModel, UnsupportedModel
from modules.library import Library
from tests.test_library import make


class TestFind:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "models"
        make(root / "SmolLM2-135M", "model.safetensors")
        make(root / "org" / "name", "model.safetensors")
        make(root / "quants", "q4.gguf", "q8.gguf", config=False)
        make(tmp_path / "outside", "model.safetensors")
        return root

    def test_by_name(self, root: Path) -> None:
        assert Library([root]).find("org/name").path == root / "org" / "name"

    def test_by_the_path_of_a_model_that_is_offered(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root.parent)
        for text in (str(root / "org" / "name"), f"{root}/org/name/", "models/org/name"):
            assert Library([root]).find(text).name == "org/name"

    @pytest.mark.parametrize(
        ("typed", "hint"),
        [
            ("smollm2-135m", "SmolLM2-135M"),
            ("SmolLM-135M", "SmolLM2-135M"),
            ("quants", "quants/q4.gguf or quants/q8.gguf"),
        ],
    )
    def test_the_nearest_names_are_in_the_hint(self, root: Path, typed: str, hint: str) -> None:
        with pytest.raises(ModelNotFound, match=f"There is no model '{typed}'") as error:
            Library([root]).find(typed)
        assert hint in error.value.hint

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            "../outside",
            "org/../../outside",
            "models/../outside",
            "..\\outside",
            "/etc",
            "a/b/c/d",
            "\0",
            "org/\0",
            ".hidden/x",
        ],
    )
    def test_names_do_not_leave_the_folders(self, root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root.parent)
        with pytest.raises(ModelNotFound):
            Library([root]).find(name)

    def test_paths_outside_only_where_they_are_allowed(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        outside = root.parent / "outside"
        with pytest.raises(ModelNotFound):
            Library([root]).find(str(outside))
        assert Library([root]).find(str(outside), allow_paths=True).path == outside
        monkeypatch.chdir(root)
        assert Library([root]).find("../outside", allow_paths=True).name == "outside"
        with pytest.raises(ModelNotFound):
            Library([root]).find(str(root / "nowhere"), allow_paths=True)

    def test_links_within_a_model_do_not_lead_out(self, root: Path) -> None:
        (root / "org" / "away").symlink_to(root.parent)
        library = Library([root])
        with pytest.raises(ModelNotFound):
            library.find("org/away/outside/x")
        with pytest.raises(ModelNotFound):
            library.find(str(root / "org" / "away" / "outside"))

    def test_a_path_to_gguf_files(self, root: Path) -> None:
        library = Library([])
        assert library.find(str(root / "quants" / "q4.gguf"), allow_paths=True).file_format == "gguf"
        with pytest.raises(NotAModel, match=r"2 \.gguf files") as error:
            library.find(str(root / "quants"), allow_paths=True)
        assert "q8.gguf" in error.value.hint
        (root / "quants" / "q8.gguf").unlink()
        assert library.find(str(root / "quants"), allow_paths=True).path == root / "quants" / "q4.gguf"

    @pytest.mark.parametrize(("folder", "name"), [("new", "new"), ("SmolLM2-135M", "SmolLM2-135M (elsewhere)")])
    def test_a_path_that_was_added_is_offered_under_a_free_name(self, root: Path, folder: str, name: str) -> None:
        library = Library([root])
        path = make(root.parent / "elsewhere" / folder, "model.safetensors")
        added = library.add(library.find(str(path), allow_paths=True))
        assert added.name == name
        assert library.add(added) == added
        make(root / "new", "model.safetensors")  # a later one does not take its name away
        assert library.find(name).path == path
        assert {model.path for model in library.models()} >= {path, root / "new", root / "SmolLM2-135M"}
        assert len({model.name for model in library.models()}) == len(library.models())
        shutil.rmtree(path)
        assert path not in {model.path for model in library.models()}

    def test_what_is_offered_already_is_not_added(self, root: Path) -> None:
        library = Library([root])
        for model in (*library.models(), library.find(str(make(root / "broken")), allow_paths=True)):
            before = library.models()
            assert library.add(model) == model
            assert library.models() == before

    def test_a_path_to_another_file(self, root: Path) -> None:
        with pytest.raises(UnsupportedModel, match=r"model\.safetensors is neither"):
            Library([]).find(str(root / "org" / "name" / "model.safetensors"), allow_paths=True)


@pytest.mark.parametrize(
    ("files", "config", "kind", "words"),
    [
        ((), False, NotAModel, "is empty"),
        (("model.safetensors",), False, NotAModel, "no config.json"),
        (("tokenizer.json",), True, NotAModel, "neither model.safetensors"),
        (("adapter_config.json",), False, NotAModel, "is a LoRA"),
        (("model_index.json",), False, NotAModel, "image pipeline"),
        (("model.safetensors.part",), True, BrokenCheckpoint, "not finished: model.safetensors.part"),
        (("tf_model.h5",), True, UnsupportedModel, "TensorFlow"),
        (("consolidated.00.pth",), True, UnsupportedModel, "original PyTorch"),
    ],
)
def test_what_is_not_offered_is_explained_when_it_is_asked_for(
    tmp_path: Path, files: tuple[str, ...], config: bool, kind: type[LoadstoneError], words: str
) -> None:
    make(tmp_path / "thing", *files, config=config)
    library = Library([tmp_path])
    assert library.models() == []
    with pytest.raises(kind, match=words) as error:
        library.facts("thing")
    assert error.value.kind == kind.kind
    assert error.value.hint
