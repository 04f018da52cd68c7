"""HTTP routes: a thin skin over ``service.py``. Bodies and answers are JSON.

One file a group of routes, each with ``router(service)``; a new group is one more in :func:`install`. Tracebacks and
the tails of logs, with this machine's paths in them, are told to administrators alone.
"""

from __future__ import annotations

from fastapi import FastAPI

from modules.api import answers, downloads, fleet, internal, loras, metrics, openai, seeing, status, tokens
from modules.service import Service


def install(app: FastAPI, service: Service, *, for_guests: bool = False) -> None:
    """Add the routes and the error answers to ``app``."""
    app.add_middleware(seeing.NoteRoute)
    app.include_router(openai.router(service))  # first: routes are tried in this order
    app.include_router(internal.router(service, with_details=not for_guests))
    for group in (status, metrics, fleet, tokens, downloads, loras):
        app.include_router(group.router(service))
    answers.install(app, with_details=not for_guests)
