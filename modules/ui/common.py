"""What the tabs share: how events are wired, messages that pop up, tables, text made safe for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from threading import Lock
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
# An answer to the request itself and not through Gradio's queue, for all that neither streams nor pops up a message.
# The queue answers on a stream that it closes when nothing is asked for; a question that comes at that moment is
# never answered, and its button is dead from then on.
DIRECT: dict[str, Any] = {"queue": False, **QUIET}


@contextmanager
def top(status: str, *, login: bool) -> Iterator[gr.HTML]:
    """The row above the tabs; gives the place of the status line. What is made in the block stands beside it.

    ``login``: with a button to log out.
    """
    with gr.Row(elem_id="top"):
        gr.HTML("<h1>Loadstone</h1>", elem_id="brand", padding=False)
        yield gr.HTML(status, elem_id="status", padding=False)
        if login:
            gr.HTML(
                '<form method="post" action="logout"><button class="plain">Log out</button></form>',
                elem_id="logout", padding=False,
            )  # fmt: skip


def inform(text: str) -> None:
    """A message that pops up. Names from disk may stand in it: nothing in it is taken for HTML."""
    gr.Info(escape(text))


def warn(error: LoadstoneError) -> None:
    """An error that pops up for as long as it takes to read."""
    gr.Warning(escape(str(error)), title=escape(error.title), duration=10)


def markdown(text: str) -> str:
    """``text`` with everything that Markdown would take for a sign of its own made plain."""
    return re.sub(r"([\\`*_{}\[\]()#+!<>|~])", r"\\\1", text)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name and a text as an HTML table; rows without a text are left out."""
    cells = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows if text)
    return f'<table class="facts">{cells}</table>'


def bar(name: str, percent: float) -> str:
    """A progress bar, named for who does not see it."""
    return (
        f'<div class="bar" role="progressbar" aria-label="{escape(name)}" aria-valuenow="{percent:.0f}" '
        f'aria-valuemin="0" aria-valuemax="100"><div class="fill planned" style="width:{percent:.1f}%"></div></div>'
    )


MOVING_BAR = (  # how far it is, nobody knows
    '<div class="bar" role="progressbar" aria-label="under way"><div class="fill planned moving"></div></div>'
)


def small(text: str) -> str:
    return f'<div class="small">{escape(text) or "&nbsp;"}</div>'


def edits(fields: Iterable[Any]) -> list[Any]:
    """The events that tell of a change by hand. Leaving a field counts: Gradio does not tell of pasted text."""
    return [event for field in fields for name in ("input", "blur") if (event := getattr(field, name, None))]


def on_latest(
    events: Sequence[Any], action: Callable[..., Any], inputs: Any, outputs: Sequence[Any], **how: Any
) -> Any:
    """Wire ``action`` to what is asked over and over, and of which the last answer counts; gives the event.

    What is asked while an answer is under way is asked again after it. Two questions that come at nearly the same time
    are under way together all the same (Gradio 6.31), and the first may be answered last.
    """
    wiring: dict[str, Any] = {**DIRECT, "trigger_mode": "always_last", **how}
    return gr.on(list(events), newest(len(outputs), action), inputs, list(outputs), **wiring)


def newest(outputs: int, action: Callable[..., Any]) -> Callable[..., Any]:
    """``action``, whose answer changes nothing where the same page has asked again before it was there."""
    asked: dict[str | None, object] = {}  # the newest question under way, by page
    lock = Lock()

    def run(request: gr.Request, *arguments: Any) -> Any:
        mine = object()
        with lock:
            asked[request.session_hash] = mine
        try:
            answer = action(*arguments)
        finally:
            with lock:
                if last := asked.get(request.session_hash) is mine:
                    del asked[request.session_hash]
        return answer if last else _unchanged(outputs)

    run.__module__ = action.__module__  # whose function it is on the page
    return run


def guarded(outputs: int, action: Callable[..., Any]) -> Callable[..., Any]:
    """``action``, which an error of ours ends with a message that pops up and nothing changed."""

    def run(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except LoadstoneError as error:
            warn(error)
            return _unchanged(outputs)

    return run


def _unchanged(outputs: int) -> Any:
    """What a handler gives that changes none of its ``outputs``."""
    return [gr.skip() for _ in range(outputs)] if outputs != 1 else gr.skip()


def queue(page: gr.Blocks) -> None:
    """Queue the page's events, and let Gradio look for them 50 times a second and not 1,000 times.

    A model that computes on the processor loses a tenth of its speed to a process that wakes so often. There is no
    public setting for it.
    """
    page._queue.default_concurrency_limit = 16
    page._queue.sleep_when_free = 0.02
    page._queue.progress_update_sleep_when_free = 1.0  # nothing here uses gr.Progress
