"""What is in the model folders, and what each model is. Read from names and headers; no ML package is imported."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from modules.checkpoint import WEIGHT_FILES
from modules.errors import ModelNotFound
from modules.library.facts import CodeFile, ModelFacts, TensorInfo, read_facts
from modules.library.scan import FileFormat, Model, Scanner

__all__ = ["CodeFile", "FileFormat", "Library", "Model", "ModelFacts", "TensorInfo", "default_hf_cache"]


def default_hf_cache() -> Path:
    """Where huggingface_hub keeps its models: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


class Library:
    """The models under ``roots`` and in the Hugging Face cache. May be used from any thread."""

    def __init__(self, roots: Sequence[Path], hf_cache: Path | None = None) -> None:
        self.roots = tuple(roots)
        self.hf_cache = hf_cache
        self._scanner = Scanner()
        self._facts: dict[Path, tuple[object, ModelFacts]] = {}
        self._lock = threading.Lock()

    def models(self) -> list[Model]:
        """Every model that can be offered, by name, whatever the case. Looks at the disk each time."""
        with self._lock:
            return self._scanner.scan(self.roots, self.hf_cache)

    def find(self, name: str, *, allow_paths: bool = False) -> Model:
        """The model of that name; with ``allow_paths`` also the one at that path. Raises ModelNotFound.

        A folder that lies in a root but is not offered (unfinished, broken) is found too, so that its facts
        can say what is wrong with it.
        """
        models = self.models()
        for model in models:
            if model.name == name:
                return model
        if (unlisted := self._unlisted(name)) is not None:
            return unlisted
        if allow_paths and (path := Path(name).expanduser()).exists():
            return _at(path.resolve())
        near = difflib.get_close_matches(name, [model.name for model in models], n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else ""
        raise ModelNotFound(f"There is no model {name!r} in {', '.join(str(root) for root in self.roots)}.", hint)

    def _unlisted(self, name: str) -> Model | None:
        parts = PurePosixPath(name).parts
        usual = 1 <= len(parts) <= 2 and not any(part.startswith((".", "/")) or "\\" in part for part in parts)
        if not usual or "\0" in name:
            return None
        for root in self.roots:
            path = root.joinpath(*parts)
            if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
                return Model(name, path, root, _format_of(path))
        return None

    def facts(self, model: Model | str) -> ModelFacts:
        """What the model is; read again when its files have changed. Raises errors of the tree."""
        found = self.find(model) if isinstance(model, str) else model
        identity = _identity(found)
        with self._lock:
            known = self._facts.get(found.path)
        if known and known[0] == identity and known[1].model == found:
            return known[1]
        facts = read_facts(found)
        with self._lock:
            self._facts[found.path] = (identity, facts)
        return facts


def _at(path: Path) -> Model:
    return Model(path.name, path, path.parent, _format_of(path))


def _format_of(path: Path) -> FileFormat:
    if path.is_file():
        return "gguf"
    names = {entry.name for entry in path.iterdir()}
    only_pickles = names.isdisjoint(WEIGHT_FILES["safetensors"]) and not names.isdisjoint(WEIGHT_FILES["pytorch"])
    return "pytorch" if only_pickles else "safetensors"


def _identity(model: Model) -> object:
    """What changes when the model's files do: names, sizes and times, of everything that facts are read from."""
    try:
        if model.path.is_file():
            stat = model.path.stat()
            return (stat.st_size, stat.st_mtime_ns)
        return tuple(
            sorted(
                (entry.name, (stat := entry.stat()).st_size, stat.st_mtime_ns)
                for entry in os.scandir(model.path)
                if entry.is_file()
            )
        )
    except OSError:
        return object()
