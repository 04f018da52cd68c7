"""Every request, from before the access check to its last byte, told to the service's traffic."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modules.service.traffic import SEEN, Traffic

_GONE = 499  # the client went before there was an answer


class Watching:
    """ASGI around ``app``."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = self._traffic.begin(scope["method"])
        seen.status = _GONE

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            await send(message)

        try:
            await self._app({**scope, SEEN: seen}, receive, noted)
        finally:
            self._traffic.end(seen)
