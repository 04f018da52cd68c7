"""Routes under ``/v1/internal/download``: what a repository holds, start a download, pause, resume, cancel."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from modules.hub import JobState
from modules.service import Service
from modules.service.downloads import Offer

_LOOK_S = 0.1  # between looks whether a download has ended


class DownloadBody(BaseModel):
    """``repo`` is ``user/model``, ``user/model:branch`` or an address; ``file`` names or globs, set apart by commas.

    ``wait`` true answers when the download has ended.
    """

    model_config = ConfigDict(extra="forbid")

    repo: str
    file: str = ""
    wait: bool = False


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    downloads = service.downloads

    @routes.get("/v1/internal/download")
    def jobs() -> dict[str, Any]:
        return {"downloads": [job.described() for job in downloads.queue.jobs()]}

    @routes.get("/v1/internal/download/files")
    def files(repo: str, file: str = "") -> dict[str, Any]:
        return described(downloads.look(repo, file))

    @routes.post("/v1/internal/download")
    async def start(body: DownloadBody) -> dict[str, Any]:
        job = await run_in_threadpool(downloads.download, body.repo, body.file)
        while body.wait and job.state in (JobState.WAITING, JobState.RUNNING) and not service.fleet.closed:
            await asyncio.sleep(_LOOK_S)  # no thread waits: there are not many, and pages need them
            job = downloads.queue.job(job.key)
        if body.wait and job.state is JobState.FAILED and job.error:
            raise job.error
        return job.described()

    @routes.post("/v1/internal/download/{key}/{action}")
    def act(key: str, action: Literal["pause", "resume", "cancel"]) -> dict[str, Any]:
        return {"pause": downloads.queue.pause, "resume": downloads.queue.resume, "cancel": downloads.queue.cancel}[
            action
        ](key).described()

    return routes


def described(offer: Offer) -> dict[str, Any]:
    """What would be downloaded, and what is left out and why."""
    return {
        "repo": offer.repository.name,
        "revision": offer.ask.revision,
        "commit": offer.repository.commit,
        "kind": offer.choice.kind,
        "name": offer.order.name,
        "files": [{"name": file.name, "bytes": file.size} for file in offer.choice.wanted],
        "left_out": dict(offer.choice.left_out),
        "question": offer.choice.question,
        "total_bytes": offer.order.size_bytes,
        "missing_bytes": offer.missing_bytes,
        "free_bytes": offer.free_bytes,
        "notes": list(offer.notes),
    }
