"""Which LoRAs the next answer is given with, and a second answer beside it with others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError, OptionError
from modules.options import LOAD_OPTIONS, adapter_text, adapters_in_words, split_adapter
from modules.service import Service
from modules.supervisor import Snapshot
from modules.ui.answering import Question, Stops, Updates, answer, nothing
from modules.ui.cards import active_in_words
from modules.ui.common import QUIET, small
from modules.ui.live import LiveAnswers

ACTIVE, BASE, NONE = "active", "base", "none"
_BASE_WORDS = "the base model"
ASK = f"(beside) => {{ if (beside && beside !== '{NONE}') document.getElementById('ask-beside').click() }}"
Choices = list[tuple[str, str]]


@dataclass(frozen=True)
class ChatLoras:
    """The widgets. ``chosen`` is for the answer, ``beside`` for a second one in ``other``."""

    chosen: gr.Dropdown
    beside: gr.Dropdown
    other: gr.Chatbot
    ask: gr.Button  # hidden; clicked by the page when an answer has come and a second one is wished


def build_other() -> gr.Chatbot:
    """The place of the second answer, beside the conversation."""
    return gr.Chatbot(
        height="calc(100dvh - 330px)", min_height=260, buttons=["copy"], layout="bubble", elem_id="other",
        sanitize_html=True, visible="hidden", placeholder="The answer with these LoRAs.", feedback_options=None,
    )  # fmt: skip


def build(other: gr.Chatbot) -> ChatLoras:
    """The two menus; they are there where there are LoRAs."""
    common: dict[str, Any] = {"visible": "hidden", "allow_custom_value": True, "interactive": True}
    chosen = gr.Dropdown(
        choices=[("as applied", ACTIVE)], value=ACTIVE, label="Answer with", elem_id="chat-loras",
        info="For this message alone; or write a set: pirate 0.5 + cheese", **common,
    )  # fmt: skip
    beside = gr.Dropdown(
        choices=[("nothing", NONE)], value=NONE, label="Beside it", elem_id="chat-beside",
        info="Answers the same question once more, to compare.", **common,
    )  # fmt: skip
    ask = gr.Button("ask", visible="hidden", elem_id="ask-beside")
    return ChatLoras(chosen, beside, other, ask)


def set_of(value: str | None) -> list[str] | None:
    """The set that a menu's value names, as the service takes it: None is the active one, empty the base model.

    What was written by hand is ``pirate 0.5 + cheese`` or ``pirate:0.5 + cheese``. Raises OptionError.
    """
    if not value or value == ACTIVE:
        return None
    if value == BASE:
        return []
    if value.startswith("["):
        return list(LOAD_OPTIONS["lora"].parse(value))
    return list(LOAD_OPTIONS["lora"].parse([_entry(part) for part in value.split("+")]))


def _entry(text: str) -> str:
    """``pirate 0.5`` as the option names it; a name that is followed by no number stays as it is."""
    name, space, number = text.strip().rpartition(" ")
    try:
        return adapter_text(name.strip(), float(number)) if space else text.strip()
    except ValueError:
        return text.strip()


def in_words(value: str | None, snapshot: Snapshot) -> str:
    """What a menu's value names, for a label: ``pirate 0.5 + cheese``."""
    try:
        named = set_of(value)
    except OptionError:
        return str(value)
    if named is None:
        return (active_in_words(snapshot.loaded) if snapshot.loaded else "") or _BASE_WORDS
    return adapters_in_words(map(split_adapter, named)) or _BASE_WORDS


def choices(service: Service) -> Choices:
    """The sets to choose from: the active one, the base model, and each LoRA that fits what is loaded."""
    snapshot = service.snapshot()
    loaded = snapshot.loaded
    fitting = [offer.lora.name for offer in service.loras.offers(loaded.order.name) if offer.fits] if loaded else []
    active = (active_in_words(loaded) if loaded else "") or "none"
    single = [(name, json.dumps([adapter_text(name, 1.0)])) for name in fitting]
    return [(f"as applied ({active})", ACTIVE), (_BASE_WORDS, BASE), *single]


def menu_updates(service: Service) -> list[Any]:
    """Updates for the two menus. What is chosen stays chosen."""
    offered = choices(service)
    shown: Any = True if len(offered) > 2 else "hidden"
    return [
        gr.update(choices=offered, visible=shown),
        gr.update(choices=[("nothing", NONE), *offered], visible=shown),
    ]


def refused(error: LoadstoneError) -> Updates:
    """The page where a second answer was not even begun: the line says why."""
    updates = nothing()
    updates[4] = small(str(error))
    return updates


@dataclass(frozen=True)
class Comparison:
    """The second answers of every browser tab."""

    service: Service
    stops: Stops
    lives: LiveAnswers

    def shown(self, chosen: str | None, beside: str | None) -> list[Any]:
        """Updates for the second place and the conversation: side by side, each under its LoRAs' names."""
        snapshot, on = self.service.snapshot(), beside not in (None, "", NONE)
        return [
            gr.update(visible=True if on else "hidden", label=in_words(beside, snapshot)),
            gr.update(show_label=on, label=in_words(chosen, snapshot)),
        ]

    def answer(self, session: str, question: Question, beside: str | None) -> Iterator[Updates]:
        """A second answer to the question that was just answered."""
        if beside in (None, "", NONE) or not question.history:
            yield nothing()
            return
        try:
            asked = replace(question, loras=set_of(beside), before=question.history)
        except LoadstoneError as error:
            yield refused(error)
            return
        for updates in answer(self.service, self.stops, self.lives, session, asked, place="other"):
            yield [updates[0], gr.skip(), *updates[2:]]  # the next message may be being typed

    def stop(self, request: gr.Request) -> None:
        self.stops.stop(str(request.session_hash))

    def clear(self, request: gr.Request) -> list[Any]:
        self.stops.drop(str(request.session_hash))
        return []


def follow(events: Sequence[Any], loras: ChatLoras, service: Service) -> None:
    """Offer what fits the loaded model, on each of ``events``: the page is opened, the state has changed, and the tab
    is shown, before which Gradio 6.31 forgets that what it has not drawn yet is to be visible."""
    outputs = [loras.chosen, loras.beside]
    gr.on(list(events), lambda: menu_updates(service), None, outputs, queue=False, trigger_mode="multiple", **QUIET)


def wire(loras: ChatLoras, chatbot: gr.Chatbot, clears: Sequence[Any], stop: gr.Button, comparison: Comparison) -> None:
    """Connect the menus. ``clears``: what begins a new chat."""
    menus = [loras.chosen, loras.beside]
    gr.on([menu.change for menu in menus], comparison.shown, menus, [loras.other, chatbot], queue=False, **QUIET)
    stop.click(comparison.stop, None, None, queue=False, **QUIET)
    gr.on(list(clears), comparison.clear, None, loras.other, queue=False, **QUIET)
