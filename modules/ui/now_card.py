"""What goes on now, on the Session tab: the models that are loaded, rates and queue, the API's last requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from modules.service import Service
from modules.service.traffic import Seen, Totals
from modules.supervisor import Place
from modules.ui.common import DIRECT, guarded, small, table
from modules.units import format_bytes, format_count, format_seconds

_SHOWN_REQUESTS = 12
_REQUESTS = "The API's last requests"


def build(service: Service, tab: gr.Tab) -> None:
    """Lay out and wire it; page.js asks for it anew every two seconds while it can be seen."""
    gr.HTML("<h3>What goes on</h3>", padding=False)
    content = gr.HTML(elem_id="now", padding=False)
    with gr.Row(visible=False, equal_height=True, elem_id="now-row") as row:
        model = gr.Dropdown(
            choices=[], label="Loaded model", elem_id="now-model", scale=4, min_width=200, filterable=False,
            allow_custom_value=True,  # a page may still send what it showed before the row was hidden
        )  # fmt: skip
        front = gr.Button("Show on the page", size="sm", min_width=90, elem_id="now-front")
        pin = gr.Button("Pin", size="sm", min_width=90, elem_id="now-pin")
        unload = gr.Button("Unload", size="sm", min_width=90, elem_id="now-unload")
    requests = gr.HTML(elem_id="now-requests", padding=False)
    sync = gr.Button("sync", visible="hidden", elem_id="sync-now")
    known: gr.State = gr.State(())
    outputs = [content, requests, row, model, front, pin, known]
    shown = partial(_shown, service)
    gr.on([tab.select, sync.click], shown, [model, known], outputs, **DIRECT)
    model.input(shown, [model, known], outputs, **DIRECT)
    actions: tuple[tuple[gr.Button, Callable[[str], None]], ...] = (
        (front, service.fleet.to_front), (pin, partial(_turn_pin, service)), (unload, service.unload),
    )  # fmt: skip
    for button, action in actions:
        act = guarded(len(outputs), partial(_after, service, action))
        button.click(act, [model, known], outputs, queue=True, show_progress="hidden", api_visibility="private")


def _after(service: Service, action: Callable[[str], None], model: str | None, known: tuple[str, ...]) -> list[Any]:
    if model:
        action(model)
    return _shown(service, model, known)


def _turn_pin(service: Service, model: str) -> None:
    pinned = any(place.pinned for place in service.fleet.places() if place.name == model)
    service.fleet.pin(model, not pinned)


def _shown(service: Service, model: str | None, known: tuple[str, ...]) -> list[Any]:
    """The card; the menu is touched only where it holds others than it did."""
    places = [place for place in service.fleet.places() if place.loaded]
    names = tuple(place.name for place in places)
    chosen = model if model in names else next(iter(names), None)
    place = next((place for place in places if place.name == chosen), None)
    menu = gr.skip() if names == tuple(known) else gr.update(choices=list(names), value=chosen)
    return [
        now_html(service),
        requests_html(service.traffic.recent()),
        gr.update(visible=bool(names)),
        menu,
        gr.update(interactive=place is not None and not place.front),
        gr.update(value="Unpin" if place and place.pinned else "Pin"),
        names,
    ]


def now_html(service: Service) -> str:
    """Rates, the queue and the loaded models."""
    places = service.fleet.places()
    waiting = service.on_demand.waiting if service.on_demand else 0
    memory = dict(service.fleet.memory())
    models = [_model_row(place, memory) for place in places]
    shown = grid("Loaded models", _MODEL_COLUMNS, models) if models else small("Nothing is loaded.")
    return table(_facts(service.traffic.totals(), places, waiting)) + shown


def requests_html(recent: Sequence[Seen]) -> str:
    """The API's last requests; "" where there was none."""
    rows = [_request_row(seen) for seen in recent[:_SHOWN_REQUESTS]]
    return f"<h4>{_REQUESTS}</h4>" + grid(_REQUESTS, _REQUEST_COLUMNS, rows) if rows else ""


def _facts(totals: Totals, places: Iterable[Place], waiting: int) -> list[tuple[str, str]]:
    answers, queue = sum(place.answers for place in places), sum(place.waiting for place in places)
    speed = sum(place.tokens_per_second for place in places)
    first = f"{totals.first_token_s:.2f} s on average" if totals.first_token_s is not None else ""
    return [
        ("Speed", f"{speed:.1f} tokens/s" if answers else "idle"),
        ("Answers", f"{answers - queue} being written, {queue} before the first word" if answers else "none now"),
        ("Wait for a model", f"{waiting} requests" if waiting else ""),
        ("First token", first),
        ("Since the start", f"{totals.requests:,} requests of the API, {totals.failures:,} refused or failed; "
         f"{format_count(totals.prompt_tokens)} tokens read, {format_count(totals.completion_tokens)} generated"),
    ]  # fmt: skip


def _model_row(place: Place, memory: dict[str, Any]) -> tuple[str, ...]:
    held = memory.get(place.name) if place.loaded else None
    size = held.rss_bytes + sum(held.gpu_bytes) if held else 0
    state = "making room" if place.closing and place.loaded else "ready" if place.loaded else place.state.value
    marks = [state, "shown on the page" if place.front else "", "pinned" if place.pinned else ""]
    ends = f"in {format_seconds(place.ends_in_s)}" if place.ends_in_s is not None else "when asked to"
    return (
        place.name, " · ".join(mark for mark in marks if mark), format_bytes(size) if size else "–",
        str(place.answers), f"{place.tokens_per_second:.1f} tokens/s" if place.answers else "–",
        "after its answers" if place.uses else ends,
    )  # fmt: skip


_MODEL_COLUMNS = ("model", "state", "memory", "answers", "speed", "ends")
_REQUEST_COLUMNS = ("time", "request", "status", "who", "model", "tokens", "first token", "took")


def _request_row(seen: Seen) -> tuple[str, ...]:
    tokens = f"{seen.prompt_tokens:,} + {seen.completion_tokens:,}" if seen.prompt_tokens else "–"
    first = f"{seen.first_token_s * 1000:,.0f} ms" if seen.first_token_s is not None else "–"
    return (
        time.strftime("%H:%M:%S", time.localtime(seen.began)), f"{seen.method} {seen.route}",
        f"{seen.status} {seen.kind}".strip(), seen.role, seen.model or "–", tokens, first,
        f"{seen.seconds:.2f} s",
    )  # fmt: skip


def grid(label: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table with a row of headings, named for who does not see it, which is moved sideways where it is wider than its
    place."""
    first = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table class="results">'
        f"<thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>"
    )
