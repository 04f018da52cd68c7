"""The one door: every request to page and API passes it before anything else sees it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping
from urllib.parse import parse_qs, quote

from starlette.authentication import AuthCredentials
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modules.access import login, peers
from modules.access.attempts import Attempts
from modules.access.credentials import Credentials, Role, guessable, said_in
from modules.access.hosts import Hosts, host_port, refusal
from modules.access.rules import OPEN_ROUTES, guest_may
from modules.access.sessions import Login, Sessions, cookie_name, set_cookie, token_in
from modules.errors import (
    AccessRefused,
    Cancelled,
    LoadstoneError,
    LoginRequired,
    Overloaded,
    RequestTooLarge,
    RequestTooSlow,
    TooManyAttempts,
)
from modules.service.answering import KEEP_ALIVE
from modules.service.asking import name_user, user_of
from modules.service.traffic import seen_of

MOST_BYTES = 32 * 2**20  # of a request's body
MOST_HELD_BYTES = 512 * 2**20  # of all bodies together, from when they come until they are answered
# In a body of the API, in its texts too: what parsing makes of each costs a thousand times its bytes.
MOST_SIGNS = {b"[{": 200_000, b",": 2_000_000}
BODY_S = 120.0  # for a body to come in
_MOST_LOGIN_BYTES = 8 * 2**10
_UPLOADS = "/gradio_api/upload"  # an administrator's files are as large as they are

_API = "/v1/"
# The rest of their bodies is not waited for.
_UNREAD = (RequestTooLarge.status, RequestTooSlow.status, Overloaded.status)
# Pictures and the like from here alone: the address of one in an answer could tell another host what was said.
_SOURCES = ("img-src", "media-src", "font-src")
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "; ".join(
        ["frame-ancestors 'self'", "object-src 'none'", "base-uri 'self'", "form-action 'self'", "frame-src 'self'"]
        + [f"{source} 'self' data: blob:" for source in _SOURCES]
    ),
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class AccessMiddleware:
    """ASGI: checks Host and Origin, then who asks, then whether they may, and hands on to the role's application.

    ``applications``: what each role gets to see; a role without one gets the administrator's. Every answer gets the
    security headers. ``subpath``: where a proxy in front serves this, ``/llm``; with and without it are served.
    """

    def __init__(
        self,
        applications: Mapping[Role, ASGIApp],
        credentials: Credentials | None = None,
        hosts: Hosts | None = None,
        *,
        subpath: str = "",
    ) -> None:
        self.applications = applications
        self._credentials = credentials or Credentials(())
        self._hosts = hosts or Hosts()
        self._subpath = "/" + subpath.strip("/") if subpath.strip("/") else ""
        self._sessions = Sessions()
        self._attempts = Attempts()
        self._held = _Held()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.applications[Role.ADMIN](scope, receive, send)
            return
        inner = self._inner(scope["path"])
        if self._subpath:
            path = self._subpath + inner
            scope = {**scope, "path": path, "raw_path": quote(path).encode(), "root_path": self._subpath}
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] in _UNREAD:
                    headers["connection"] = "close"
            await send(message)

        try:
            with _Limited(receive, scope, inner, self._held) as limited:
                application = await self._admit(scope, limited, inner)
                await application(scope, limited, send_with_headers)
        except LoadstoneError as error:
            if begun:
                raise
            seen_of(scope).kind = error.kind
            await _refused(error)(scope, receive, send_with_headers)

    def _inner(self, path: str) -> str:
        """The path without the subpath."""
        if self._subpath and (path == self._subpath or path.startswith(self._subpath + "/")):
            return path[len(self._subpath) :] or "/"
        return path or "/"

    async def _admit(self, scope: Scope, receive: Receive, path: str) -> ASGIApp:
        """What answers this request. Raises AccessRefused."""
        headers = Headers(scope=scope)
        error = refusal(headers, _http_scheme(scope), self._hosts)
        if error is not None:
            raise error
        method = scope.get("method", "GET")
        if path == "/login":
            return await self._login(Request(scope, receive))
        if path == "/logout" and method == "POST":
            return self._logout(scope, headers)
        if f"{method} {path}" in OPEN_ROUTES:
            return self.applications[Role.ADMIN]
        try:
            login = self._sessions.login(_token(scope, headers))
            role = await self._role(scope, headers, login)
        except LoginRequired:
            if method in ("GET", "HEAD") and "text/html" in headers.get("accept", ""):
                return RedirectResponse(f"{self._subpath}/login", 303)
            raise
        seen_of(scope).role = role.value
        scope["auth"] = AuthCredentials([KEEP_ALIVE] if role is Role.ADMIN else [])
        name_user(scope, peers.user(_client(scope), headers, login))
        if role is Role.GUEST and not guest_may(method, path):
            raise AccessRefused(
                f"{method} {path} is the administrator's.",
                "Log in as an administrator, or send the key of --admin-key.",
            )
        return self.applications.get(role, self.applications[Role.ADMIN])

    async def _role(self, scope: Scope, headers: Headers, login: Login | None) -> Role:
        """Who asks, with the ``login`` of the browser if any. Raises LoginRequired and TooManyAttempts."""
        if not self._credentials:
            return Role.ADMIN
        role = login.role if login else None
        given = headers.get("authorization", "")
        if role and given.lower().startswith("basic "):
            return role  # a browser sends it by itself, where a proxy in front asks for a password of its own
        if given:  # what is sent on purpose comes before what a browser sends by itself
            role = await self._proven(_client(scope), *said_in(given))
        if role is None:
            raise LoginRequired("The key is not known here." if given else "A login or a key is needed here.")
        return role

    async def _proven(self, client: str, secret: str, user: str) -> Role | None:
        """The role of who knows this; None for nobody. After wrong attempts from that address it takes a while.

        Raises TooManyAttempts. A secret that nobody can guess need not wait: no flood of attempts, from a neighbour
        behind the same address for one, keeps out who knows it.
        """
        role = self._credentials.role(secret, user)
        if role and not guessable(secret):
            return role
        await self._attempts.turn(client)
        if role is None:
            self._attempts.failed(client)
        elif role is Role.ADMIN:  # a guest's own key must not win fresh guesses at the administrator's
            self._attempts.succeeded(client)
        return role

    async def _login(self, request: Request) -> Response:
        """The login page, and what a login answers with."""
        if not self._credentials:
            return RedirectResponse(f"{self._subpath}/", 303)
        if request.method != "POST":
            return self._page()
        user, secret = await _user_and_secret(request)
        try:
            role = await self._proven(_client(request.scope), secret, user.strip())
        except TooManyAttempts as error:
            return self._page(user, error.message, error.status)
        if role is None:
            return self._page(user, "That is not right.", 401)
        answer = RedirectResponse(f"{self._subpath}/", 303)
        answer.headers["set-cookie"] = self._cookie(request.scope, self._sessions.begin(role, user.strip()))
        return answer

    def _page(self, user: str = "", problem: str = "", status: int = 200) -> Response:
        html = login.page(with_names=self._credentials.has_names, user=user, problem=problem)
        return HTMLResponse(html, status, {"cache-control": "no-store"})

    def _logout(self, scope: Scope, headers: Headers) -> Response:
        self._sessions.end(_token(scope, headers))
        answer = RedirectResponse(f"{self._subpath}/login", 303)
        answer.headers["set-cookie"] = self._cookie(scope, "")
        return answer

    def _cookie(self, scope: Scope, token: str) -> str:
        headers = Headers(scope=scope)
        forwarded = headers.get("x-forwarded-proto", "").split(",")[0].strip()
        secure = "https" in (_http_scheme(scope), forwarded)
        return set_cookie(_cookie_name(scope, headers), token, path=f"{self._subpath}/", secure=secure)


def _http_scheme(scope: Scope) -> str:
    scheme = str(scope.get("scheme", "http"))
    return {"ws": "http", "wss": "https"}.get(scheme, scheme)


def _cookie_name(scope: Scope, headers: Headers) -> str:
    """By the port that the browser knows, or where it is not said the one that is listened on."""
    server = scope.get("server") or ("", None)
    return cookie_name(host_port(headers.get("host", "")) or server[1])


def _token(scope: Scope, headers: Headers) -> str:
    """The token of a login in the browser's cookies; "" for none."""
    return token_in(headers.get("cookie", ""), _cookie_name(scope, headers))


