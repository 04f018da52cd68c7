"""What is done with models that are here: verified, moved away, marked, compared. Folders and files, no library."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from modules.errors import UserError
from modules.hub import placing
from modules.hub.choosing import WEIGHT_ENDINGS, RemoteFile

_TRASH = "removed"
_MARK = "[0-9a-f]" * 8  # of the names of what is being removed, as a glob
_MAX_TIME_S = 1e11  # since the epoch: the year 5138; what a library.json says beyond that is damage


@dataclass(frozen=True)
class Verified:
    """``broken``: name → what is wrong, "missing", "12 bytes, not 20", "another content"."""

    checked: int
    checked_bytes: int
    broken: Mapping[str, str]


@dataclass(frozen=True)
class Reading:
    """How far it is that files are read: which one, and the bytes of all of them."""

    name: str
    done_bytes: int
    total_bytes: int


Told: TypeAlias = Callable[[Reading], None]  # what it raises ends the reading


def silent(_: Reading) -> None:
    """Nobody wants to know."""


def _tell(told: Told, before: Reading, read_bytes: int) -> None:
    told(replace(before, done_bytes=before.done_bytes + read_bytes))


def verify(folder: Path, files: Iterable[RemoteFile], told: Told = silent) -> Verified:
    """Compare each file in ``folder`` with what the Hub says of it, by size and hash."""
    files = list(files)
    broken, size, total = {}, 0, sum(file.size for file in files)
    for file in files:
        if wrong := _wrong(folder / file.name, file, partial(_tell, told, Reading(file.name, size, total))):
            broken[file.name] = wrong
        size += file.size
    return Verified(len(files), size, broken)


def _wrong(path: Path, file: RemoteFile, told: Callable[[int], None]) -> str:
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{size:,} bytes, not {file.size:,}"
        return "" if placing.is_whole(path, file, told) else "another content"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return str(error.strerror)


def size_of(path: Path) -> int:
    """The bytes of a model: of its file, or of all files in its folder."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(
        file.stat().st_size
        for place, _, names in os.walk(path)
        for name in names
        if (file := Path(place, name)).exists()
    )


def remove(path: Path, root: Path) -> None:
    """Delete a model: it is moved aside first, so that no half of it is ever offered. Raises UserError.

    Of a link only the link goes. With the last GGUF file of a folder goes what was downloaded beside it.
    """
    try:
        aside = _moved_aside(path, root)
    except OSError as error:
        raise UserError(
            f"{path.name} cannot be deleted: {error.strerror}.", "Check the folder's permissions."
        ) from None
    if aside.is_symlink() or not aside.is_dir():
        aside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            placing.drop_from_record(path.parent, path.name)
            if path.parent != root and not _holds_weights(path.parent):
                _drop_what_was_downloaded(path.parent)
    else:
        shutil.rmtree(aside, ignore_errors=True)
    if path.parent != root:
        _drop_if_empty(path.parent)


def _moved_aside(path: Path, root: Path) -> Path:
    """Where the model is now: with what else is being removed, or hidden beside its place, if that is another disk."""
    trash, mark = root / ".cache" / _TRASH, uuid.uuid4().hex[:8]
    trash.mkdir(parents=True, exist_ok=True)
    try:
        return path.rename(trash / f"{path.name}.{mark}")
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return path.rename(path.with_name(f".{path.name}{placing.REMOVED}-{mark}"))


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHT_ENDINGS for path in folder.rglob("*"))


def _drop_what_was_downloaded(folder: Path) -> None:
    """Remove the files that the record names, and the record. Raises OSError."""
    if (record := placing.read_record(folder)) is None:
        return
    paths = [folder / name for name in record.files]
    for path in (*paths, folder / placing.RECORD):
        path.unlink(missing_ok=True)
    inner = {place for path in paths for place in path.parents if folder in place.parents}
    for place in sorted(inner, key=lambda place: -len(place.parts)):
        _drop_if_empty(place)


