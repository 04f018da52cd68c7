"""A model that is not here, as far as it can be described without its weights: headers by range requests.

The library reads it like any other folder: weights have their true sizes and only their first bytes on the disk, and
of the other files there is what was fetched.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modules.hub.choosing import WEIGHT_ENDINGS, RemoteFile
from modules.hub.remote import Hub, Repository

_FIRST_BYTES = 100_000  # holds most safetensors headers, as huggingface_hub found
_GGUF_BYTES = 12 << 20  # a GGUF header holds the vocabulary
_MOST_HEADER_BYTES = 25_000_000  # as huggingface_hub has it; several are in memory at once
_SMALL_BYTES = 1 << 20  # a configuration is fetched whole up to this size
_INDEX_BYTES = 32 << 20  # and a list of tensors: that of a model of hundreds of experts has 10 MB
_PICKLE_BYTES = 64
_ZIP_END_BYTES = 66_000  # holds the end of a ZIP archive's directory, with the longest comment
_AT_ONCE = 8


def phantom(hub: Hub, repository: Repository, files: Sequence[RemoteFile], folder: Path) -> None:
    """Put the files into ``folder`` so that the library can describe them. Raises what the Hub raises, and OSError."""

    def put(file: RemoteFile) -> None:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(_beginning(hub, repository, file))
            if file.name.endswith(WEIGHT_ENDINGS):  # a configuration as long as is claimed would be read to its end
                stream.truncate(file.size)  # sparse: it takes no space
            if file.name.endswith(".bin") and file.size > _PICKLE_BYTES:  # a ZIP archive's directory is at its end
                end = min(file.size - _PICKLE_BYTES, _ZIP_END_BYTES)
                stream.seek(file.size - end)
                stream.write(hub.bytes_of(repository, file.name, file.size - end, file.size))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(put, files))


def _beginning(hub: Hub, repository: Repository, file: RemoteFile) -> bytes:
    """As much of the file as describes it; nothing of what is not read."""
    if file.name.endswith(".safetensors"):
        return _safetensors_header(hub, repository, file)
    if file.name.endswith(".gguf"):
        return hub.bytes_of(repository, file.name, 0, min(file.size, _GGUF_BYTES))
    if file.name.endswith(".bin"):
        return hub.bytes_of(repository, file.name, 0, min(file.size, _PICKLE_BYTES)) if file.size else b""
    described = file.name.endswith((".index.json", "config.json")) or "/" not in file.name
    most = _INDEX_BYTES if file.name.endswith(".index.json") else _SMALL_BYTES
    if file.name.endswith((".json", ".jinja")) and described and 0 < file.size <= most:
        return hub.bytes_of(repository, file.name, 0, file.size)
    return b""


def _safetensors_header(hub: Hub, repository: Repository, file: RemoteFile) -> bytes:
    first = hub.bytes_of(repository, file.name, 0, min(file.size, _FIRST_BYTES)) if file.size else b""
    if len(first) < 8:
        return first
    end = min(8 + int(struct.unpack("<Q", first[:8])[0]), file.size, _MOST_HEADER_BYTES)
    return first[:end] if end <= len(first) else first + hub.bytes_of(repository, file.name, len(first), end)
