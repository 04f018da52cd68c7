"""``/metrics`` for Prometheus, and ``/healthz``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from modules.service import Service
from modules.service.traffic import CONTENT_TYPE


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(service.figures(), media_type=CONTENT_TYPE)

    @routes.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return routes
