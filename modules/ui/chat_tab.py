"""The Chat tab: a conversation of this browser tab with the model that is loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.options import GENERATION_OPTIONS
from modules.protocol import Done, Piece
from modules.service import Service
from modules.supervisor import Snapshot
from modules.ui.form import option_value, widget
from modules.ui.model_tab import QUIET

UPDATE_S = 0.1  # ten updates a second reach the browser
CHAT, COMPLETION = "Chat", "Completion"
History = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatTab:
    chatbot: gr.Chatbot
    text: gr.Textbox
    send: gr.Button
    stop: gr.Button
    again: gr.Button
    undo: gr.Button
    clear: gr.Button
    mode: gr.Radio
    system: gr.Textbox
    fields: Mapping[str, gr.components.Component]
    line: gr.HTML
    remembered: gr.BrowserState

    @property
    def settings(self) -> list[Any]:
        """The widgets whose values shape an answer, in the order of :func:`_values`' arguments."""
        return [self.mode, self.system, *self.fields.values()]

    @property
    def follows_answer(self) -> list[Any]:
        return [self.chatbot, self.text, self.send, self.stop, self.line]


class Stops:
    """One stop signal for each browser tab that is being answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, threading.Event] = {}

    def begin(self, session: str) -> threading.Event:
        """A new signal for this tab; an answer that was still coming is told to stop."""
        event = threading.Event()
        with self._lock:
            if (earlier := self._events.get(session)) is not None:
                earlier.set()
            self._events[session] = event
        return event

    def end(self, session: str, event: threading.Event) -> None:
        with self._lock:
            if self._events.get(session) is event:
                del self._events[session]

    def stop(self, session: str) -> None:
        with self._lock:
            if (event := self._events.get(session)) is not None:
                event.set()


def build(service: Service) -> ChatTab:
    """Lay out the tab."""
    defaults = service.generation_defaults()
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            chatbot = gr.Chatbot(
                height="calc(100dvh - 330px)", min_height=260, editable="all", buttons=["copy", "copy_all"],
                show_label=False, layout="bubble", elem_id="chatbot", feedback_options=None, sanitize_html=True,
                placeholder="Load a model on the Model tab, then say something.",
            )  # fmt: skip
            line = gr.HTML('<div class="small">&nbsp;</div>', elem_id="chat-line", padding=False)
            text = gr.Textbox(
                placeholder="Message · Enter sends, Shift+Enter makes a new line, Esc stops", label="Message",
                show_label=False, lines=1, max_lines=8, elem_id="message", autofocus=True,
            )  # fmt: skip
            with gr.Row(elem_id="chat-buttons"):
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", visible="hidden", min_width=80)
                again = gr.Button("Regenerate", elem_id="regenerate", min_width=80)
                undo = gr.Button("Take back", elem_id="undo", min_width=80)
                clear = gr.Button("New chat", elem_id="clear", min_width=80)
        with gr.Column(scale=3, min_width=260):
            mode = gr.Radio(
                [CHAT, COMPLETION], value=CHAT, label="Mode", elem_id="mode",
                info="Chat uses the model's chat template; Completion continues the text as it stands.",
            )  # fmt: skip
            system = gr.Textbox(label="System prompt", lines=3, max_lines=10, elem_id="system", placeholder="None")
            basic, more = {}, {}
            for spec in GENERATION_OPTIONS.values():
                if spec.basic:
                    basic[spec.name] = _field(spec.name, getattr(defaults, spec.name))
            with gr.Accordion("More sampling", open=False):
                for spec in GENERATION_OPTIONS.values():
                    if not spec.basic:
                        more[spec.name] = _field(spec.name, getattr(defaults, spec.name))
    fields = {**basic, **more}
    remembered = gr.BrowserState({}, storage_key="loadstone-chat", secret="loadstone")
    return ChatTab(chatbot, text, send, stop, again, undo, clear, mode, system, fields, line, remembered)


def _field(name: str, value: Any) -> gr.components.Component:
    field = widget(GENERATION_OPTIONS[name])
    field.value = value
    return field


def mode_update(snapshot: Snapshot) -> Any:
    """The mode that suits what is loaded: without a chat template only Completion."""
    if snapshot.loaded is None:
        return gr.skip()
    has_template = snapshot.loaded.report.has_chat_template
    info = (
        "Chat uses the model's chat template; Completion continues the text as it stands."
        if has_template
        else "This model has no chat template: it continues the text as it stands."
    )
    return gr.update(value=CHAT if has_template else COMPLETION, interactive=has_template, info=info)


# --- messages ---


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, which Gradio hands back as parts."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def _plain(history: History) -> list[dict[str, str]]:
    return [{"role": str(message["role"]), "content": _text_of(message)} for message in history or []]


def _request(history: History, mode: str, system: str) -> dict[str, Any]:
    """What the service is asked: the messages, or all text so far to be continued."""
    messages = _plain(history)
    if mode == COMPLETION:
        return {"prompt": "".join([system, *(message["content"] for message in messages)])}
    front = [{"role": "system", "content": system}] if system.strip() else []
    return {"messages": front + messages}


def _values(tab: ChatTab, raw: tuple[Any, ...]) -> tuple[str, str, dict[str, Any]]:
    mode, system, *rest = raw
    names = zip(tab.fields, rest, strict=True)
    return mode, system or "", {name: option_value(GENERATION_OPTIONS[name], value) for name, value in names}


# --- an answer ---


def _answer(
    tab: ChatTab, service: Service, stops: Stops, history: History, raw: tuple[Any, ...], session: str
) -> Iterator[list[Any]]:
    """Stream an answer to the last message of ``history``, as updates for ``tab.follows_answer``."""
    history = [*history]
    waiting = [{"role": "assistant", "content": "", "metadata": None}]
    yield [[*history, *waiting], "", gr.update(visible="hidden"), gr.update(visible=True), _line("thinking …")]
    stopped = stops.begin(session)
    text, done, error = "", None, None
    try:
        mode, system, values = _values(tab, raw)
        shown = time.monotonic()
        for chunk in service.generate(values, **_request(history, mode, system), stopped=stopped):
            if isinstance(chunk, Done):
                done = chunk
                continue
            if isinstance(chunk, Piece):
                text += chunk.text
            if (now := time.monotonic()) - shown >= UPDATE_S:
                shown = now
                yield [[*history, {"role": "assistant", "content": text}], *[gr.skip()] * 4]
    except LoadstoneError as problem:
        error = problem
    finally:
        stopped.set()
        stops.end(session, stopped)
    if text:
        history.append({"role": "assistant", "content": text})
    if error:
        gr.Warning(str(error), title=error.title, duration=10)
    line = _line(f"{error.title}. {error}" if error else _done_words(done, service.snapshot()))
    yield [history, gr.skip(), gr.update(visible=True), gr.update(visible="hidden"), line]


def _line(text: str) -> str:
    return f'<div class="small">{escape(text) or "&nbsp;"}</div>'


def _done_words(done: Done | None, snapshot: Snapshot) -> str:
    """``34 tokens/s · 96 tokens · context 312 of 8,192 · first token after 0.2 s``."""
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
    if done.dropped_messages:
        parts.append(f"the oldest {done.dropped_messages} messages did not fit and were left out")
    return " · ".join(parts)


def _send(
    tab: ChatTab, service: Service, stops: Stops, session: str, text: str, history: History, raw: tuple[Any, ...]
) -> Iterator[list[Any]]:
    if not text.strip():
        yield [gr.skip()] * 5
        return
    if service.snapshot().loaded is None:
        yield [*[gr.skip()] * 4, _line("No model is loaded. Load one on the Model tab first.")]
        return
    yield from _answer(tab, service, stops, [*_plain(history), {"role": "user", "content": text}], raw, session)


def _again(
    tab: ChatTab, service: Service, stops: Stops, session: str, history: History, raw: tuple[Any, ...]
) -> Iterator[list[Any]]:
    """Answer the last message of the user once more."""
    messages = _plain(history)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        yield [gr.skip()] * 5
        return
    yield from _answer(tab, service, stops, messages, raw, session)


def _edited(
    tab: ChatTab, service: Service, stops: Stops, session: str, history: History, raw: tuple[Any, ...],
    index: int, text: str,
) -> Iterator[list[Any]]:  # fmt: skip
    """A message was edited: an edited question is answered anew, an edited answer stays as it is."""
    messages = _plain(history)
    if messages[index]["role"] != "user":
        yield [gr.skip()] * 5
        return
    yield from _answer(tab, service, stops, [*messages[:index], {"role": "user", "content": text}], raw, session)


def _take_back(history: History) -> tuple[History, str]:
    """Without the last question and its answer; the question goes back into the field."""
    messages = _plain(history)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return messages[:-1], messages[-1]["content"] if messages else ""


def opened(tab: ChatTab, service: Service, remembered: Mapping[str, Any]) -> list[Any]:
    """The page was opened: the system prompt and the sampling as they were left."""
    known = remembered or {}
    updates = [mode_update(service.snapshot()), gr.update(value=known.get("system", ""))]
    defaults = service.generation_defaults()
    return updates + [gr.update(value=known.get(name, getattr(defaults, name))) for name in tab.fields]


def wire(tab: ChatTab, service: Service, stops: Stops) -> None:
    """Connect the tab's widgets to the service."""
    answer: dict[str, Any] = {"concurrency_limit": None, **QUIET}

    # Gradio fills in arguments by their annotation, wherever they stand before the inputs.
    def send(request: gr.Request, text: str, history: History, *raw: Any) -> Iterator[list[Any]]:
        yield from _send(tab, service, stops, request.session_hash or "", text, history, raw)

    def again(request: gr.Request, history: History, *raw: Any) -> Iterator[list[Any]]:
        yield from _again(tab, service, stops, request.session_hash or "", history, raw)

    def edited(edit: gr.EditData, request: gr.Request, history: History, *raw: Any) -> Iterator[list[Any]]:
        index = int(edit.index[0] if isinstance(edit.index, list | tuple) else edit.index)
        yield from _edited(tab, service, stops, request.session_hash or "", history, raw, index, str(edit.value))

    def stop(request: gr.Request) -> None:
        stops.stop(request.session_hash or "")

    gr.on([tab.send.click, tab.text.submit], send, [tab.text, tab.chatbot, *tab.settings], tab.follows_answer, **answer)
    gr.on([tab.again.click, tab.chatbot.retry], again, [tab.chatbot, *tab.settings], tab.follows_answer, **answer)
    tab.chatbot.edit(edited, [tab.chatbot, *tab.settings], tab.follows_answer, **answer)
    gr.on([tab.undo.click, tab.chatbot.undo], _take_back, tab.chatbot, [tab.chatbot, tab.text], **QUIET)
    tab.clear.click(lambda: ([], _line("")), None, [tab.chatbot, tab.line], **QUIET)
    tab.stop.click(stop, None, None, queue=False, **QUIET)
    names = ["system", *tab.fields]
    gr.on(
        [field.change for field in tab.settings[1:]],
        lambda *values: dict(zip(names, values, strict=True)),
        tab.settings[1:], tab.remembered, queue=False, **QUIET,
    )  # fmt: skip
