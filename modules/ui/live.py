"""The text of answers while they come, for the page's own script.

Gradio renders an answer's Markdown every two seconds; what has come since then, live.js adds as plain text.
Rendering ten times a second instead would take a third of the speed from a model that shares the processor.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

SEND_S = 0.25  # four times a second: fluent to read, and a twentieth of what rendering costs
ROUTE = "/live"


@dataclass
class Live:
    """One answer that is coming. Written by the thread that reads it from the worker."""

    place: str  # the HTML id of the chat that shows it
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # nobody else can guess it
    text: str = ""
    over: bool = False

    def line(self, words: str) -> str:
        """The line under the chat: ``words``, and for the script which answer comes and how much is rendered."""
        rendered = len(self.text.encode("utf-16-le", "surrogatepass")) // 2  # as JavaScript counts
        data = f'data-live="{self.name}" data-place="{self.place}" data-rendered="{rendered}"'
        return f'<div class="small" {data}>{escape(words)}</div>'


class LiveAnswers:
    """The answers that are coming now, by name. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, Live] = {}

    @contextmanager
    def begin(self, place: str) -> Iterator[Live]:
        """A new answer, which may be followed until the block is left."""
        live = Live(place)
        with self._lock:
            self._answers[live.name] = live
        try:
            yield live
        finally:
            live.over = True
            with self._lock:
                self._answers.pop(live.name, None)

    def find(self, name: str) -> Live | None:
        with self._lock:
            return self._answers.get(name)


async def _lines(live: Live | None) -> AsyncIterator[bytes]:
    """The text as it comes, each line a JSON string of what is new; nothing where no such answer is coming."""
    sent = 0
    while live is not None and not live.over:
        if len(live.text) > sent:
            new, sent = live.text[sent:], len(live.text)
            yield json.dumps(new).encode() + b"\n"
        await asyncio.sleep(SEND_S)


def mount(app: FastAPI, answers: LiveAnswers) -> None:
    """The route that live.js follows an answer by."""

    @app.get(ROUTE + "/{name}", include_in_schema=False)
    async def live(name: str) -> StreamingResponse:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_lines(answers.find(name)), media_type="application/x-ndjson", headers=headers)
