"""What the Hub of the tests holds, and what goes wrong with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_BYTES = 4096
TOKEN = "hf_thetokenofatest"
OTHER_TOKEN = "hf_thetokenofsomebodyelse"
Content = bytes | Path


def size_of(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def bytes_of(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


@dataclass(frozen=True)
class Fault:
    """What happens to one answer that brings a file's bytes.

    ``cut``: the connection ends after so many bytes. ``status`` with ``retry_after``: that instead of the file.
    ``flip``: the byte at that place is another. ``short``: so many bytes fewer, and said so. ``longer``: so many more.
    ``stall``: nothing comes after so many bytes, until the server ends. ``redirect``: to another address.
    ``whole``: the whole file, whatever range is asked for.
    """

    cut: int = -1
    status: int = 0
    retry_after: int = -1
    flip: int = -1
    short: int = 0
    longer: int = 0
    stall: int = -1
    redirect: str = ""
    whole: bool = False


@dataclass
class Repo:
    """``branches``: branch → file name → content. A new commit is made by assigning to a branch."""

    branches: dict[str, dict[str, Content]]
    gated: bool = False
    accepted: frozenset[str] = frozenset()  # tokens whose owners accepted the licence
    readers: frozenset[str] | None = None  # tokens that may see it at all; None: everybody
    forbidden: frozenset[str] = frozenset()  # tokens that may not read it, though their owners could
    info: dict[str, Any] = field(default_factory=dict)  # more of the model's description
    _hashes: dict[int, tuple[str, str]] = field(default_factory=dict)

    def commit(self, branch: str) -> str:
        files = self.branches[branch]
        return hashlib.sha1(repr([(n, self.hashes(c)) for n, c in sorted(files.items())]).encode()).hexdigest()

    def at(self, revision: str) -> dict[str, Content] | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((self.branches[branch] for branch in self.branches if self.commit(branch) == revision), None)

    def hashes(self, content: Content) -> tuple[str, str]:
        """SHA-256, and git's SHA-1 of the blob."""
        key = hash(content)
        if key not in self._hashes:
            data = bytes_of(content)
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._hashes[key] = (hashlib.sha256(data).hexdigest(), blob)
        return self._hashes[key]
