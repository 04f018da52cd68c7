"""Management routes under ``/v1/internal``, by text-generation-webui's names: what is loaded, load, unload."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from modules.api.answers import error_body
from modules.errors import Cancelled, ModelNotFound, OptionError
from modules.options import LOAD_OPTIONS
from modules.service import Service, entries_of
from modules.supervisor import LOAD_STATES, Loaded, Snapshot, State

_LOOK_S = 0.05  # between looks whether a load has ended


class LoadBody(BaseModel):
    """``args`` holds loader options by name; ``wait`` false answers before the model is there; ``anyway`` loads
    what the plan says does not fit. ``settings``: clients of text-generation-webui send it, empty."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str
    args: dict[str, Any] | None = None
    wait: bool = True
    anyway: bool = False
    settings: dict[str, Any] | None = None


class UnloadBody(BaseModel):
    """``model_name``: which of several; "" for the one that the page shows."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str = ""


class PlanBody(BaseModel):
    """As for a load, which is not begun."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str
    args: dict[str, Any] | None = None


def router(service: Service, *, with_details: bool = True) -> APIRouter:
    """The routes. ``with_details``: a failed load's traceback and log are told too."""
    routes = APIRouter()

    @routes.get("/v1/internal/model/list")
    def models() -> dict[str, list[str]]:
        return {"model_names": [model.name for model in service.models()]}

    @routes.get("/v1/internal/model/info")
    def info() -> dict[str, Any]:
        return describe(service.snapshot(), with_details=with_details)

    _add_loading(routes, service)
    return routes


def _add_loading(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/internal/model/load")
    async def load(body: LoadBody) -> dict[str, Any]:
        if body.settings:
            raise OptionError(
                "The settings of text-generation-webui's page mean nothing here.",
                "Leave settings out, and give loader options in args.",
            )
        owner = await run_in_threadpool(service.load, body.model_name, body.args, source="api", anyway=body.anyway)
        if not body.wait:
            return describe(owner.snapshot())
        while (snapshot := owner.snapshot()).state in LOAD_STATES and not service.fleet.closed:
            await asyncio.sleep(_LOOK_S)  # no thread waits: there are not many, and pages need them
        if snapshot.state is not State.READY:  # unloaded meanwhile, or the server ends: there is no error then
            raise snapshot.error or Cancelled(f"{body.model_name} was not loaded: the load was ended.")
        return describe(snapshot)

    @routes.post("/v1/internal/model/unload")
    def unload(body: UnloadBody | None = None) -> dict[str, Any]:
        service.unload(body.model_name if body else "")
        return describe(service.snapshot())

    @routes.post("/v1/internal/model/cancel")
    def cancel() -> dict[str, Any]:
        service.cancel()
        return describe(service.snapshot())

    @routes.post("/v1/internal/model/plan")
    def plan(body: PlanBody) -> dict[str, Any]:
        view = service.view(body.model_name, body.args, source="api")
        if view.problem:
            raise view.problem
        if view.fit is None:
            raise ModelNotFound("No model is named.", "Name one in model_name.")
        planned = view.fit.plan
        return {**planned.to_dict(), "fits": view.fit.fits, "notes": [*view.notes, *planned.notes]}


def describe(snapshot: Snapshot, *, with_details: bool = True) -> dict[str, Any]:
    """The state in full, for programs."""
    loaded = snapshot.loaded
    return {
        "version": snapshot.version,
        "state": snapshot.state.value,
        "model_name": loaded.order.name if loaded else None,
        "lora_names": [choice.name for choice in loaded.order.adapters] if loaded else [],
        "lora_weights": [choice.weight for choice in loaded.order.adapters] if loaded else [],
        "options": _options(loaded) if loaded else {},
        "context_tokens": loaded.order.ctx_tokens if loaded else None,
        "device_bytes": loaded.report.device_bytes if loaded else {},
        "footprint_bytes": loaded.report.footprint_bytes if loaded else None,
        "layer_classes": loaded.report.layer_classes if loaded else {},
        "notes": [*(loaded.report.notes if loaded else ()), *snapshot.notes],
        "error": error_body(snapshot.error, with_details=with_details) if snapshot.error else None,
    }


def _options(loaded: Loaded) -> dict[str, Any]:
    """The options that it was loaded with; of LoRAs those that are active now."""
    options = {name: getattr(loaded.order.options, name) for name in LOAD_OPTIONS}
    return {**options, "lora": entries_of(loaded.order.adapters)}
