"""How the API answers what was refused or failed: every error as JSON of one form, or of OpenAI's on its routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from modules.api.openai import problems as openai
from modules.errors import InternalError, LoadstoneError, OptionError, UserError
from modules.service.traffic import seen_of


def install(app: FastAPI, *, with_details: bool = True) -> None:
    """Make ``app`` answer its errors so."""

    async def answer_error(request: Request, error: Exception) -> JSONResponse:
        """What nobody foresaw is logged by the server, traceback and all."""
        known = typed(error, request)
        seen_of(request.scope).kind = known.kind
        headers = {"retry-after": str(known.retry_after_s)} if known.retry_after_s else None
        if openai.serves(request.url.path.removeprefix(request.scope.get("root_path", ""))):
            status, body = openai.error_body(known)
        else:
            status, body = known.status, {"error": error_body(known, with_details=with_details)}
        if isinstance(error, HTTPException) and known is not error.__cause__:  # no such method, no JSON at all
            status, headers = error.status_code, dict(error.headers or {})
        return JSONResponse(body, status_code=status, headers=headers)

    for raised in (LoadstoneError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(raised, answer_error)


def error_body(error: LoadstoneError, *, with_details: bool) -> dict[str, Any]:
    """The error as data; without ``details`` for those whom this machine's paths do not concern."""
    return error.to_dict() if with_details else {**error.to_dict(), "details": ""}


def typed(error: Exception, request: Request) -> LoadstoneError:
    """The error of our own tree that stands for this one."""
    if isinstance(error, LoadstoneError):
        return error
    if isinstance(error, RequestValidationError):
        return _bad_body(error, request)
    if isinstance(error, HTTPException) and isinstance(error.__cause__, LoadstoneError):
        return error.__cause__  # raised while the body was being read
    if isinstance(error, HTTPException):
        return UserError(f"{error.detail}.", _what_it_takes(request))
    return InternalError(f"{type(error).__name__}: {error}", "The server's log tells more; please report it.")


def _bad_body(error: RequestValidationError, request: Request) -> OptionError:
    """What of the body is wrong, each part by its name: ``model_name: Field required``."""
    parts = [(".".join(str(step) for step in one["loc"][1:]), one["msg"]) for one in error.errors()]
    said = "; ".join(f"{where}: {what}" if where else what for where, what in parts)
    return OptionError(f"The request's body cannot be used: {said}.", _what_it_takes(request))


def _what_it_takes(request: Request) -> str:
    """The fields that the route's body may hold; "" for a route without one."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    return f"It is a JSON object of {', '.join(model.model_fields)}."
