"""The Chat tab: a conversation of this browser tab with the model that is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.options import GENERATION_OPTIONS, GenerationOptions
from modules.service import Service, nothing_loaded
from modules.supervisor import Snapshot
from modules.ui import chat_loras, tags
from modules.ui.answering import (
    CHAT,
    COMPLETION,
    History,
    Question,
    Stops,
    Updates,
    answer,
    nothing,
    plain,
    settled,
)
from modules.ui.common import DIRECT, QUIET, small
from modules.ui.form import option_value, widget, widget_value
from modules.ui.live import LiveAnswers
from modules.ui.remembered import Remembered

MOST_ANSWERS = 24  # at a time, the rest wait: each holds one of the web process's 40 threads while it comes
_MODE_HELP = "Chat uses the model's chat template; Completion continues the text as it stands."
_EMPTY = "Nothing said yet."
_NO_TEMPLATE = "This model has no chat template: it continues the text as it stands."
# The conversation is this browser tab's: it survives a reload of the page, and no other tab sees it.
# It is kept with every rendering, also of an answer that is still coming, but not before it was recalled. An answer of
# which nothing has come is none. Gradio takes an array for the values of several widgets: hence one within another.
_KEEP = """(messages) => { if (!window.loadstoneRecalled) return;
  try { sessionStorage.setItem('loadstone-chat', JSON.stringify(messages)) } catch {} }"""
_RECALL = """(now) => { window.loadstoneRecalled = true; if (now?.length) return [now]; let kept = [];
  try { kept = JSON.parse(sessionStorage.getItem('loadstone-chat')) ?? [] } catch {}
  const empty = ({role, content}) => role === 'assistant' && !(content?.map?.((part) => part.text).join('') ?? content);
  return [kept.filter((message) => !empty(message))] }"""

# The field is emptied here and not by the server, whose answer would wipe out what is typed next. After Enter page.js
# has done it, and kept what was sent.
_SENT = """(text, ...rest) => { const sent = window.loadstoneSent; delete window.loadstoneSent;
  if (sent) return [sent, ...rest];
  const field = document.querySelector('#message textarea');
  if (text?.trim() && field) { field.value = ''; field.dispatchEvent(new Event('input', {bubbles: true})) }
  return [text, ...rest] }"""
_BACK = "(back, text) => ['', text?.trim() ? text : back || text]"


@dataclass(frozen=True)
class ChatTab:
    chatbot: gr.Chatbot
    text: gr.Textbox
    back: gr.Textbox  # hidden: a question that goes back into the field
    send: gr.Button
    stop: gr.Button
    again: gr.Button
    undo: gr.Button
    clear: gr.Button
    mode: gr.Radio
    system: gr.Textbox
    fields: Mapping[str, gr.components.Component]
    line: gr.HTML
    loras: chat_loras.ChatLoras

    @property
    def settings(self) -> list[Any]:
        """The widgets whose values shape an answer: the mode, the LoRAs, the system prompt, then the sampling."""
        return [self.mode, self.loras.chosen, self.system, *self.fields.values()]

    @property
    def follows_loaded(self) -> list[Any]:
        """What :func:`loaded_updates` updates."""
        return [self.chatbot, self.mode]

    @property
    def follows_answer(self) -> list[Any]:
        return [self.chatbot, self.back, self.send, self.stop, self.line, self.again, self.undo, self.clear]


def build(service: Service) -> ChatTab:
    """Lay out the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            with gr.Row(elem_id="chatbots"):
                chatbot = gr.Chatbot(
                    height="calc(100dvh - 330px)", min_height=260, editable="all", buttons=["copy", "copy_all"],
                    show_label=False, layout="bubble", elem_id="chatbot", feedback_options=None, sanitize_html=True,
                    placeholder=_EMPTY,
                )  # fmt: skip
                other = chat_loras.build_other()
            line = gr.HTML(small(""), elem_id="chat-line", padding=False)
            text = gr.Textbox(
                placeholder="Message · Enter sends, Shift+Enter makes a new line, Esc stops", label="Message",
                show_label=False, lines=1, max_lines=8, elem_id="message", autofocus=True,
            )  # fmt: skip
            with gr.Row(elem_classes="unseen"):
                back = gr.Textbox("", label="Taken back")
            with gr.Row(elem_id="chat-buttons"):
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", visible="hidden", min_width=80)
                again = gr.Button("Regenerate", elem_id="regenerate", min_width=80)
                undo = gr.Button("Take back", elem_id="undo", min_width=80)
                clear = gr.Button("New chat", elem_id="clear", min_width=80)
        with gr.Column(scale=3, min_width=260):
            mode = gr.Radio([CHAT, COMPLETION], value=CHAT, label="Mode", elem_id="mode", info=_MODE_HELP)
            loras = chat_loras.build(other)
            system = gr.Textbox(label="System prompt", lines=3, max_lines=10, elem_id="system", placeholder="None")
            fields = _fields(service.generation_defaults())
    return ChatTab(chatbot, text, back, send, stop, again, undo, clear, mode, system, fields, line, loras)


