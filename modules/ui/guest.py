"""The page of guests: the chat, and what is loaded. None of its functions loads, sets or lists anything.

Guests get a page of their own and not the administrator's with parts hidden: what is not built cannot be called.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from modules.service import Service
from modules.ui import cards, chat_loras, chat_tab
from modules.ui.answering import Stops
from modules.ui.common import QUIET, on_latest, queue, top
from modules.ui.live import LiveAnswers


def build(service: Service, lives: LiveAnswers, title: str) -> gr.Blocks:
    """The page, wired to ``service``."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        with top(cards.status_line(service.snapshot()), login=True) as line:
            pass  # a guest cancels nothing
        sync = gr.Button("sync", visible="hidden", elem_id="sync")
        with gr.Tabs(elem_id="tabs"), gr.Tab("Chat", id="chat"):
            chat = chat_tab.build(service)
        chat_tab.wire(chat, service, Stops(), lives)
        chat_tab.wire_recall(page, chat, service)
        chat_loras.follow([page.load, sync.click], chat.loras, service)
        _follow_state(page, service, line, sync, chat)
    queue(page)
    return page


def _follow_state(page: gr.Blocks, service: Service, line: gr.HTML, sync: gr.Button, chat: chat_tab.ChatTab) -> None:
    """As on the administrator's page: page.js clicks ``sync`` when the state has changed."""

    def synced(loaded_at: float) -> list[Any]:
        snapshot = service.snapshot()
        since = cards.loaded_since(snapshot)
        changed = chat_tab.loaded_updates(snapshot) if since != loaded_at else [gr.skip()] * len(chat.follows_loaded)
        return [cards.status_line(snapshot), since, *changed]

    loaded_at = gr.State(-1.0)  # not known yet; 0: nothing is loaded
    outputs = [line, loaded_at, *chat.follows_loaded]
    on_latest([sync.click], synced, loaded_at, outputs)
    page.load(synced, loaded_at, outputs, **QUIET)
