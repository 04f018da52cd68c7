"""HTTP routes: a thin skin over ``service.py``. Bodies and answers are JSON."""

from __future__ import annotations

from typing import Any
from zlib import crc32

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from modules.errors import InternalError, LoadstoneError, OptionError
from modules.options import LOAD_OPTIONS, Spec, find
from modules.service import Service
from modules.supervisor import Snapshot, State


class LoadBody(BaseModel):
    """``args`` holds loader options by name; ``wait`` false answers before the model is there; ``anyway`` loads
    what the plan says does not fit."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str
    args: dict[str, Any] = {}
    wait: bool = True
    anyway: bool = False


def install(app: FastAPI, service: Service) -> None:
    """Add the routes and the error answers to ``app``."""
    app.include_router(_router(service))
    app.add_exception_handler(LoadstoneError, _answer_error)


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    known = error if isinstance(error, LoadstoneError) else InternalError(str(error))
    return JSONResponse({"error": known.to_dict()}, status_code=known.status)


def _router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/v1/internal/model/status")
    async def status() -> dict[str, Any]:
        return brief(service.snapshot())

    @router.get("/v1/internal/model/list")
    def models() -> dict[str, list[str]]:
        return {"model_names": [model.name for model in service.models()]}

    @router.get("/v1/internal/model/info")
    def info() -> dict[str, Any]:
        return describe(service.snapshot())

    @router.post("/v1/internal/model/load")
    def load(body: LoadBody) -> dict[str, Any]:
        service.load(body.model_name, _from_http(body.args), source="api", anyway=body.anyway)
        if not body.wait:
            return describe(service.snapshot())
        snapshot = service.supervisor.wait_loaded()
        if snapshot.error and snapshot.state is not State.READY:
            raise snapshot.error
        return describe(snapshot)

    @router.post("/v1/internal/model/unload")
    def unload() -> dict[str, Any]:
        service.unload()
        return describe(service.snapshot())

    return router


def _from_http(values: dict[str, Any]) -> dict[str, Any]:
    """The values parsed; options that choose paths of this machine are refused by name."""
    parsed = {}
    for name, value in values.items():
        spec: Spec = find(LOAD_OPTIONS, name)
        if spec.local_only and spec.name != "trust_remote_code":
            raise OptionError(f"{spec.flag} can only be given on the command line or in settings.yaml.")
        parsed[spec.name] = spec.parse(value)
    return parsed


def brief(snapshot: Snapshot) -> dict[str, Any]:
    """What the page asks for twice a second. ``shown`` changes with all that it shows but the speed of answers."""
    since = snapshot.loaded.since if snapshot.loaded else 0
    name = snapshot.order.name if snapshot.order else ""
    shown = (snapshot.state, since, name, snapshot.progress, snapshot.notes, str(snapshot.error))
    return {
        "state": snapshot.state.value,
        "shown": crc32(repr(shown).encode()),
        "warm": snapshot.warm,
        "generating": snapshot.generating,
        "tokens_per_second": round(snapshot.tokens_per_second, 1),
    }


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """The state in full, for programs."""
    loaded = snapshot.loaded
    return {
        "version": snapshot.version,
        "state": snapshot.state.value,
        "model_name": loaded.order.name if loaded else None,
        "options": {name: getattr(loaded.order.options, name) for name in LOAD_OPTIONS} if loaded else {},
        "context_tokens": loaded.order.ctx_tokens if loaded else None,
        "device_bytes": loaded.report.device_bytes if loaded else {},
        "footprint_bytes": loaded.report.footprint_bytes if loaded else None,
        "layer_classes": loaded.report.layer_classes if loaded else {},
        "notes": list(snapshot.notes),
        "error": snapshot.error.to_dict() if snapshot.error else None,
    }
