"""Fetching one file so that it is whole or not there: from where it stopped, and hashed while it comes.

``hf_hub_download`` of huggingface_hub 2.4 begins anew after every end of its process (its partial files have random
names and are removed), so the ranges are asked for here, through huggingface_hub's own session, headers and addresses.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modules.errors import BrokenDownload
from modules.hub.choosing import RemoteFile
from modules.hub.endpoint import token_for
from modules.hub.job import Order
from modules.hub.placing import PART, is_whole, new_hash
from modules.hub.problems import Asked, explained, is_temporary, retry_after_s

CHUNK_BYTES = 1 << 20
SILENCE_S = 10.0  # a connection that brings nothing for so long is given up
_HASHED_ASIDE_BYTES = 8 << 20  # larger files are hashed by a thread of their own
_QUEUED_CHUNKS = 256  # of 64 kB, as the network gives them
_PROGRESS_BYTES = 64 << 10  # so much more than before makes a try count as a good one


@dataclass(frozen=True)
class Patience:
    """How often a fault of the network is tried again, ``tries`` times without progress, and how long to wait."""

    tries: int = 5
    wait_s: float = 0.5  # doubled each time
    longest_s: float = 120.0  # a Retry-After beyond this ends the download


class Stopped(Exception):
    """Another file has failed: this one need not go on."""


class _Mismatch(Exception):
    """What comes cannot be the file that was listed."""


@dataclass(frozen=True)
class Fetch:
    """Fetches files of one order. ``moved`` is told of bytes gained (or lost, negative), ``said`` of waits."""

    order: Order
    moved: Callable[[int], None]
    said: Callable[[str], None]
    stopped: threading.Event
    patience: Patience = Patience()

    def file(self, file: RemoteFile) -> None:
        """Bring ``file`` into the partial folder, whole and hashed.

        Raises BrokenDownload, HubUnreachable and what the Hub refuses with; OSError where the disk does not take it.
        """
        target = Path(self.order.partial, file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}{PART}")
        for last in (False, True):
            try:
                digest = self._until_there(file, part)
                if file.hash and digest != file.hash:
                    kind = "SHA-256" if file.sha256 else "SHA-1"
                    raise _Mismatch(f"its {kind} begins with {digest[:12]}, not {file.hash[:12]}")
                part.rename(target)
                return
            except _Mismatch as wrong:
                lost = part.stat().st_size if part.exists() else 0
                part.unlink(missing_ok=True)
                self.moved(-min(lost, file.size))
                if last:
                    raise BrokenDownload(
                        f"{file.name} of {self.order.repo} is not what the Hub lists: {wrong}."
                    ) from None
                self.said(f"{file.name} came damaged; fetching it again")

    def _until_there(self, file: RemoteFile, part: Path) -> str:
        """Fetch until all bytes are there; their hash. Faults of the network are tried again."""
        failures, best = 0, -1
        while True:
            try:
                return self._once(file, part)
            except (Stopped, _Mismatch):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno and not is_temporary(error):
                    raise  # the disk's, not the network's
                size = part.stat().st_size if part.exists() else 0
                failures = failures + 1 if size < best + _PROGRESS_BYTES else 1
                best = max(best, size)
                self._wait(error, failures, file)

    def _wait(self, error: Exception, failures: int, file: RemoteFile) -> None:
        """Wait before the next try, or raise what ends the download."""
        wait = retry_after_s(error) or self.patience.wait_s * 2 ** (failures - 1)
        if not is_temporary(error) or failures >= self.patience.tries or wait > self.patience.longest_s:
            order = self.order
            asked = Asked(order.repo, order.endpoint, order.revision, file.name, _has_token(order))
            raise explained(error, asked) from error
        self.said(f"the connection failed; trying again in {wait:.0f} s" if wait >= 1 else "")
        if self.stopped.wait(wait):
            raise Stopped
        self.said("")

    def _once(self, file: RemoteFile, part: Path) -> str:
        """One request for what is missing. Raises what the network raises, and _Mismatch."""
        have = part.stat().st_size if part.exists() else 0
        if have > file.size:
            raise _Mismatch(f"{have:,} bytes came of {file.size:,}")
        with part.open("ab", buffering=0) as stream:
            sink = _Sink(stream, part, file, have)
            try:
                if have < file.size or not file.size:
                    self._stream(file, have, sink)
            finally:
                digest = sink.finish()
        if sink.size != file.size:
            raise ConnectionError(f"{file.name} ended after {sink.size:,} bytes of {file.size:,}")
        return digest

    def _stream(self, file: RemoteFile, have: int, sink: _Sink) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        order = self.order
        url = hf_hub_url(order.repo, file.name, revision=order.commit, endpoint=order.endpoint)
        token = token_for(order.endpoint)
        headers = {**build_hf_headers(token=token, library_name="loadstone"), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        # The session drops the token when a redirect leads to another host, port or scheme.
        with get_session().stream("GET", url, headers=headers, timeout=SILENCE_S) as response:
            if response.status_code == 416:
                raise _Mismatch(f"the Hub has no bytes beyond {have:,} of it")
            hf_raise_for_status(response)
            if have and response.status_code == 200:  # a server that knows no ranges
                sink.restart()
                self.moved(-have)
                have = 0
            _check_length(response, have, file)
            for chunk in response.iter_raw():  # as it comes: a larger chunk would be lost with the connection
                if self.stopped.is_set():
                    raise Stopped
                if sink.size + len(chunk) > file.size:
                    raise _Mismatch(f"more than {file.size:,} bytes come")
                sink.write(chunk)
                self.moved(len(chunk))


def _has_token(order: Order) -> bool:
    from huggingface_hub import get_token

    return token_for(order.endpoint) is None and get_token() is not None


def _check_length(response: Any, have: int, file: RemoteFile) -> None:
    """Compare what the answer says of its length with the list. Raises _Mismatch."""
    where = response.headers.get("Content-Range", "")
    length = response.headers.get("Content-Length", "")
    if response.status_code == 206 and where:
        start, total = where.removeprefix("bytes ").partition("-")[0], where.rpartition("/")[2]
        if start != str(have) or (total.isdigit() and int(total) != file.size):
            raise _Mismatch(f"the Hub answers bytes {have:,} onwards of {file.size:,} with {where!r}")
    elif length.isdigit() and int(length) + have != file.size:
        raise _Mismatch(f"it has {int(length) + have:,} bytes, not {file.size:,}")


class _Sink:
    """Writes chunks to disk at once, and hashes them; a large file's by a thread beside the one that receives."""

    def __init__(self, stream: BinaryIO | Any, path: Path, file: RemoteFile, have: int) -> None:
        self.size = have
        self._stream = stream
        self._path = path
        self._file = file
        self._begin(have)

    def _begin(self, have: int) -> None:
        self._hash = new_hash(self._file)
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_QUEUED_CHUNKS)
        self._failed: Exception | None = None
        self._thread: threading.Thread | None = None
        if self._file.size > _HASHED_ASIDE_BYTES:
            self._thread = threading.Thread(target=self._hash_all, args=(have,), name="hash", daemon=True)
            self._thread.start()
        else:
            self._hash_prefix(have)

    def _hash_prefix(self, have: int) -> None:
        with self._path.open("rb") as earlier:
            while have > 0 and (chunk := earlier.read(min(CHUNK_BYTES, have))):
                self._hash.update(chunk)
                have -= len(chunk)

    def _hash_all(self, have: int) -> None:
        try:
            self._hash_prefix(have)
            while (chunk := self._chunks.get()) is not None:
                self._hash.update(chunk)
        except Exception as error:  # the disk's: the part cannot be read any more
            self._failed = error
            while self._chunks.get() is not None:  # whoever writes may be waiting for room
                pass

    def write(self, chunk: bytes) -> None:
        """Raises OSError of the disk, also where what was there before cannot be read."""
        if self._failed:
            raise self._failed
        view = memoryview(chunk)
        while view:  # an unbuffered file may take a part
            view = view[self._stream.write(view) :]
        self.size += len(chunk)
        self._chunks.put(chunk) if self._thread else self._hash.update(chunk)

    def restart(self) -> None:
        """Throw away what is there."""
        self.finish()
        self._stream.truncate(0)
        self.size = 0
        self._begin(0)

    def finish(self) -> str:
        """The hash of all that has been written. Raises what kept the thread from hashing it."""
        if self._thread:
            self._chunks.put(None)
            self._thread.join()
            self._thread = None
        if self._failed:
            raise self._failed
        return str(self._hash.hexdigest())


