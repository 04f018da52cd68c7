"""Which route answers a request, for the log and the figures."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from modules.service.traffic import seen_of


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
                seen_of(scope).route = declared(route, scope["path"].removeprefix(scope.get("root_path", "")))


def declared(route: APIRoute, path: str) -> str:
    """The route's path as it is declared: ``/v1/models/{name:path}``. Of a router in a router it knows its own part."""
    begins = (place for place, sign in enumerate(path) if sign == "/")
    front = next((path[:begin] for begin in begins if route.path_regex.match(path[begin:])), "")
    return front + route.path
