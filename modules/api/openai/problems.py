"""Errors in OpenAI's form."""

from __future__ import annotations

import re
from typing import Any

from modules.errors import LoadstoneError, NothingLoaded, RequestTooLong

_OTHER_STATUS = {
    # OpenAI's clients try a 409 again, and take a 422 for something else.
    NothingLoaded.kind: 404,
    RequestTooLong.kind: 400,
}
_OTHER_CODE = {RequestTooLong.kind: "context_length_exceeded"}


def serves(path: str) -> bool:
    """Whether the route at this path is one of OpenAI's."""
    return path.startswith("/v1/") and not path.startswith("/v1/internal/")


def error_body(error: LoadstoneError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body). The message holds the hint too: clients show nothing else."""
    status = _OTHER_STATUS.get(error.kind, 400 if error.status == 422 else error.status)
    return status, {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if status < 500 else "server_error",
            "param": parameter(error.message),
            "code": _OTHER_CODE.get(error.kind, error.kind),
        }
    }


def parameter(message: str) -> str | None:
    """The parameter that a message is about: ``stop`` of "stop: an empty text is none."."""
    found = re.match(r"(?:The request's body cannot be used: )?([a-z_]+)(?:\.[\w.\[\]-]+)?: ", message)
    return found[1] if found else None
