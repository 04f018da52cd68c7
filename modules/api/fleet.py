"""Routes under ``/v1/internal/model`` for several models at a time: which are loaded, pin one, show one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from modules.service import Service
from modules.supervisor import Place


class NameBody(BaseModel):
    """The name of a model that is loaded."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str


class PinBody(NameBody):
    """``pinned`` true: it stays until somebody unloads it, however long nobody uses it."""

    pinned: bool = True


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/v1/internal/model/loaded")
    def loaded() -> dict[str, Any]:
        return places(service)

    @routes.post("/v1/internal/model/pin")
    def pin(body: PinBody) -> dict[str, Any]:
        service.fleet.pin(body.model_name, body.pinned)
        return places(service)

    @routes.post("/v1/internal/model/front")
    def front(body: NameBody) -> dict[str, Any]:
        service.fleet.to_front(body.model_name)
        return places(service)

    return routes


def places(service: Service) -> dict[str, Any]:
    """Every model that is loaded or being loaded; the first one is the one that the page shows."""
    return {"models": [_place(place) for place in service.fleet.places()], "most": service.fleet.most}


def _place(place: Place) -> dict[str, Any]:
    return {
        "model_name": place.name,
        "state": "ready" if place.loaded else place.state.value,
        "front": place.front,
        "pinned": place.pinned,
        "uses": place.uses,
        "idle_seconds": round(place.idle_s, 1),
        "ends_in_seconds": None if place.ends_in_s is None else round(place.ends_in_s, 1),
    }
