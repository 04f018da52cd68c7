"""The names that the server goes by: every request's Host and Origin are checked against them, on localhost too.

A page elsewhere on the web can make a browser send requests to 127.0.0.1, directly or through a name that
it lets point there (DNS rebinding). Neither the web framework nor Gradio stops that, so this does.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from modules.errors import AccessRefused

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_LOOK_AGAIN_S = 5.0  # a machine gets another address now and then


def host_name(authority: str) -> str:
    """The name in ``name:port``, ``[::1]:port`` or ``name``, lower case; "" for what is none."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def host_port(authority: str) -> int | None:
    """The port in ``name:port``; None where there is none."""
    try:
        return urlsplit(f"//{authority}").port
    except ValueError:
        return None


def refusal(headers: Headers, scheme: str, allowed: Iterable[str] | Hosts) -> AccessRefused | None:
    """Why a request with these headers is not served; None if it is.

    What a proxy forwards counts beside what it sends itself, never instead of it: a page that reached this
    server under a name of its own could send such headers too.
    """
    hosts = allowed if isinstance(allowed, Hosts) else Hosts(allowed)
    authorities = [headers.get("host", ""), *_listed(headers.get("x-forwarded-host"))]
    for authority in authorities:
        if not hosts.known(host_name(authority)):
            return AccessRefused(
                f"This server does not go by the name {authority!r}.",
                "Open the page under the address that the server printed, or name this one with --allowed-host.",
            )
    schemes = {scheme, *_listed(headers.get("x-forwarded-proto"))}
    own = {f"{one}://{authority}".lower() for one in schemes for authority in authorities}
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in own:
        return AccessRefused(f"A page of {origin!r} may not send requests here.")
    top_level = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not top_level:
        return AccessRefused("A page of another site may not send requests here.")
    return None


def _listed(header: str | None) -> list[str]:
    """What proxies have put down, the first one first."""
    return [part.strip() for part in (header or "").split(",") if part.strip()]


class Hosts:
    """The names and addresses under which requests are answered. ``listening``: this machine's own count too."""

    def __init__(self, names: Iterable[str] = LOCAL_NAMES, *, listening: bool = False) -> None:
        self._given = {name.lower().rstrip(".") for name in names}
        self._listening = listening
        self._own: frozenset[str] = frozenset()
        self._looked = -_LOOK_AGAIN_S
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        """From now on the server goes by this name too."""
        self._given.add(name.lower())

    def known(self, name: str) -> bool:
        """Whether the server goes by this name, as :func:`host_name` gives it."""
        if name in self._given or name in self._own:
            return True
        return self._listening and bool(name) and name in self._look()

    def _look(self) -> frozenset[str]:
        with self._lock:
            if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
                self._own = frozenset({*machine_names(), *machine_addresses()})
                self._looked = time.monotonic()
            return self._own


def machine_names() -> list[str]:
    """What this machine is called on the network."""
    name = socket.gethostname().lower()
    short = name.split(".")[0]
    return list(dict.fromkeys([name, short, f"{short}.local"]))


def machine_addresses() -> list[str]:
    """This machine's addresses, IPv4 first; no loopback and none that only this link knows."""
    import psutil

    found: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family in found:
                found[address.family].append(address.address.split("%")[0].lower())
    every = [*found[socket.AF_INET], *found[socket.AF_INET6]]
    return [address for address in every if not address.startswith(("127.", "fe80:")) and address != "::1"]