def _client(scope: Scope) -> str:
    """What stands for the machine that asks."""
    client = scope.get("client")
    return peers.peer(str(client[0])) if client else ""


async def _user_and_secret(request: Request) -> tuple[str, str]:
    """What a login sends, each "" where it is left out. Raises RequestTooLarge, and Cancelled when the client goes."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MOST_LOGIN_BYTES:
                raise RequestTooLarge("A login is shorter than that.")
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
    except ClientDisconnect:
        raise Cancelled("The client has gone.") from None
    except ValueError:  # more fields than that
        raise RequestTooLarge("A login has a name and a password.") from None
    return fields.get("user", [""])[0], fields.get("password", [""])[0]


def _refused(error: LoadstoneError) -> Response:
    """The error in the API's form, with what OpenAI's clients look for beside it."""
    body = {**error.to_dict(), "type": "invalid_request_error", "param": None, "code": error.kind}
    headers = {"www-authenticate": "Bearer"} if isinstance(error, LoginRequired) else {}
    if error.retry_after_s:
        headers["retry-after"] = str(error.retry_after_s)
    return JSONResponse({"error": body}, error.status, headers)


class _Held:
    """How many bytes of bodies are there, of all requests together. Used by the event loop alone.

    A user's are no more than half of what the others leave: whoever comes next finds as much again.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()  # by user

    def take(self, user: str, count: int) -> None:
        """``count`` bytes more. Raises Overloaded."""
        others = self._bytes.total() - self._bytes[user]
        if self._bytes[user] + count > (MOST_HELD_BYTES - others) // 2:
            raise Overloaded(
                "The requests that you have under way are too large together.", "Wait for some of them to be answered."
            )
        self._bytes[user] += count

    def give_back(self, user: str, count: int) -> None:
        """They are gone."""
        self._bytes[user] -= count
        if not self._bytes[user]:
            del self._bytes[user]