def _fields(defaults: GenerationOptions) -> dict[str, gr.components.Component]:
    """The sampling options: the basic ones open, the rest folded."""
    fields: dict[str, gr.components.Component] = {}

    def add(*, basic: bool) -> None:
        for name, spec in GENERATION_OPTIONS.items():
            if spec.basic is basic:
                fields[name] = widget(spec, getattr(defaults, name))

    add(basic=True)
    with gr.Accordion("More sampling", open=False):
        add(basic=False)
    return fields


def loaded_updates(snapshot: Snapshot) -> list[Any]:
    """Updates for ``tab.follows_loaded``: without a chat template there is Completion only. Without a model nothing
    is edited: Gradio takes what follows an edited message away before anybody is asked."""
    if snapshot.loaded is None:
        return [gr.update(editable="none", placeholder=str(nothing_loaded(snapshot))), gr.skip()]
    has_template = snapshot.loaded.report.has_chat_template
    info = _MODE_HELP if has_template else _NO_TEMPLATE
    mode = gr.update(value=CHAT if has_template else COMPLETION, interactive=has_template, info=info)
    return [gr.update(editable="all", placeholder=_EMPTY), mode]


# --- what a click does ---


def _question(tab: ChatTab, history: History, before: History, raw: Sequence[Any], text: str = "") -> Question:
    """Raises OptionError where a sampling value cannot be used."""
    mode, loras, system, *rest = raw
    values = {name: option_value(GENERATION_OPTIONS[name], value) for name, value in zip(tab.fields, rest, strict=True)}
    return Question(history, mode, system or "", values, before, text, chat_loras.set_of(loras))


def _answered(history: History) -> History:
    """Without the answers at the end: what the last question was asked with."""
    kept = [*history]
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    return kept


