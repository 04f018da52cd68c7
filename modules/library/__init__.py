"""What is in the model folders, and what each model is. Read from names and headers; no ML package is imported."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from modules.checkpoint import WEIGHT_FILES, python_files
from modules.errors import BrokenCheckpoint, ModelNotFound, NotAModel, UnsupportedModel
from modules.library.facts import CodeFile, ModelFacts, read_facts
from modules.library.scan import FileFormat, Model, Scanner, free_name
from modules.library.tensors import TensorInfo

__all__ = ["CodeFile", "FileFormat", "Library", "Model", "ModelFacts", "TensorInfo", "default_hf_cache"]


def default_hf_cache() -> Path:
    """Where huggingface_hub keeps its models: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


_LONGEST_NAME = 255  # bytes that file systems take; beyond it looking is an error


class Library:
    """The models under ``roots`` and in the Hugging Face cache. May be used from any thread."""

    def __init__(self, roots: Sequence[Path], hf_cache: Path | None = None) -> None:
        self.roots = tuple(Path(os.path.abspath(root)) for root in roots)
        self.hf_cache = hf_cache
        self._scanner = Scanner()
        self._added: tuple[Model, ...] = ()
        self._facts: dict[Path, tuple[object, ModelFacts]] = {}
        self._lock = threading.Lock()

    def models(self) -> list[Model]:
        """Every model that can be offered, by name, whatever the case. Looks at the disk each time."""
        with self._lock:
            return self._scan()

    def _scan(self) -> list[Model]:
        added = [model for model in self._added if os.path.lexists(model.path)]
        return self._scanner.scan(self.roots, self.hf_cache, added)

    def add(self, model: Model) -> Model:
        """Offer a model that :meth:`find` took by its path from now on; the model as it is offered.

        One that is offered already, or that lies in a root and is not offered, is left as it is.
        """
        with self._lock:
            known = self._scan()
            listed = next((other for other in known if other.path == model.path), None)
            if listed is not None or model.root in self.roots:
                return listed or model
            name = free_name(model.name, model.root.name, {other.name: other for other in known})
            added = replace(model, name=name)
            self._added = (*self._added, added)
            return added

    def find(self, name: str, *, allow_paths: bool = False) -> Model:
        """The model of that name, or the one in the roots that lies at that path. Raises ModelNotFound.

        With ``allow_paths`` any path is taken; raises NotAModel or UnsupportedModel where no model can be there.
        A folder that lies in a root but is not offered (unfinished, broken) is found too, so that its facts
        can say what is wrong with it.
        """
        models = self.models()
        by_name = {model.name: model for model in models}
        if name in by_name:
            return by_name[name]
        if name and "\0" not in name and (allow_paths or ".." not in PurePosixPath(name).parts):
            path = Path(os.path.abspath(os.path.expanduser(name)))
            if (listed := next((model for model in models if model.path == path), None)) is not None:
                return listed
            if (unlisted := self._unlisted(name)) is not None:
                return unlisted
            if allow_paths and os.path.lexists(path):
                return _at(path)
        raise self._not_found(name, list(by_name))

    def _unlisted(self, name: str) -> Model | None:
        """A folder or file of that name in a root that is not among the models."""
        parts = PurePosixPath(name).parts
        if not 1 <= len(parts) <= 3 or any(part.startswith((".", "/")) or "\\" in part for part in parts):
            return None
        if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME for part in parts):
            return None
        for root in self.roots:
            path = root.joinpath(*parts)
            if path.suffix == ".gguf" and path.is_file():
                return Model(name, path, root, "gguf")
            if len(parts) <= 2 and path.is_dir() and not _holds_ggufs(path):
                return Model(name, path, root, _format_of(path))
        return None

    def _not_found(self, name: str, names: list[str]) -> ModelNotFound:
        inside = [known for known in names if known.startswith(f"{name}/")]
        by_case = {known.casefold(): known for known in names}
        near = inside[:3] or [by_case[m] for m in difflib.get_close_matches(name.casefold(), by_case, n=3, cutoff=0.4)]
        places = ", ".join(str(root) for root in self.roots) or "no model folder"
        return ModelNotFound(
            f"There is no model {name!r} in {places}.", f"Did you mean {' or '.join(near)}?" if near else ""
        )

    def identity(self, model: Model) -> object:
        """What changes when the model's files do; equal to nothing where they cannot be looked at. Opens none."""
        return _identity(model)

    def facts(self, model: Model | str) -> ModelFacts:
        """What the model is; read again when its files have changed. Raises what :func:`read_facts` raises."""
        found = self.find(model) if isinstance(model, str) else model
        identity = _identity(found)
        with self._lock:
            known = self._facts.get(found.path)
        if known and known[0] == identity:
            return known[1] if known[1].model == found else replace(known[1], model=found)
        facts = read_facts(found)
        with self._lock:
            self._facts[found.path] = (identity, facts)
        return facts


def _at(path: Path) -> Model:
    """The model at a path that lies in no root, called by its last part."""
    if not path.is_dir() and path.suffix != ".gguf":
        raise UnsupportedModel(f"{path.name} is neither a folder nor a .gguf file.", "Name the model's folder.")
    if path.is_dir() and (files := _holds_ggufs(path)):
        if len(files) > 1:
            raise NotAModel(
                f"{path.name} holds {len(files)} .gguf files.", f"Name one of them: {', '.join(files[:5])}."
            )
        path = path / files[0]
    return Model(path.name, path, path.parent, _format_of(path))


def _names(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error.strerror}.", "Check its permissions.") from None


def _holds_ggufs(folder: Path) -> list[str]:
    """The .gguf files of a folder that holds no other model."""
    names = _names(folder)
    return [] if "config.json" in names else sorted(name for name in names if name.endswith(".gguf"))


def _format_of(path: Path) -> FileFormat:
    if not path.is_dir():
        return "gguf"
    names = _names(path)
    only_pickles = names.isdisjoint(WEIGHT_FILES["safetensors"]) and not names.isdisjoint(WEIGHT_FILES["pytorch"])
    return "pytorch" if only_pickles else "safetensors"


def _identity(model: Model) -> object:
    """What changes when the model's files do, of everything that facts are read from.

    The time of the last change of a file's data or attributes (ctime) cannot be set back, as its modification
    time can: Python files that were swapped for others of the same size are seen. Of a folder inside there is its
    own time, which changes when a file in it is put in the place of another.
    """
    try:
        if not model.path.is_dir():
            return _stamp(model.path)
        with os.scandir(model.path) as entries:
            found = list(entries)
        deep = python_files(model.path) if any(entry.is_dir(follow_symlinks=False) for entry in found) else ()
        return {entry.name: _stamp(entry) for entry in found}, {path: _stamp(path) for path in deep}
    except OSError:
        return object()  # equal to nothing: read anew


def _stamp(path: Path | os.DirEntry[str]) -> tuple[int, int, int, int]:
    try:
        stat = path.stat()
    except OSError:  # a link that cannot be followed is a file that is not read
        stat = os.lstat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
