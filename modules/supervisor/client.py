"""Commands to a worker: plain HTTP on the loopback address.

``http.client`` and not a client library: the answer's socket is in hand, so that a thread can end a read
that another thread waits in; no proxy from the environment comes between; nothing is pooled that a worker
which has ended could leave behind. It is imported late, since it costs more than the rest of this package.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from modules.errors import LoadstoneError, error_from_dict
from modules.protocol import encode

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

HOST = "127.0.0.1"


def connect(port: int, timeout_s: float | None) -> HTTPConnection:
    """An open connection. ``timeout_s`` is for each wait on it; None waits for ever. Raises OSError."""
    from http.client import HTTPConnection

    connection = HTTPConnection(HOST, port, timeout=timeout_s)
    connection.connect()
    return connection


def send(connection: HTTPConnection, secret: str, method: str, path: str, message: Any = None) -> None:
    """Send one command. Raises OSError and HTTPException."""
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    connection.request(method, path, None if message is None else encode(message), headers)


def accepted(response: HTTPResponse) -> HTTPResponse:
    """The response, if the worker took the command. Raises the error that it was refused with."""
    if response.status >= 400:
        raise refusal(response.status, response.read())
    return response


def refusal(status: int, body: bytes) -> LoadstoneError:
    try:
        return error_from_dict(json.loads(body))
    except (ValueError, AttributeError):
        text = body[:500].decode("utf-8", "replace")
        return LoadstoneError(f"The model's process answered with HTTP status {status}.", details=text)
