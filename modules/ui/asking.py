"""A question before something is thrown away: nothing that took an hour to make is gone by one click."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.ui.common import DIRECT, small, warn

# The first of the places that can be seen and used gets the focus, unless it is somewhere by now.
_FOCUS = """() => setTimeout(() => {
  const usable = (node) => node && !node.disabled && node.offsetParent !== null;
  if (%s && document.activeElement !== document.body && usable(document.activeElement)) return;
  %s.map((place) => document.querySelector(place)).find(usable)?.focus() }, 60)"""


@dataclass(frozen=True)
class Question:
    """``about``: what would be thrown away, whatever is chosen when the answer comes."""

    about: Any
    words: str


@dataclass(frozen=True)
class Asking:
    """The place of a question, which is hidden until it is asked. Its row is so by page.css, without a button to show:
    Gradio 6.31 shows a row that is to be "hidden"."""

    name: str
    words: gr.HTML
    yes: gr.Button
    no: gr.Button
    about: gr.State

    @property
    def place(self) -> list[Any]:
        """What :func:`shown` updates."""
        return [self.words, self.yes, self.no, self.about]


def build(name: str, yes: str, no: str) -> Asking:
    """Lay out the question's place. ``name``: the beginning of its HTML ids. ``yes``, ``no``: what the buttons say."""
    words = gr.HTML(elem_id=f"{name}-question", elem_classes="tight", padding=False)
    common: dict[str, Any] = {"size": "sm", "min_width": 80, "visible": "hidden"}
    with gr.Row(elem_id=f"{name}-ask", elem_classes="flow"):
        do = gr.Button(f"Yes, {yes}", variant="stop", elem_id=f"{name}-yes", **common)
        keep = gr.Button(f"No, {no}", elem_id=f"{name}-no", **common)
    return Asking(name, words, do, keep, gr.State())


def shown(asked: Question | str) -> list[Any]:
    """Updates for ``asking.place``. A text is the reason why there is nothing to ask."""
    if isinstance(asked, str):
        return [small(asked) if asked else "", *[gr.update(visible="hidden")] * 2, None]
    words = f'<div class="note" role="alert">{escape(asked.words)}</div>'
    return [words, *[gr.update(visible=True)] * 2, asked.about]


def wire(
    asking: Asking, opener: gr.Button, ask: Callable[..., Question | str], inputs: Any,
    act: Callable[..., list[Any]], act_inputs: Sequence[Any], outputs: Sequence[Any], *,
    back: Sequence[str] = (), acts: dict[str, Any] = DIRECT,
) -> None:  # fmt: skip
    """``opener`` asks what ``ask`` says of ``inputs``; a yes does ``act`` of that and ``act_inputs``, for ``outputs``.

    ``back``: selectors of where the focus goes when the opener is gone. ``acts``: how ``act`` is sent; an error of it
    pops up, for which it has to be QUIET.
    """
    place = asking.place
    opened = opener.click(lambda *values: shown(ask(*values)), inputs, place, **DIRECT)
    opened.then(None, None, None, js=_focus([f"#{asking.name}-no"], only_lost=False))
    returns = _focus([f"#{opener.elem_id}", *back], only_lost=True)
    asking.no.click(lambda: shown(""), None, place, **DIRECT).then(None, None, None, js=returns)

    def answered(about: Any, *values: Any) -> list[Any]:
        try:
            updates = act(about, *values)
        except LoadstoneError as error:
            warn(error)
            updates = [gr.skip()] * len(outputs)
        return [*shown(""), *updates]

    done = asking.yes.click(answered, [asking.about, *act_inputs], [*place, *outputs], **acts)
    done.then(None, None, None, js=returns)


def _focus(places: Sequence[str], *, only_lost: bool) -> str:
    return _FOCUS % (json.dumps(only_lost), json.dumps(list(places)))
