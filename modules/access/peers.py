"""Who is at the other end, as far as addresses and what is sent with a request tell."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping

from modules.access.credentials import said_in
from modules.access.sessions import Login


def peer(address: str) -> str:
    """What stands for a machine: its IPv4 address, or its IPv6 network of 2⁶⁴ addresses, all of which it may have.

    What is no address (a socket's path, "") stands for itself.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(found) if found.is_loopback else str(ipaddress.ip_network((found, 64), strict=False))


def is_loopback(address: str) -> bool:
    """Whether that peer is on this machine: a person, a program, or a proxy that stands for many."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return not address  # a Unix socket's


def user(address: str, headers: Mapping[str, str], login: Login | None = None) -> str:
    """What stands for one user: a machine, and the key or name that is sent, in whatever form. Holds no secret.

    A Basic header beside a cookie is a browser's own and proves nothing: ``login``, the one in the cookie, does. Its
    name counts; on this machine's own address, which may be a proxy's for many people, each login does.
    """
    given = headers.get("authorization", "")
    if headers.get("cookie") and given.lower().startswith("basic "):
        given = ""
    secret, name = said_in(given)
    if login is not None and not given:
        secret, name = str(login.number) if is_loopback(peer(address)) else "", login.name
    digest = hashlib.sha256(f"{len(name)}:{name}:{secret}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{peer(address)} {digest[:16]}"
