"""What a route learns of its request, for the log and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from modules.service.traffic import Seen

SEEN = "loadstone.seen"  # its place in the scope; the access check writes the role there


def seen_of(scope: Mapping[str, Any]) -> Seen:
    """Where to write what is learnt; nobody reads it where nobody watches."""
    seen = scope.get(SEEN)
    return seen if isinstance(seen, Seen) else Seen()


class NoteRoute:
    """ASGI around the API's application: writes down which route answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            route = scope.get("route")
            if isinstance(route, APIRoute) and getattr(route.endpoint, "__module__", "").startswith("modules.api"):
                seen_of(scope).route = route.path
