"""The page. ``build`` makes the Blocks, ``mount`` puts it on the web application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from modules.service import Service
from modules.supervisor import LOAD_STATES, Snapshot
from modules.ui import (
    cards,
    chat_loras,
    chat_tab,
    download_actions,
    frames,
    guest,
    live,
    lora_actions,
    model_actions,
    model_tab,
    session_tab,
    training_actions,
    training_tab,
)
from modules.ui.answering import Stops
from modules.ui.common import DIRECT, QUIET, on_latest, queue, top

_HERE = Path(__file__).parent
_SCRIPTS = ("clipboard.js", "page.js", "live.js")
TITLE = "Loadstone"


def build(service: Service, lives: live.LiveAnswers, *, login: bool = False) -> gr.Blocks:
    """The whole page, wired to ``service``. The answers that come are also put into ``lives``.

    ``login``: people have logged in, and may log out.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        with top(cards.status_line(service.snapshot()), login=login) as line:
            cancel = gr.Button(
                "Cancel", size="sm", variant="stop", elem_id="cancel-load", visible="hidden", min_width=80
            )
        sync = gr.Button("sync", visible="hidden", elem_id="sync")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Model", id="model") as manage:
                models = model_tab.build(service)
            with gr.Tab("Chat", id="chat") as talk:
                chat = chat_tab.build(service)
            with gr.Tab("Training", id="training") as train:
                training = training_tab.build()
            with gr.Tab("Session", id="session") as session:
                session_tab.build(service, session)
        model_actions.wire(models, service, manage)
        download_actions.wire(models, service)
        lora_actions.wire(models, service, manage)
        chat_tab.wire(chat, service, Stops(), lives)
        chat_tab.wire_recall(page, chat, service)
        chat_loras.follow([page.load, sync.click, talk.select], chat.loras, service)
        training_actions.wire(training, service, tabs, chat.loras.beside)
        training_actions.wire_opening(page, training)
        training_actions.follow([page.load, training.sync.click, train.select], training, service)
        _follow_state(page, service, line, cancel, sync, models, chat)
    queue(page)
    return page


def _follow_state(
    page: gr.Blocks, service: Service, line: gr.HTML, cancel: gr.Button, sync: gr.Button,
    models: model_tab.ModelTab, chat: chat_tab.ChatTab,
) -> None:  # fmt: skip
    """Every tab of every browser shows the same truth: page.js clicks ``sync`` when the state has changed.

    ``cancel`` ends a load from every tab; what became of it comes by ``sync``.
    """
    follows_loaded = [*chat.follows_loaded, *models.follows_view]  # what can be asked for, and what fits beside it
    follows = [*models.follows_state, *follows_loaded]

    def synced(loaded_at: float | None, model: str | None, *form: Any) -> list[Any]:
        snapshot = service.snapshot()
        if loaded_at is None:  # the page is being filled: no model is chosen yet, and it is asked again afterwards
            return [*top_updates(snapshot), gr.skip(), *[gr.skip()] * len(follows)]
        since = cards.loaded_since(snapshot)
        changed = [gr.skip()] * len(follows_loaded)
        if since != loaded_at:
            changed = [*chat_tab.loaded_updates(snapshot), *model_actions.changed(models, service, model, *form)]
        return [*top_updates(snapshot), since, *model_tab.state_updates(service, model), *changed]

    def opened(remembered: dict[str, Any]) -> list[Any]:
        snapshot = service.snapshot()
        return [
            *top_updates(snapshot),
            cards.loaded_since(snapshot),
            *model_tab.opened(models, service, remembered),
            *chat_tab.loaded_updates(snapshot),
        ]

    cancel.click(lambda: service.cancel(), None, None, **DIRECT)
    loaded_at = gr.State(None)  # of what the page shows; 0: nothing is loaded
    on_latest(
        [sync.click], synced, [loaded_at, models.model, *models.form.widgets],
        [line, cancel, loaded_at, *follows],
    )  # fmt: skip
    filled = page.load(
        opened, models.remembered,
        [line, cancel, loaded_at, *model_tab.opened_outputs(models), *chat.follows_loaded],
        **QUIET,
    )  # fmt: skip
    filled.then(None, None, None, js=f"() => document.getElementById('{sync.elem_id}').click()")


def top_updates(snapshot: Snapshot) -> list[Any]:
    """Updates for the status line and the button beside it."""
    return [cards.status_line(snapshot), gr.update(visible=True if snapshot.state in LOAD_STATES else "hidden")]


def mount(
    app: FastAPI, service: Service, *, login: bool = False, for_guests: bool = False, root_path: str = ""
) -> FastAPI:
    """The page at ``/`` of ``app``, with its style and script: the administrator's, or the one for guests.

    ``root_path``: the path under which a proxy in front serves it.
    """
    lives = live.LiveAnswers()
    live.mount(app, lives)
    page = guest.build(service, lives, TITLE) if for_guests else build(service, lives, login=login)
    scripts = "".join(f"<script>{(_HERE / name).read_text(encoding='utf-8')}</script>" for name in _SCRIPTS)
    frames.install()
    gr.mount_gradio_app(
        app, page, path="/", server_name="127.0.0.1", footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, theme=_theme(), css_paths=[_HERE / "page.css"],
        head=scripts, show_error=True, root_path=root_path or None,
    )  # fmt: skip
    return app


def _theme() -> gr.themes.Base:
    """System fonts only: nothing is fetched from another host."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono, spacing_size="sm", radius_size="md"
    ).set(body_text_color_subdued="*neutral_500")  # hints are read, too: Gradio's own grey is 2.6 : 1 on white
