"""``/v1/models``: everything in the library, with what is loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from modules.errors import ModelNotFound
from modules.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": _models(service)}

    @routes.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        for one in _models(service):
            if one["id"] == name:
                return one
        raise ModelNotFound(f"There is no model {name!r}.")

    return routes


def _models(service: Service) -> list[dict[str, Any]]:
    """The loaded ones first: programs without a choice of their own take the first."""
    loaded = [one.order.name for one in service.fleet.loaded()]
    listed = [
        {"id": model.name, "object": "model", "created": _made(model.path), "owned_by": "loadstone",
         "loaded": model.name in loaded}
        for model in service.models()
    ]  # fmt: skip
    return sorted(listed, key=lambda one: loaded.index(one["id"]) if one["loaded"] else len(loaded))


def _made(path: Any) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0
