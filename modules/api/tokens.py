"""Routes for the loaded model's tokens, by text-generation-webui's names."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter

from modules.api.openai.bodies import FIRST, Body
from modules.service import Service


class TextBody(Body):
    text: str


class TokensBody(Body):
    tokens: Annotated[list[int], FIRST]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/internal/encode")
    def encode(body: TextBody) -> dict[str, Any]:
        tokens = service.encode(body.text)
        return {"tokens": tokens, "length": len(tokens)}

    @routes.post("/v1/internal/decode")
    def decode(body: TokensBody) -> dict[str, str]:
        return {"text": service.decode(body.tokens)}

    @routes.post("/v1/internal/token-count")
    def token_count(body: TextBody) -> dict[str, int]:
        return {"length": len(service.encode(body.text))}

    return routes