class _Limited:
    """A request's messages, as long as the block runs.

    Raises RequestTooLarge for a body beyond :data:`MOST_BYTES` or :data:`MOST_SIGNS`, RequestTooSlow, and Overloaded
    where the user's bodies are too large together.
    """

    def __init__(self, receive: Receive, scope: Scope, path: str, held: _Held) -> None:
        self._receive = receive
        self._scope = scope
        self._held, self._taken = held, 0
        self._signs_left = dict(MOST_SIGNS) if path.startswith(_API) else {}
        any_size = path == _UPLOADS
        self._left = math.inf if any_size else float(MOST_BYTES)
        self._until = math.inf if any_size else time.monotonic() + BODY_S
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._left:
            raise _too_large()

    async def __call__(self) -> Message:
        if self._until == math.inf:  # the body is there: what comes now is the client's going
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._until - time.monotonic())
        except asyncio.TimeoutError:
            raise RequestTooSlow(f"The request's body has not come within {BODY_S:g} s.") from None
        self._count(message.get("body", b""))
        if not message.get("more_body", False):
            self._until = math.inf
        return message

    def _count(self, body: bytes) -> None:
        self._left -= len(body)
        if self._left < 0:
            raise _too_large()
        for signs in self._signs_left:
            self._signs_left[signs] -= sum(body.count(sign) for sign in signs)
            if self._signs_left[signs] < 0:
                told = " and ".join(signs.decode())
                raise RequestTooLarge(f"The request's body has {told} more than {MOST_SIGNS[signs]:,} times.")
        self._held.take(user_of(self._scope), len(body))
        self._taken += len(body)

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._held.give_back(user_of(self._scope), self._taken)


def _too_large() -> RequestTooLarge:
    return RequestTooLarge(f"The request's body is longer than {MOST_BYTES // 2**20} MiB.")