def _drop_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def empty_trash(root: Path) -> None:
    """Remove what an earlier server was still removing."""
    trash = root / ".cache" / _TRASH
    if trash.is_dir():
        shutil.rmtree(trash, ignore_errors=True)
    name = f".*{placing.REMOVED}-{_MARK}"
    for left in (*root.glob(f"*/{name}"), *root.glob(f"*/*/{name}")):  # in folders that are on other disks
        with contextlib.suppress(OSError):
            placing.remove_tree(left) if left.is_dir() else left.unlink(missing_ok=True)


@dataclass(frozen=True)
class Duplicate:
    """The same bytes under several names. ``size_bytes`` of one of them."""

    names: tuple[str, ...]
    size_bytes: int


def duplicates(models: Mapping[str, Path], told: Told = silent) -> list[Duplicate]:
    """Weight files of equal content that take their space more than once, by model name.

    Only files of equal size are hashed, and none whose hash is recorded; links to one file take no space twice.
    """
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for name, path in models.items():
        for file in _weight_files(path):
            with contextlib.suppress(OSError):
                by_size.setdefault(file.stat().st_size, []).append((_label(name, path, file), file))
    alike = {
        size: files
        for size, files in by_size.items()
        if size and len({(f.stat().st_dev, f.stat().st_ino) for _, f in files}) > 1
    }
    found, done, total = [], 0, sum(size * len(files) for size, files in alike.items())
    for size, files in alike.items():
        found += _equal(size, files, told, done, total)
        done += size * len(files)
    return sorted(found, key=lambda duplicate: -duplicate.size_bytes)


def _equal(size: int, files: list[tuple[str, Path]], told: Told, done: int, total: int) -> list[Duplicate]:
    """Those among files of one size. ``done`` of ``total`` bytes have been read."""
    by_hash: dict[str, list[str]] = {}
    for index, (name, file) in enumerate(files):
        tell = partial(_tell, told, Reading(name, done + index * size, total))
        by_hash.setdefault(_sha256(file, tell), []).append(name)
    return [Duplicate(tuple(sorted(names)), size) for names in by_hash.values() if len(names) > 1]


def _sha256(file: Path, told: Callable[[int], None]) -> str:
    record = placing.read_record(file.parent)
    known = record.files.get(file.name) if record else None
    if known and known.sha256 and known.size == file.stat().st_size:
        return known.sha256
    return placing.hash_of(file, RemoteFile(file.name, 0, sha256="-"), told)


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in WEIGHT_ENDINGS and file.is_file())


def _label(name: str, path: Path, file: Path) -> str:
    return name if path == file else f"{name}/{file.name}"


class Marks:
    """Which models are favourites, and when each was last used; kept in a small file. From any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def favourites(self) -> frozenset[str]:
        return frozenset(self._read().favourites)

    def last_used(self) -> dict[str, float]:
        """Model name → seconds since the epoch."""
        return self._read().last_used

    def set_favourite(self, name: str, on: bool) -> None:
        with self._lock:
            marks = self._read()
            marks.favourites = sorted({*marks.favourites, name} - (set() if on else {name}))
            self._write(marks)

    def used(self, name: str, when: float) -> None:
        with self._lock:
            marks = self._read()
            marks.last_used[name] = round(when)
            self._write(marks)

    def forget(self, name: str) -> None:
        with self._lock:
            marks = self._read()
            marks.favourites = [other for other in marks.favourites if other != name]
            marks.last_used.pop(name, None)
            self._write(marks)

    def _read(self) -> _Marks:
        """What the file holds of names and times, and nothing else: whatever it is, the list of models is shown."""
        data: object = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            data = json.loads(self._path.read_bytes())
        held = data if isinstance(data, dict) else {}
        favourites, last_used = held.get("favourites"), held.get("last_used")
        return _Marks(
            [name for name in favourites if isinstance(name, str)] if isinstance(favourites, list) else [],
            {name: float(when) for name, when in last_used.items() if _is_time(when)}
            if isinstance(last_used, dict)
            else {},
        )

    def _write(self, marks: _Marks) -> None:
        """Marks are worth no error: a folder that cannot be written to keeps none."""
        with contextlib.suppress(OSError):
            placing.write_json(self._path, asdict(marks))


@dataclass
class _Marks:
    favourites: list[str]
    last_used: dict[str, float]


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_TIME_S
