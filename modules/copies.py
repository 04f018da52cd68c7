"""The quantized copies under the cache folder: what there is, whether one is whole, and removing them. No ML package.

A copy is the checkpoint that bitsandbytes made of a model, kept so that the next load need not quantize again. It is
a folder ``quantized/<key>`` with weights and a :data:`MANIFEST`, written under another name and renamed when whole.
``key`` is the SHA-256 of the copy's identity: the source files, the recipe and the versions that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from modules.errors import BrokenCheckpoint, UserError

MANIFEST = "manifest.json"
LAYOUT = 1  # raised when copies are written in another way
_PARTIAL = ".partial-"  # behind it stands the id of the process that writes
_KEY = re.compile(r"[0-9a-f]{32}")
_CHUNK_BYTES = 1 << 20
_TELL_S = 0.2

Told: TypeAlias = Callable[[int, int], None]  # bytes read, and bytes in all


@dataclass(frozen=True)
class QuantizedCopy:
    """One copy as its manifest describes it; ``model`` is ``""`` where the manifest cannot be read."""

    path: Path
    model: str
    identity: Mapping[str, Any]  # "source", "recipe", "versions", …: what the key is made of
    files: Mapping[str, str]  # name → SHA-256, the manifest left out
    size_bytes: int
    made: datetime  # local time

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def what(self) -> str:
        """The recipe in words: ``nf4, double quantization``, ``8-bit``."""
        recipe = self.identity.get("recipe", {})
        quant_type = str(recipe.get("bnb_4bit_quant_type", "unreadable"))
        return in_words(bool(recipe.get("load_in_8bit")), quant_type, bool(recipe.get("bnb_4bit_use_double_quant")))


def in_words(in_8bit: bool, quant_type: str, double_quant: bool) -> str:
    """A way to quantize: ``nf4, double quantization``, ``8-bit``."""
    return "8-bit" if in_8bit else f"{quant_type}{', double quantization' if double_quant else ''}"


def folder_of(cache_dir: Path) -> Path:
    """Where the copies lie."""
    return cache_dir / "quantized"


def key_of(identity: Mapping[str, Any]) -> str:
    """The name of the copy with that identity (JSON data)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def copies(cache_dir: Path) -> list[QuantizedCopy]:
    """Every copy that is there, by model; damaged ones too, since they take space. Writes nothing.

    One that a worker removes meanwhile is left out.
    """
    try:
        folders = [folder for folder in folder_of(cache_dir).iterdir() if _KEY.fullmatch(folder.name)]
    except OSError:
        return []
    found = [copy for folder in folders if folder.is_dir() and (copy := _described(folder)) is not None]
    return sorted(found, key=lambda copy: (copy.model.lower(), copy.what, copy.key))


def read(folder: Path) -> QuantizedCopy:
    """The copy in ``folder`` by its manifest; its files are not read. Raises BrokenCheckpoint."""
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
        identity, files = dict(data["identity"]), {str(name): str(digest) for name, digest in data["files"].items()}
        model, made = str(data["model"]), datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime)
        size_bytes = _size(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"The manifest of the quantized copy {folder.name} cannot be read: {error}.") from None
    if key_of(identity) != folder.name:
        raise BrokenCheckpoint(f"The manifest of the quantized copy {folder.name} is another copy's.")
    return QuantizedCopy(folder, model, identity, files, size_bytes, made)


def _described(folder: Path) -> QuantizedCopy | None:
    """What is known of a copy, whole or not; None where it has vanished."""
    try:
        return read(folder)
    except BrokenCheckpoint:
        with suppress(OSError):
            return QuantizedCopy(folder, "", {}, {}, _size(folder), datetime.fromtimestamp(folder.stat().st_mtime))
    return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def check(copy: QuantizedCopy, told: Told = lambda done, total: None) -> None:
    """Read every file of the copy and compare it with the manifest. Raises BrokenCheckpoint for any difference.

    A file too many counts too: beside shards, a ``model.safetensors`` would be taken instead of them.
    """
    there = {file.name for file in copy.path.iterdir()} - {MANIFEST}
    if there != set(copy.files):
        names = ", ".join(sorted(there ^ set(copy.files)))
        raise BrokenCheckpoint(f"The quantized copy {copy.key} of {copy.model} lacks files, or has more: {names}.")
    for name, digest in digests(copy.path, told).items():
        if copy.files[name] != digest:
            raise BrokenCheckpoint(f"{name} in the quantized copy {copy.key} of {copy.model} has changed.")


def digests(folder: Path, told: Told = lambda done, total: None) -> dict[str, str]:
    """Name → SHA-256 of every file but the manifest, several files at a time. Raises OSError."""
    sizes = {file: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    read = dict.fromkeys(sizes, 0)

    def sha256(file: Path) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                read[file] += len(chunk)
        return digest.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing holds no lock of the interpreter
        jobs = {file.name: pool.submit(sha256, file) for file in sizes}
        while wait(jobs.values(), _TELL_S).not_done:
            told(sum(read.values()), sum(sizes.values()))
        return {name: job.result() for name, job in jobs.items()}


def write_manifest(folder: Path, model: str, identity: Mapping[str, Any]) -> None:
    """Seal the files in ``folder`` as a copy. Raises OSError."""
    manifest = {"model": model, "identity": identity, "files": digests(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def partial(folder: Path) -> Path:
    """The name under which this process writes the copy that becomes ``folder``."""
    return folder.with_name(f"{folder.name}{_PARTIAL}{os.getpid()}")


def remove(folder: Path) -> None:
    """Remove one copy: it is a copy no longer from the first moment on. Raises OSError."""
    aside = partial(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(cache_dir: Path) -> None:
    """Remove what processes that have ended were writing or removing. Never raises for a file that resists."""
    root = folder_of(cache_dir)
    for folder in root.glob(f"*{_PARTIAL}*") if root.is_dir() else ():
        if not _writer_lives(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _writer_lives(folder: Path) -> bool:
    """Whether the process named in ``folder`` is there, and not a later one that got the same id."""
    owner = folder.name.rpartition(_PARTIAL)[2]
    try:
        return owner.isdigit() and psutil.Process(int(owner)).create_time() <= folder.stat().st_mtime + 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def delete(cache_dir: Path, key: str) -> None:
    """Delete one copy, and what ended processes left behind. Raises UserError where there is no such copy."""
    folder = folder_of(cache_dir) / key
    if not _KEY.fullmatch(key) or not folder.is_dir():
        raise UserError(f"There is no quantized copy {key!r}.", "It may have been removed already: look again.")
    try:
        remove(folder)
    except OSError as error:
        raise UserError(f"The quantized copy {key} cannot be deleted: {error.strerror}.") from None
    remove_leftovers(cache_dir)
