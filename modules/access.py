"""Who may ask: every request's Host and Origin are checked, on the page and the API, on localhost too.

A page elsewhere on the web can make a browser send requests to 127.0.0.1, directly or through a name that
it lets point there (DNS rebinding). Neither the web framework nor Gradio stops that, so this does.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modules.errors import AccessRefused

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def host_name(authority: str) -> str:
    """The name in ``name:port``, ``[::1]:port`` or ``name``, lower case; "" for what is none."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def refusal(headers: Headers, scheme: str, allowed: frozenset[str]) -> AccessRefused | None:
    """Why a request with these headers is not served; None if it is."""
    host = headers.get("host", "")
    if host_name(host) not in allowed:
        return AccessRefused(f"This server does not go by the name {host!r}.")
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"{scheme}://{host}".lower():
        return AccessRefused(f"A page of {origin!r} may not send requests here.")
    top_level = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not top_level:
        return AccessRefused("A page of another site may not send requests here.")
    return None


class AccessMiddleware:
    """ASGI: refuses before anything else sees the request, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = LOCAL_NAMES) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        error = refusal(Headers(scope=scope), scope.get("scheme", "http"), self._allowed)
        if error is not None:
            response = JSONResponse({"error": error.to_dict()}, status_code=error.status)
            await response(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
