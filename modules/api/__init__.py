"""HTTP routes: a thin skin over ``service.py``. Bodies and answers are JSON.

One file a group of routes, each with ``router(service)``; a new group is one more in :func:`install`.
"""

from __future__ import annotations

from fastapi import FastAPI

from modules.api import answers, downloads, internal, loras, openai, tokens
from modules.service import Service


def install(app: FastAPI, service: Service) -> None:
    """Add the routes and the error answers to ``app``."""
    for group in (internal, tokens, downloads, loras, openai):
        app.include_router(group.router(service))
    answers.install(app)
