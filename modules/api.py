"""HTTP routes: a thin skin over ``service.py``. Bodies and answers are JSON."""

from __future__ import annotations

from typing import Any
from zlib import crc32

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from modules.errors import Cancelled, InternalError, LoadstoneError, OptionError
from modules.options import LOAD_OPTIONS
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
    for raised in (LoadstoneError, RequestValidationError, Exception):
        app.add_exception_handler(raised, _answer_error)


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    """Every error as JSON of one form. What nobody foresaw is logged by the server, traceback and all."""
    known = _typed(error)
    return JSONResponse({"error": known.to_dict()}, status_code=known.status)


def _typed(error: Exception) -> LoadstoneError:
    if isinstance(error, LoadstoneError):
        return error
    if isinstance(error, RequestValidationError):
        return _bad_body(error)
    return InternalError(f"{type(error).__name__}: {error}", "The server's log tells more; please report it.")


def _bad_body(error: RequestValidationError) -> OptionError:
    """What of the body is wrong, each part by its name: ``model_name: Field required``."""
    parts = [(".".join(str(step) for step in one["loc"][1:]), one["msg"]) for one in error.errors()]
    said = "; ".join(f"{where}: {what}" if where else what for where, what in parts)
    return OptionError(
        f"The request's body cannot be used: {said}.", f"It is a JSON object of {', '.join(LoadBody.model_fields)}."
    )


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
        service.load(body.model_name, body.args, source="api", anyway=body.anyway)
        if not body.wait:
            return describe(service.snapshot())
        snapshot = service.supervisor.wait_loaded()
        if snapshot.state is not State.READY:  # unloaded meanwhile, or the server ends: there is no error then
            raise snapshot.error or Cancelled(f"{body.model_name} was not loaded: the load was ended.")
        return describe(snapshot)

    @router.post("/v1/internal/model/unload")
    def unload() -> dict[str, Any]:
        service.unload()
        return describe(service.snapshot())

    return router


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
        "notes": [*(loaded.report.notes if loaded else ()), *snapshot.notes],
        "error": snapshot.error.to_dict() if snapshot.error else None,
    }
