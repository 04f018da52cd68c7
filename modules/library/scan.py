"""Which models lie in the model folders. Names and sizes only: nothing is opened but shard indexes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.checkpoint import WEIGHT_FILES

FileFormat = Literal["safetensors", "pytorch", "gguf"]
_UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".tmp")
_NOT_A_MODEL = frozenset({"adapter_config.json", "model_index.json"})  # a LoRA, a diffusers pipeline


@dataclass(frozen=True)
class Model:
    """One model on disk. ``path`` is the folder, or the ``.gguf`` file."""

    name: str
    path: Path
    root: Path
    file_format: FileFormat


@dataclass(frozen=True)
class _Folder:
    """What a folder holds: a model of its own, GGUF files, folders to look into."""

    file_format: FileFormat | None = None
    gguf: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    settled: bool = True  # False: a file may still grow, which the folder's time does not show


class Scanner:
    """Lists models, and remembers each folder until its modification time changes."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, _Folder]] = {}

    def scan(self, roots: Sequence[Path], hf_cache: Path | None) -> list[Model]:
        """Every model under the roots and in the Hugging Face cache, by name; a name taken twice tells its root."""
        found: dict[str, Model] = {}
        for root in roots:
            for model in self._under(root):
                name = model.name if model.name not in found else f"{model.name} ({root.name})"
                found.setdefault(name, Model(name, model.path, root, model.file_format))
        for model in self._cached_hub(hf_cache) if hf_cache else ():
            found.setdefault(model.name, model)
        return sorted(found.values(), key=lambda model: (model.name.casefold(), model.name))

    def _under(self, root: Path) -> Iterator[Model]:
        try:
            entries = list(os.scandir(root))
        except OSError:
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith(_UNFINISHED):
                continue
            if entry.name.endswith(".gguf"):
                if _size(entry.path) > 0:
                    yield Model(entry.name, Path(entry.path), root, "gguf")
                continue
            yield from self._in_folder(entry.path, entry.name, root, deeper=True)

    def _in_folder(self, path: str, name: str, root: Path, *, deeper: bool) -> Iterator[Model]:
        folder = self._look(path)
        if folder.file_format:
            yield Model(name, Path(path), root, folder.file_format)
        for file in folder.gguf:
            yield Model(f"{name}/{file}", Path(path, file), root, "gguf")
        if deeper and not folder.file_format:
            for inner in folder.folders:
                yield from self._in_folder(os.path.join(path, inner), f"{name}/{inner}", root, deeper=False)

    def _look(self, path: str) -> _Folder:
        try:
            changed = os.stat(path).st_mtime_ns
            known = self._seen.get(path)
            if known and known[0] == changed:
                return known[1]
            folder = _look_into(path)
        except OSError:
            return _Folder()
        if folder.settled:
            self._seen[path] = (changed, folder)
        return folder

    def _cached_hub(self, hf_cache: Path) -> Iterator[Model]:
        """Models of the Hugging Face cache: the commit that ``main`` points to, or the only one."""
        try:
            entries = [entry for entry in os.scandir(hf_cache) if entry.name.startswith("models--")]
        except OSError:
            return
        for entry in entries:
            snapshot = _snapshot(Path(entry.path))
            if snapshot is not None:
                name = entry.name.removeprefix("models--").replace("--", "/", 1)
                yield from self._in_folder(str(snapshot), name, hf_cache, deeper=False)


def _snapshot(repository: Path) -> Path | None:
    try:
        commit = (repository / "refs" / "main").read_text().strip()
        return repository / "snapshots" / commit
    except OSError:
        pass
    try:
        commits = sorted((repository / "snapshots").iterdir())
    except OSError:
        return None
    return commits[0] if len(commits) == 1 else None


def _look_into(path: str) -> _Folder:
    with os.scandir(path) as entries:
        files = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
    folders = tuple(sorted(name for name, entry in files.items() if "." not in name[-5:] and entry.is_dir()))
    if any(name.endswith(_UNFINISHED) for name in files):
        return _Folder(settled=False)
    gguf = tuple(sorted(name for name in files if name.endswith(".gguf") and _size(files[name].path) > 0))
    if "config.json" not in files or not _NOT_A_MODEL.isdisjoint(files):
        return _Folder(gguf=gguf, folders=folders)
    for file_format in ("safetensors", "pytorch"):
        single, index = WEIGHT_FILES[file_format]
        if single in files:
            whole = _size(files[single].path) > 0
        elif index in files:
            whole = _shards_are_there(path, index)
        else:
            continue
        return _Folder(file_format if whole else None, gguf, (), settled=whole)
    return _Folder(gguf=gguf, folders=folders)


def _shards_are_there(path: str, index: str) -> bool:
    """Whether every file that the index names is there. An index that cannot be read is for loading to explain."""
    try:
        with open(os.path.join(path, index), "rb") as file:
            names = set(json.load(file)["weight_map"].values())
        return all(_size(os.path.join(path, name)) > 0 for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
