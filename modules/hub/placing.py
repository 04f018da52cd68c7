"""Where a download's files are while it runs and when it is whole, and the record that stays beside them.

Nothing of it lies among the models before all of it is there: files come under :func:`partial_folder`, in the hidden
``.cache``, and move as one folder. A file that is not whole there ends in ``.part``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from modules.errors import UnsafeCheckpoint, UserError
from modules.hub.choosing import WEIGHT_ENDINGS, RemoteFile, check_names
from modules.hub.job import Order

RECORD = ".download.json"  # hidden: no scan of a folder takes it for a part of the model
PART = ".part"
REMOVED = ".removed"  # in the name of a folder that is being removed
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """What a folder's files are copies of. ``files`` by name."""

    repo: str
    revision: str
    commit: str
    endpoint: str
    downloaded: str  # ISO time
    files: Mapping[str, RemoteFile]


def partial_folder(root: Path, key: str) -> Path:
    """Where the files of the download ``key`` are meanwhile; ``root`` is the folder of models or LoRAs."""
    return root / ".cache" / "downloads" / key


def read_record(folder: Path) -> Record | None:
    """The record beside a model; None where there is none, or it is damaged, or names files outside of the folder."""
    try:
        data = json.loads((folder / RECORD).read_bytes())
        files = [RemoteFile(**file) for file in data.pop("files").values()]
        check_names(folder.name, files)
        record = Record(**data, files={file.name: file for file in files})
        texts = (record.repo, record.revision, record.commit, record.endpoint, *(file.hash for file in files))
        whole = all(isinstance(text, str) for text in texts) and all(type(file.size) is int for file in files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, UnsafeCheckpoint):
        return None
    return record if whole else None


def write_record(folder: Path, order: Order, earlier: Record | None = None) -> None:
    """Record where the files of ``order`` are from. Those of ``earlier`` that are still there stay recorded.

    Raises OSError.
    """
    files = {file.name: file for file in order.files}
    if earlier:
        kept = {n: f for n, f in earlier.files.items() if n not in _stale(order, earlier) and (folder / n).is_file()}
        files = {**kept, **files}
    record = Record(
        order.repo, order.revision, order.commit, order.endpoint,
        datetime.now().astimezone().isoformat(timespec="seconds"), files,
    )  # fmt: skip
    write_json(folder / RECORD, {**asdict(record), "files": {name: asdict(file) for name, file in files.items()}})


def drop_from_record(folder: Path, name: str) -> None:
    """Say no more of a file that has been deleted. Raises OSError."""
    if (record := read_record(folder)) is not None and name in record.files:
        files = {other: asdict(file) for other, file in record.files.items() if other != name}
        write_json(folder / RECORD, {**asdict(record), "files": files})


def write_json(path: Path, data: Any) -> None:
    """Write so that the file is the old one or the new one at any moment. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with name.open("x", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise


def hash_of(path: Path, file: RemoteFile, told: Callable[[int], None] = lambda _: None) -> str:
    """The hash of the bytes on disk, of the kind that the Hub gives for ``file``: SHA-256, or git's SHA-1.

    ``told`` gets the bytes read so far, after each few megabytes; what it raises ends the reading.
    """
    digest = new_hash(file)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            told(stream.tell())
    return str(digest.hexdigest())


def new_hash(file: RemoteFile) -> Any:
    """A hash to be fed with the file's bytes; its hexdigest is to equal ``file.hash``."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def is_whole(path: Path, file: RemoteFile, told: Callable[[int], None] = lambda _: None) -> bool:
    """Whether the file on disk is the Hub's, by size and hash. A hash that the Hub does not give is not compared.

    ``told``: see :func:`hash_of`.
    """
    try:
        return path.stat().st_size == file.size and (not file.hash or hash_of(path, file, told) == file.hash)
    except OSError:
        return False


def fetched_bytes(order: Order) -> int:
    """The bytes of the order's files that are on disk already, whole or not."""
    return sum(min(file.size, _size_in(Path(order.partial), file.name)) for file in order.files)


def _size_in(folder: Path, name: str) -> int:
    for path in (folder / name, folder / f"{name}{PART}"):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


