"""Which models lie in the model folders. Names and sizes only: nothing is opened but shard indexes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.checkpoint import LORA_CONFIG, WEIGHT_FILES, read_json, safe_name
from modules.errors import BrokenCheckpoint, UnsafeCheckpoint

FileFormat = Literal["safetensors", "pytorch", "gguf"]
FOLDER_FORMATS: tuple[FileFormat, ...] = ("safetensors", "pytorch")  # the first whole one is taken
HUB_CACHE = "Hugging Face cache"
UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload")  # endings of downloads under way
PIPELINE_CONFIG = "model_index.json"  # of a diffusers pipeline
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # one of several files, which transformers does not put together
_PROJECTOR = "mmproj"  # the image part of a GGUF model: no language model by itself
_SAME_TICK_NS = 2_000_000_000  # the coarsest clock of a file system: two changes within it may look like one


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

    def scan(self, roots: Sequence[Path], hf_cache: Path | None, named: Sequence[Model] = ()) -> list[Model]:
        """Those ``named`` and every model under the roots and in the Hugging Face cache, by name, whatever the case.

        The first to have a name keeps it; a later one is called ``name (folder of its root)``.
        """
        found = {model.name: model for model in named}
        paths = {model.path for model in named}
        places = [(root.name, self._under(root)) for root in roots]
        if hf_cache is not None:
            places.append((HUB_CACHE, self._cached_hub(hf_cache)))
        for place, models in places:
            for model in sorted((model for model in models if model.path not in paths), key=lambda model: model.name):
                name = free_name(model.name, place, found)
                found[name] = Model(name, model.path, model.root, model.file_format)
        return sorted(found.values(), key=lambda model: (model.name.casefold(), model.name))

    def _under(self, root: Path) -> Iterator[Model]:
        files, folders = entries(str(root))
        for name in _whole_ggufs(files):
            yield Model(name, root / name, root, "gguf")
        for name in folders:
            yield from self._in_folder(str(root / name), name, root, deeper=True)

    def _in_folder(self, path: str, name: str, root: Path, *, deeper: bool) -> Iterator[Model]:
        folder = self._look(path)
        if folder.file_format:
            yield Model(name, Path(path), root, folder.file_format)
        for file in folder.gguf:
            yield Model(f"{name}/{file}", Path(path, file), root, "gguf")
        for inner in folder.folders if deeper else ():
            yield from self._in_folder(os.path.join(path, inner), f"{name}/{inner}", root, deeper=False)

    def _look(self, path: str) -> _Folder:
        try:
            changed = os.stat(path).st_mtime_ns
        except OSError:
            return _Folder()
        known = self._seen.get(path)
        if known and known[0] == changed:
            return known[1]
        now = time.time_ns()
        files, folders = entries(path)
        folder = _look_into(path, files, folders)
        # What a link will lead to, when its mount is back, does not show in the folder's time.
        settled = folder.settled and not any(_leads_nowhere(entry) for entry in files.values())
        if settled and changed < now - _SAME_TICK_NS:
            self._seen[path] = (changed, folder)
        return folder

    def _cached_hub(self, hf_cache: Path) -> Iterator[Model]:
        """Models of the Hugging Face cache: the commit that ``main`` points to, or the only one."""
        for repository in entries(str(hf_cache))[1]:
            snapshot = snapshot_of(hf_cache / repository) if repository.startswith("models--") else None
            if snapshot is not None:
                name = repository.removeprefix("models--").replace("--", "/", 1)
                yield from self._in_folder(str(snapshot), name, hf_cache, deeper=False)


def free_name(name: str, place: str, taken: Mapping[str, object]) -> str:
    """``name``, or with its place, or with a number too."""
    if name in taken:
        name = f"{name} ({place})"
    number = 2
    free = name
    while free in taken:
        free, number = f"{name} {number}", number + 1
    return free


def snapshot_of(repository: Path) -> Path | None:
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
        return repository / "snapshots" / commit if "/" not in commit else None
    except OSError:
        pass
    commits = entries(str(repository / "snapshots"))[1]
    return repository / "snapshots" / commits[0] if len(commits) == 1 else None


def entries(path: str) -> tuple[dict[str, os.DirEntry[str]], list[str]]:
    """The files by name, and the names of the folders, links to folders among them; without hidden ones.

    Nothing where the folder cannot be read. A link that cannot be followed is a file, whatever it was to lead to.
    """
    files: dict[str, os.DirEntry[str]] = {}
    folders: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    files[entry.name] = entry
                elif not entry.name.endswith(UNFINISHED):
                    folders.append(entry.name)
    except OSError:
        return {}, []
    return files, sorted(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link into itself, to a mount that is gone, to what somebody else owns
        return False


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _look_into(path: str, files: Mapping[str, os.DirEntry[str]], folders: Sequence[str]) -> _Folder:
    if any(name.endswith(UNFINISHED) for name in files):
        return _Folder(settled=False)
    gguf = _whole_ggufs(files)
    settled = len(gguf) == len(_ggufs(files))
    if not files.keys().isdisjoint({LORA_CONFIG, PIPELINE_CONFIG}):
        # The folders of a pipeline look like models of their own, and are none without each other.
        return _Folder(gguf=gguf, settled=settled)
    if "config.json" not in files:
        return _Folder(gguf=gguf, folders=tuple(folders), settled=settled)
    whole = next((kind for kind in FOLDER_FORMATS if _is_whole(path, files, kind)), None)
    return _Folder(whole, gguf, settled=settled and whole is not None)


def _ggufs(files: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        sorted(
            name
            for name in files
            if name.endswith(".gguf") and not _GGUF_PART.search(name) and not name.lower().startswith(_PROJECTOR)
        )
    )


def _whole_ggufs(files: Mapping[str, os.DirEntry[str]]) -> tuple[str, ...]:
    return tuple(name for name in _ggufs(files) if _size(files[name].path) > 0)


def _is_whole(path: str, files: Mapping[str, os.DirEntry[str]], file_format: FileFormat) -> bool:
    """Whether the weights in this format are there, by their names and sizes."""
    single, index = WEIGHT_FILES[file_format]
    if single in files:
        return _size(files[single].path) > 0
    if index in files:
        return _shards_are_there(path, index)
    if file_format != "safetensors" or not any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in files
    ):
        return False
    named = _json_value(os.path.join(path, "config.json"), "transformers_weights")
    if not isinstance(named, str) or named not in files:
        return False
    return _shards_are_there(path, named) if named.endswith(".index.json") else _size(files[named].path) > 0


def _shards_are_there(path: str, index: str) -> bool:
    """Whether every file that the index names is there.

    An index that is damaged, or names files outside the folder, is offered: its error says why it does not load.
    """
    file = os.path.join(path, index)
    if _size(file) == 0:
        return False
    weight_map = _json_value(file, "weight_map")
    try:
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        return all(_size(os.path.join(path, safe_name(Path(path), index, name))) > 0 for name in names)
    except (TypeError, UnsafeCheckpoint):
        return True


def _json_value(path: str, key: str) -> object:
    try:
        return read_json(Path(path)).get(key)
    except (OSError, BrokenCheckpoint):
        return None


def _size(path: str) -> int:
    """The bytes of a file; 0 where there is none, as behind a link whose target is not there yet."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0