@dataclass(frozen=True)
class Conversation:
    """What the buttons of the tab do. Gradio fills in a request before the inputs, by its annotation."""

    tab: ChatTab
    service: Service
    stops: Stops
    lives: LiveAnswers
    comparison: chat_loras.Comparison

    def _ask(
        self, request: gr.Request, history: History, before: History, raw: Sequence[Any], text: str = ""
    ) -> Iterator[Updates]:
        try:
            question = _question(self.tab, history, before, raw, text)
        except LoadstoneError as error:
            yield settled(before, str(error), back=text)
            return
        yield from answer(self.service, self.stops, self.lives, str(request.session_hash), question)

    def send(self, request: gr.Request, text: str, history: History, *raw: Any) -> Iterator[Updates]:
        before = plain(history)
        if not text.strip():
            yield nothing()
            return
        yield from self._ask(request, [*before, {"role": "user", "content": text}], before, raw, text)

    def again(self, request: gr.Request, history: History, *raw: Any) -> Iterator[Updates]:
        """The last question once more."""
        before = plain(history)
        if not (kept := _answered(before)):
            yield nothing()
            return
        yield from self._ask(request, kept, before, raw)

    def edited(self, edit: gr.EditData, request: gr.Request, history: History, *raw: Any) -> Iterator[Updates]:
        """An edited question is answered anew, an edited answer stays as it is."""
        before = plain(history)
        index = int(edit.index[0] if isinstance(edit.index, list | tuple) else edit.index)
        if before[index]["role"] != "user":
            yield nothing()
            return
        kept = [*before[:index], {"role": "user", "content": tags.written(str(edit.value))}]
        yield from self._ask(request, kept, before, raw)

    def beside(self, request: gr.Request, beside: str, history: History, *raw: Any) -> Iterator[Updates]:
        """The last question once more, with other LoRAs, beside its answer."""
        answered = plain(history)
        kept = _answered(answered)
        if kept == answered:  # there was no answer
            yield nothing()
            return
        try:
            question = _question(self.tab, kept, kept, raw)
        except LoadstoneError as error:
            yield chat_loras.refused(error)
            return
        yield from self.comparison.answer(str(request.session_hash), question, beside)

    def take_back(self, request: gr.Request, history: History) -> Updates:
        """Without the last question and its answer."""
        self.stops.drop(str(request.session_hash))
        *kept, question = _answered(plain(history)) or [{}]
        return settled(kept, "", back=question.get("content", ""))

    def clear(self, request: gr.Request) -> Updates:
        self.stops.drop(str(request.session_hash))
        return settled([], "")

    def stop(self, request: gr.Request) -> None:
        self.stops.stop(str(request.session_hash))


def wire(tab: ChatTab, service: Service, stops: Stops, lives: LiveAnswers) -> None:
    """Connect the tab's widgets to the service."""
    comparison = chat_loras.Comparison(service, Stops(), lives)
    chat = Conversation(tab, service, stops, lives, comparison)
    asks: dict[str, Any] = {
        "outputs": tab.follows_answer, "concurrency_id": "answers", "concurrency_limit": MOST_ANSWERS, **QUIET,
    }  # fmt: skip
    inputs = [tab.chatbot, *tab.settings]
    ends = [
        gr.on([tab.send.click, tab.text.submit], chat.send, [tab.text, *inputs], js=_SENT, **asks),
        gr.on([tab.again.click, tab.chatbot.retry], chat.again, inputs, **asks),
        tab.chatbot.edit(chat.edited, inputs, **asks),
        gr.on([tab.undo.click, tab.chatbot.undo], chat.take_back, tab.chatbot, tab.follows_answer, **DIRECT),
        gr.on([tab.clear.click, tab.chatbot.clear], chat.clear, None, tab.follows_answer, **DIRECT),
    ]
    tab.back.change(None, [tab.back, tab.text], [tab.back, tab.text], js=_BACK, **QUIET)
    tab.chatbot.change(None, tab.chatbot, None, js=_KEEP, **QUIET)
    again: dict[str, Any] = {**asks, "outputs": [tab.loras.other, *tab.follows_answer[1:]]}
    tab.loras.ask.click(chat.beside, [tab.loras.beside, *inputs], **again)
    for end in ends[:3]:
        end.then(None, tab.loras.beside, None, js=chat_loras.ASK)
    chat_loras.wire(tab.loras, tab.chatbot, [tab.clear.click, tab.chatbot.clear], tab.stop, comparison)
    tab.stop.click(chat.stop, None, None, **DIRECT)
    _remembered(tab, service).keep()


def _remembered(tab: ChatTab, service: Service) -> Remembered:
    """The settings, which are this browser's; the conversation is the browser tab's."""
    defaults = service.generation_defaults()
    sampling = {
        name: (field, widget_value(GENERATION_OPTIONS[name], getattr(defaults, name)))
        for name, field in tab.fields.items()
    }
    return Remembered("loadstone-chat", {"system": (tab.system, ""), **sampling})


def wire_recall(page: gr.Blocks, tab: ChatTab, service: Service) -> None:
    """Bring back, when the page is opened, this browser tab's conversation and this browser's settings."""
    _remembered(tab, service).recover(page)
    page.load(None, tab.chatbot, tab.chatbot, js=_RECALL)
