"""One download as data: what is fetched, where it is put, and how far it is. Made JSON for the state file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from modules.errors import LoadstoneError, error_from_dict
from modules.hub.choosing import Kind, RemoteFile


class JobState(str, Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        """Whether it still has something to fetch."""
        return self in (JobState.WAITING, JobState.RUNNING, JobState.PAUSED)


@dataclass(frozen=True)
class Order:
    """What a download process is told. ``target``: the folder that the whole files end up in.

    ``partial``: where they are meanwhile, on the same disk. ``cache``: the Hugging Face cache, or "".
    """

    repo: str
    revision: str
    commit: str
    kind: Kind
    files: tuple[RemoteFile, ...]
    target: str
    partial: str
    endpoint: str
    cache: str = ""
    check_all: bool = False  # hash the files that are there already; otherwise their sizes and the record decide

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        return Path(self.target).name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Order:
        """The order again. Raises TypeError and KeyError for other data."""
        return cls(**{**data, "files": tuple(RemoteFile(**file) for file in data["files"])})


@dataclass(frozen=True)
class Job:
    """A snapshot of one download. ``speed`` in bytes a second, ``seconds_left`` None where it is not known."""

    key: str
    order: Order
    state: JobState = JobState.WAITING
    done_bytes: int = 0
    stage: str = ""
    speed: float = 0.0
    error: LoadstoneError | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds_left(self) -> float | None:
        return (self.order.size_bytes - self.done_bytes) / self.speed if self.speed > 0 else None

    def kept(self) -> dict[str, Any]:
        """What the state file keeps."""
        return {
            "key": self.key,
            "order": self.order.to_dict(),
            "state": self.state.value,
            "done_bytes": self.done_bytes,
            "error": self.error.to_dict() if self.error else None,
            "notes": list(self.notes),
        }

    def described(self) -> dict[str, Any]:
        """For programs: without the lists that only the download process needs."""
        left = self.seconds_left
        return {
            "id": self.key,
            "repo": self.order.repo,
            "revision": self.order.revision,
            "commit": self.order.commit,
            "kind": self.order.kind,
            "name": self.order.name,
            "files": [file.name for file in self.order.files],
            "state": self.state.value,
            "stage": self.stage,
            "done_bytes": self.done_bytes,
            "total_bytes": self.order.size_bytes,
            "bytes_per_second": round(self.speed),
            "seconds_left": round(left, 1) if left is not None else None,
            "error": self.error.to_dict() if self.error else None,
            "notes": list(self.notes),
        }


def job_from_dict(data: Mapping[str, Any]) -> Job:
    """The job that :meth:`Job.kept` described; one that ran waits again. Raises what a damaged file makes it raise."""
    job = Job(
        key=str(data["key"]),
        order=Order.from_dict(data["order"]),
        state=JobState(data["state"]),
        done_bytes=int(data["done_bytes"]),
        error=error_from_dict(data["error"]) if data["error"] else None,
        notes=tuple(data["notes"]),
    )
    return replace(job, state=JobState.WAITING) if job.state is JobState.RUNNING else job
