"""Answers on the Chat tab: what the model is asked, and how its text arrives on the page."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.protocol import Chunk, Done, Piece, Waiting
from modules.service import Service, Stop, awake, comes, nothing_loaded
from modules.supervisor import Snapshot
from modules.ui import tags
from modules.ui.common import small, warn
from modules.ui.live import Live, LiveAnswers

RENDER_S = 2  # between two renderings of the Markdown; live.js shows the text that comes meanwhile
CHAT, COMPLETION = "Chat", "Completion"
History = list[dict[str, Any]]
Updates = list[Any]  # for ChatTab.follows_answer: chatbot, back, send, stop, line, again, undo, clear


class Stops:
    """The answer that each browser tab is waiting for, and how to stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: dict[str, Stop] = {}

    def begin(self, session: str) -> Stop:
        """The stop of a new answer. An answer that was still coming is stopped, and no longer shown."""
        stop = Stop()
        with self._lock:
            if (earlier := self._stops.get(session)) is not None:
                earlier.set()
            self._stops[session] = stop
        return stop

    def is_shown(self, session: str, stop: Stop) -> bool:
        """Whether the answer with this stop is the one that the tab shows."""
        with self._lock:
            return self._stops.get(session) is stop

    def stop(self, session: str) -> None:
        """Stop the answer; what has come stays."""
        with self._lock:
            if (stop := self._stops.get(session)) is not None:
                stop.set()

    def drop(self, session: str) -> None:
        """Stop the answer and show no more of it."""
        with self._lock:
            if (stop := self._stops.pop(session, None)) is not None:
                stop.set()


@dataclass(frozen=True)
class Question:
    """One answer to get. ``before`` and ``text``: what chat and field go back to where none came."""

    history: History
    mode: str
    system: str
    values: Mapping[str, Any]
    before: History
    text: str = ""
    loras: list[str] | None = None  # the set to answer with; None: the active one


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, which Gradio hands back as parts."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def plain(history: Sequence[Mapping[str, Any]] | None) -> History:
    """The messages of a chat on the page as role and text alone."""
    return [{"role": str(message["role"]), "content": tags.written(text_of(message))} for message in history or []]


def shown(history: Sequence[Mapping[str, Any]]) -> History:
    """The messages as a chat on the page has to have them."""
    return [{**message, "content": tags.shown(message["content"])} for message in history]


def request(question: Question) -> dict[str, Any]:
    """What the service is asked: the messages, or all text so far to be continued."""
    if question.mode == COMPLETION:
        prompt = "".join([question.system, *(message["content"] for message in question.history)])
        return {"prompt": prompt, "loras": question.loras}
    front = [{"role": "system", "content": question.system}] if question.system.strip() else []
    return {"messages": front + question.history, "loras": question.loras}


def working(history: History, line: str) -> Updates:
    """The page while an answer is awaited: Stop instead of Send, and nothing that would take the chat apart."""
    waiting = [*shown(history), {"role": "assistant", "content": ""}]
    still = [gr.update(interactive=False)] * 3
    return [waiting, gr.skip(), gr.update(visible="hidden"), gr.update(visible=True), line, *still]


def settled(history: History, line: str, *, back: str = "") -> Updates:
    """The page when no answer is awaited. ``back``: a question that goes back into the field, if that is empty."""
    free = [gr.update(interactive=True)] * 3
    return [shown(history), back or gr.skip(), gr.update(visible=True), gr.update(visible="hidden"), small(line), *free]


def nothing() -> Updates:
    return [gr.skip() for _ in range(8)]


def answer(
    service: Service, stops: Stops, lives: LiveAnswers, session: str, question: Question, *, place: str = "chatbot"
) -> Iterator[Updates]:
    """Stream an answer to the last message, as updates for ``ChatTab.follows_answer``.

    ``place``: the HTML id of the chat that shows it.
    """
    snapshot = service.snapshot()
    if snapshot.loaded is None and not comes(service, snapshot):
        yield settled(question.before, str(nothing_loaded(snapshot)), back=question.text)
        return
    stop = stops.begin(session)
    done, failure = None, None
    with lives.begin(place) as live:
        yield working(question.history, live.line("thinking …"))
        try:
            rendered = 0.0
            for chunk in _chunks(service, question, stop, session):
                if isinstance(chunk, Done):
                    done = chunk
                elif isinstance(chunk, str) and stops.is_shown(session, stop):
                    yield _said(live.line(f"Loading {chunk} …"))
                elif isinstance(chunk, Waiting) and stops.is_shown(session, stop):
                    yield _in_line(live, chunk)
                elif isinstance(chunk, Piece):
                    live.text += chunk.text
                    if (now := time.monotonic()) - rendered >= RENDER_S and stops.is_shown(session, stop):
                        rendered = now
                        yield _so_far(question, live)
        except LoadstoneError as problem:
            failure = problem
        finally:
            stop.set()
    if stops.is_shown(session, stop):
        yield _ended(service, question, live.text, done, failure)
    else:  # another answer, or an empty chat, stands there by now
        yield nothing()


def _chunks(service: Service, question: Question, stop: Stop, session: str) -> Iterator[Chunk | str]:
    """The answer as it comes; before it, the name of the model for as long as that has to be loaded first."""
    yield from awake(service, stop)
    if stop.wait():
        yield Done("cancelled", 0, 0, 0.0, 0.0)
    else:
        yield from service.generate(question.values, **request(question), stop=stop, user=session)


def _said(line: str) -> Updates:
    """Another line, and all else as it is."""
    updates = nothing()
    updates[4] = line
    return updates


def _in_line(live: Live, waiting: Waiting) -> Updates:
    """The line where others are answered first."""
    return _said(live.line(f"waiting, {waiting.place - 1} before you …" if waiting.place > 1 else "waiting, next …"))


def _so_far(question: Question, live: Live) -> Updates:
    """The answer as far as it has come. The line comes after the chat, and tells live.js what the chat shows."""
    updates = nothing()
    updates[0] = shown([*question.history, {"role": "assistant", "content": live.text}])
    updates[4] = live.line("answering …")
    return updates


def _ended(
    service: Service, question: Question, text: str, done: Done | None, failure: LoadstoneError | None
) -> Updates:
    line = done_in_words(done, service.snapshot())
    if failure is not None:
        warn(failure)
        line = str(failure)
    if text:
        return settled([*question.history, {"role": "assistant", "content": text}], line)
    if done is not None and done.finish_reason != "cancelled":  # the model had nothing to say
        return settled(question.history, line)
    return settled(question.before, line, back=question.text)  # it is as if nothing had been asked


def done_in_words(done: Done | None, snapshot: Snapshot) -> str:
    """``34.1 tokens/s · 96 tokens · context 312 of 8,192 · first token after 0.2 s``."""
    if done is None:
        return ""
    parts = ["stopped"] if done.finish_reason == "cancelled" else []
    if done.seconds > 0 and done.completion_tokens > 1:
        parts.append(f"{(done.completion_tokens - 1) / done.seconds:.1f} tokens/s")
    if done.completion_tokens:
        parts.append(f"{done.completion_tokens:,} tokens")
    if done.finish_reason == "length":
        parts.append("cut at the length limit")
    if done.prompt_tokens and snapshot.loaded:
        used = done.prompt_tokens + done.completion_tokens
        parts.append(f"context {used:,} of {snapshot.loaded.order.ctx_tokens:,}")
        parts.append(f"first token after {done.first_token_seconds:.1f} s")
    return " · ".join([*parts, *([done.left_out] if done.left_out else [])])
