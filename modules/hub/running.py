"""One whole download: take what is on this machine already, fetch the rest, put it in place. Runs in its own process.

It may be ended at any moment and begun again: all that it knows lies in the partial folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from filelock import FileLock, Timeout

from modules.errors import Busy, DiskFull, UserError
from modules.hub import placing
from modules.hub.choosing import RemoteFile, check_names
from modules.hub.fetching import Fetch, Patience, Stopped, fetch_by_xet
from modules.hub.job import Order
from modules.units import format_bytes

WORKERS = 8  # files at a time, as snapshot_download does
_LOCK_S = 10.0  # a process that is being ended lets go within this
PATIENT = Patience()
HTTP_LIMIT_BYTES = 50 * 10**9  # the Hub gives larger files by Xet alone

Told = Callable[[str, int], None]  # the stage in words ("" while bytes come), the bytes that are there


def run(order: Order, told: Told, patience: Patience = PATIENT) -> None:
    """Do what ``order`` says. ``told`` is called from several threads.

    Raises Busy where another process works on it, DiskFull, UserError for a folder that cannot be written to or holds
    files of somebody's own, and what :meth:`Fetch.file` raises.
    """
    check_names(order.repo, order.files)
    partial = Path(order.partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial.with_name(f"{partial.name}.lock"), timeout=_LOCK_S):
            _Run(order, told, patience).all()
    except Timeout:
        raise Busy(f"Another process is downloading {order.repo}.", "Wait for it to finish.") from None
    except OSError as error:
        raise _of_disk(error, order) from error


def _of_disk(error: OSError, order: Order) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(order.partial).free
        return DiskFull(
            f"The disk is full: {format_bytes(free)} are free where {order.repo} is being written.",
            "Free some space and resume the download; what has come is kept.",
        )
    return UserError(f"{error.filename or order.target} cannot be written: {error.strerror or error}.")


class _Run:
    def __init__(self, order: Order, told: Told, patience: Patience) -> None:
        self._order = order
        self._told = told
        self._lock = threading.Lock()
        self._done = 0
        self._stage = ""
        self._stopped = threading.Event()
        self._fetch = Fetch(order, self._moved, self._say, self._stopped, patience)

    def _moved(self, count: int) -> None:
        with self._lock:
            self._done += count
            stage, done = self._stage, self._done
        self._told(stage, done)

    def _say(self, stage: str) -> None:
        with self._lock:
            self._stage = stage
        self._moved(0)

    def all(self) -> None:
        order = self._order
        placing.put_back(order)
        self._say("looking at what is here")
        missing = [file for file in order.files if not self._is_here(file)]
        placing.refuse_to_replace(order, self._differs)
        if not missing and self._is_in_place():
            placing.write_record(Path(order.target), order, placing.read_record(Path(order.target)))
            for left in (Path(order.partial), placing.replaced_by(order)):
                placing.remove_tree(left)
            return
        self._done = placing.fetched_bytes(order)
        self._say("")
        self._fetch_all(missing)
        self._say("putting it in place")
        placing.settle(order)

    def _is_here(self, file: RemoteFile) -> bool:
        """Whether the file is whole in the partial folder, or could be linked there from this machine."""
        place = Path(self._order.partial, file.name)
        if place.is_file() and place.stat().st_size == file.size:
            return True
        for source, trusted, stays in self._sources(file):
            if _size(source) != file.size:
                continue
            if not trusted:
                self._say(f"checking {file.name}")
            if trusted or placing.is_whole(source, file):
                placing.link(source, place, stays=stays)
                return True
        return False

    def _differs(self, own: Path, file: RemoteFile) -> bool:
        """Whether a file in the model's folder is not the Hub's. One that was linked a moment ago has been hashed."""
        place = Path(self._order.partial, file.name)
        return not (place.is_file() and os.path.samefile(own, place)) and not placing.is_whole(own, file)

    def _sources(self, file: RemoteFile) -> list[tuple[Path, bool, bool]]:
        """Where a copy may lie: in the model's folder, in the Hugging Face cache.

        Each with whether it has been hashed before, and whether it stays there.
        """
        order, target = self._order, Path(self._order.target)
        record = placing.read_record(target)
        recorded = record.files.get(file.name) if record else None
        known = bool(recorded and file.hash and recorded.hash == file.hash and not order.check_all)
        found = [(target / file.name, known, False)]
        if order.cache and file.hash:
            blob = Path(order.cache, f"models--{order.repo.replace('/', '--')}", "blobs", file.hash)
            found.append((blob, False, True))
        return found

    def _is_in_place(self) -> bool:
        """Whether the model's folder holds all of it, and no file that its commit has no more: nothing is to move."""
        target, partial = Path(self._order.target), Path(self._order.partial)
        return not placing.stale_in(self._order) and all(
            (target / file.name).is_file() and os.path.samefile(target / file.name, partial / file.name)
            for file in self._order.files
        )

    def _fetch_all(self, missing: list[RemoteFile]) -> None:
        pool = ThreadPoolExecutor(WORKERS)
        try:
            largest_first = sorted(missing, key=lambda file: -file.size)
            futures = [pool.submit(self._one, file) for file in largest_first]
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise error from None
        pool.shutdown()

    def _one(self, file: RemoteFile) -> None:
        if self._stopped.is_set():
            raise Stopped
        if file.size > HTTP_LIMIT_BYTES:
            fetch_by_xet(self._order, file, self._moved)
        else:
            self._fetch.file(file)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