def fetch_by_xet(order: Order, file: RemoteFile, moved: Callable[[int], None]) -> None:
    """Bring one file of more than the 50 GB that HTTP gives, through hf_xet. It begins anew after an interruption.

    Raises BrokenDownload, and what hf_xet raises.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import xet_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(order.repo, file.name, revision=order.commit, endpoint=order.endpoint)
    token = token_for(order.endpoint)
    metadata = get_hf_file_metadata(url, token=token, endpoint=order.endpoint)
    stored = metadata.xet_file_data
    if stored is None:
        raise BrokenDownload(f"{file.name} is larger than the Hub gives by HTTP, and not in Xet storage.")

    def bring(part: Path) -> None:
        headers = build_hf_headers(token=token)
        xet_get(incomplete_path=part, xet_file_data=stored, headers=headers, expected_size=file.size)

    bring_whole(order, file, moved, bring)


def bring_whole(order: Order, file: RemoteFile, moved: Callable[[int], None], bring: Callable[[Path], None]) -> None:
    """Have somebody else write the file, and put it in the partial folder once its hash is the one that is listed.

    Raises BrokenDownload where it is not, and what ``bring`` raises.
    """
    target = Path(order.partial, file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}{PART}")
    part.unlink(missing_ok=True)
    watched = threading.Event()
    threading.Thread(target=_watch, args=(part, moved, watched), name="xet-size", daemon=True).start()
    try:
        bring(part)
    finally:
        watched.set()
    if not is_whole(part, file):
        part.unlink(missing_ok=True)
        raise BrokenDownload(f"{file.name} of {order.repo} is not what the Hub lists: its size or hash is another.")
    part.rename(target)


def _watch(part: Path, moved: Callable[[int], None], done: threading.Event) -> None:
    """Tell how a file grows that somebody else writes."""
    seen = 0
    while not done.wait(0.5):
        size = part.stat().st_size if part.exists() else 0
        moved(size - seen)
        seen = size