def link(source: Path, target: Path, *, stays: bool = False) -> None:
    """Put the same file at ``target`` without a second copy of its bytes, or else with one. Raises OSError.

    ``stays``: the source is kept where it is, and is others' too. On another disk a symbolic link to it will do; and
    what is not weights is copied, since people edit a configuration in place, which would edit the source.
    """
    real = os.path.realpath(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if stays and not target.name.endswith(WEIGHT_ENDINGS):
        shutil.copy2(real, target)
        return
    try:
        os.link(real, target)
    except OSError:  # another disk, or one without hard links
        if stays or source.is_symlink():
            target.symlink_to(real)
        else:
            shutil.copy2(source, target)


def settle(order: Order) -> None:
    """Turn the folder of whole files into the model: one rename, or two where the model is replaced. Raises OSError.

    What else lies in a folder that is replaced comes along: other GGUF files, notes; not files of its old commit.
    """
    partial, target = Path(order.partial), Path(order.target)
    earlier = read_record(target)
    if target.is_dir():
        for path in _others(order, target, earlier):
            _take_along(path, partial / path.relative_to(target))
    write_record(partial, order, earlier)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = replaced_by(order)
    if os.path.lexists(target):
        remove_tree(aside)
        target.rename(aside)
        with contextlib.suppress(OSError, NotImplementedError):
            os.utime(aside, follow_symlinks=False)  # from now on it counts how long nobody has gone on with it
    try:
        partial.rename(target)
    except OSError:
        put_back(order)
        raise
    remove_tree(aside)


def replaced_by(order: Order) -> Path:
    """Where the model's old folder is while the new one takes its place."""
    partial = Path(order.partial)
    return partial.with_name(f"{partial.name}.replaced")


def put_back(order: Order) -> None:
    """Put the old folder in its place again where the new one did not come to it, as after a kill. Raises OSError."""
    aside, target = replaced_by(order), Path(order.target)
    if os.path.lexists(aside) and not os.path.lexists(target):
        aside.rename(target)


def _take_along(source: Path, target: Path) -> None:
    """Put what lies in the old folder into the new one: links as they are, folders that are empty too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        if not os.path.lexists(target):  # else the new one brings a folder of that name
            target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        link(source, target)


def _others(order: Order, target: Path, earlier: Record | None) -> Iterator[Path]:
    """What the old folder holds, the new one does not bring and is no remainder of an older commit: files, links,
    empty folders.
    """
    brought = {file.name for file in order.files} | {RECORD}
    stale = _stale(order, earlier)
    for place, folders, names in os.walk(target):
        links = [name for name in folders if Path(place, name).is_symlink()]  # not walked into
        empty = [name for name in folders if name not in links and not os.listdir(Path(place, name))]
        for name in (*names, *links, *empty):
            path = Path(place, name)
            relative = path.relative_to(target).as_posix()
            if relative not in brought and relative not in stale:
                yield path


def _stale(order: Order, earlier: Record | None) -> set[str]:
    """The files of an older commit that must not be mixed with the new one's; each GGUF file is a model by itself."""
    if earlier is None or earlier.commit == order.commit:
        return set()
    return {name for name in earlier.files if not name.endswith(".gguf")}


def refuse_to_replace(order: Order, differs: Callable[[Path, RemoteFile], bool]) -> None:
    """Raises UserError where the order would replace a file that no download has brought, and that ``differs``."""
    target = Path(order.target)
    record = read_record(target)
    for file in order.files:
        path = target / file.name
        if not (record and file.name in record.files) and path.is_file() and differs(path, file):
            raise UserError(
                f"{file.name} in {order.name} was not downloaded here, is not what the Hub has, and would be replaced.",
                f"Rename the folder {order.name}, or delete the file, and try again.",
            )


def stale_in(order: Order) -> list[str]:
    """The files in the model's folder that an older commit brought, and the order's does not."""
    target = Path(order.target)
    gone = _stale(order, read_record(target)) - {file.name for file in order.files}
    return sorted(name for name in gone if os.path.lexists(target / name))


def remove_forgotten(root: Path, known: set[str], older_than_s: float = 14 * 86_400) -> None:
    """Remove what no download of ``known`` keys has touched for so long: nobody will go on with it. And what an
    earlier server was still removing.
    """
    limit = time.time() - older_than_s
    folder = root / ".cache" / "downloads"
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            forgotten = path.name.partition(".")[0] not in known and path.lstat().st_mtime < limit
            if forgotten or REMOVED in path.name:
                remove_tree(path) if path.is_dir() else path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder, or the link to one; what resists stays behind, and is nobody's model."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
