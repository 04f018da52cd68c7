"""Who has logged in, by the token in a browser's cookie. They end with the server."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from modules.access.credentials import Role

_COOKIE = "loadstone-login"
LIVES_S = 30 * 24 * 3600
_MOST = 4096


@dataclass(frozen=True)
class Login:
    """Somebody who has logged in. ``name``: as it was given, "" for none; ``number``: unlike every other login's."""

    role: Role
    name: str
    number: int
    until: float  # of time.monotonic()


class Sessions:
    """Tokens and what they stand for. Only a token's hash is kept."""

    def __init__(self) -> None:
        self._open: OrderedDict[bytes, Login] = OrderedDict()
        self._begun = 0
        self._lock = threading.Lock()

    def begin(self, role: Role, name: str = "") -> str:
        """A new token."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._begun += 1
            self._open[_hash(token)] = Login(role, name, self._begun, time.monotonic() + LIVES_S)
            if len(self._open) > _MOST:  # a guest who logs in ever anew puts no administrator out
                guests = (key for key, other in self._open.items() if other.role is Role.GUEST)
                del self._open[next(guests, next(iter(self._open)))]
        return token

    def login(self, token: str) -> Login | None:
        """Whom the token stands for; None where it is nobody's, or nobody's any more."""
        with self._lock:
            login = self._open.get(_hash(token))
        return login if login is not None and login.until > time.monotonic() else None

    def end(self, token: str) -> None:
        """The token stands for nobody from now on."""
        with self._lock:
            self._open.pop(_hash(token), None)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def cookie_name(port: int | None) -> str:
    """The cookie of the server that a browser reaches at this port: a browser sends those of all ports to each."""
    return f"{_COOKIE}-{port}" if port else _COOKIE


def token_in(cookies: str, name: str) -> str:
    """The token that the cookie ``name`` of a Cookie header holds; "" for none.

    Not by http.cookies, which gives up at the first cookie that it does not like: on localhost those of other
    programs come along, and some hold JSON.
    """
    pairs = (part.partition("=") for part in cookies.split(";"))
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def set_cookie(name: str, token: str, *, path: str, secure: bool) -> str:
    """The Set-Cookie header for a token; an empty token takes the cookie away."""
    age = LIVES_S if token else 0
    ending = "; Secure" if secure else ""
    return f"{name}={token}; Path={path or '/'}; Max-Age={age}; HttpOnly; SameSite=Lax{ending}"
