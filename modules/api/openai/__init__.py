"""OpenAI's routes: models, chat completions, completions, embeddings."""

from __future__ import annotations

from fastapi import APIRouter

from modules.api.openai import chat, completions, embeddings, models
from modules.api.openai.running import Lane
from modules.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")
    lane = Lane()
    routes.include_router(models.router(service))
    for group in (chat, completions, embeddings):
        routes.include_router(group.router(service, lane))
    return routes
