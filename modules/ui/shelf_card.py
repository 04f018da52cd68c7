"""The models on this disk, on the Session tab: sizes, where they are from, verify, repair, update, delete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.hub.keeping import Duplicate, Verified
from modules.service import Service
from modules.service.shelf import Kept
from modules.ui import asking
from modules.ui.common import DIRECT, QUIET, guarded, small, table
from modules.ui.reading import Readings
from modules.units import format_bytes

_CHOOSE = "Choose a model first."
_STAR = "★ Favourite"


@dataclass(frozen=True)
class ShelfCard:
    content: gr.HTML
    model: gr.Dropdown
    favourite: gr.Button
    verify: gr.Button
    repair: gr.Button
    newer: gr.Button
    update: gr.Button
    delete: gr.Button
    sure: asking.Asking
    same: gr.Button
    cancel: gr.Button
    line: gr.HTML


def build(service: Service, tab: gr.Tab) -> None:
    """Lay out and wire it; its content is made when ``tab`` is opened, and after each change."""
    card = _lay_out()
    lists, line = [card.content, card.model, card.favourite], card.line
    shown = partial(_shown, service)
    tab.select(shown, card.model, lists, **QUIET)
    model: dict[str, Any] = {"inputs": card.model, "show_progress": "minimal", "api_visibility": "private"}
    for button, say in (
        (card.repair, _repaired), (card.newer, _newer), (card.update, _updated),
    ):  # fmt: skip
        button.click(_on_a_model(partial(say, service)), outputs=line, **model)
    card.model.input(partial(_noticed, service), card.model, line, **QUIET)
    card.model.input(partial(_star, service), card.model, card.favourite, **DIRECT)
    favoured = [*lists, line]
    card.favourite.click(guarded(len(favoured), partial(_favoured, service)), card.model, favoured, **QUIET)
    _wire_readings(service, card)
    asking.wire(
        card.sure, card.delete, partial(_ask, service), card.model, partial(_deleted, service), [], [*lists, line],
        acts=QUIET,
    )  # fmt: skip


def _wire_readings(service: Service, card: ShelfCard) -> None:
    readings = Readings()
    followed = [card.line, card.cancel]

    def verify(name: str | None, tab: gr.Request) -> Iterator[list[Any]]:
        if not name:
            yield [small(_CHOOSE), gr.skip()]
            return
        yield from readings.follow(tab, lambda told: verified_html(name, service.shelf.verify(name, told)))

    def same(tab: gr.Request) -> Iterator[list[Any]]:
        yield from readings.follow(tab, lambda told: duplicates_html(service.shelf.duplicates(told)))

    card.verify.click(verify, card.model, followed, **QUIET)
    card.same.click(same, None, followed, **QUIET)
    card.cancel.click(readings.end, None, None, **DIRECT)


def _lay_out() -> ShelfCard:
    def button(text: str, name: str, **more: Any) -> gr.Button:
        return gr.Button(text, size="sm", min_width=80, elem_id=f"shelf-{name}", **more)

    gr.HTML("<h3>Models on this disk</h3>", padding=False)
    content = gr.HTML(elem_id="shelf", padding=False)
    with gr.Row(equal_height=True):
        model = gr.Dropdown(choices=[], label="Model", elem_id="shelf-model", scale=4, min_width=200)
    with gr.Row(elem_id="shelf-buttons"):
        favourite, verify = button(_STAR, "favourite"), button("Verify", "verify")
        repair, newer = button("Repair", "repair"), button("Look for an update", "newer")
        update, delete = button("Update", "update"), button("Delete …", "delete")
        same = button("Find duplicates", "same")
        cancel = button("Cancel", "cancel", variant="stop", visible="hidden")
    sure = asking.build("shelf", "delete it", "keep it")
    line = gr.HTML(elem_id="shelf-line", padding=False)
    return ShelfCard(content, model, favourite, verify, repair, newer, update, delete, sure, same, cancel, line)


def _on_a_model(say: Callable[[str], str]) -> Callable[..., Any]:
    """``say`` of the chosen model, where one is chosen."""

    def run(name: str | None) -> Any:
        return say(name) if name else small(_CHOOSE)

    return guarded(1, run)


def _shown(service: Service, chosen: str | None) -> list[Any]:
    kept = service.shelf.kept()
    names = [one.name for one in kept]
    chosen = chosen if chosen in names else None
    return [shelf_html(kept), gr.update(choices=names, value=chosen), _star(service, chosen)]


def _star(service: Service, name: str | None) -> Any:
    """The button that makes the chosen model a favourite, or no longer one."""
    return gr.update(value="☆ No favourite any more" if name in service.shelf.marks.favourites() else _STAR)


def shelf_html(kept: list[Kept]) -> str:
    """A table of the models, with what all of them take."""
    if not kept:
        return small("No models yet.")
    rows = [(f"★ {one.name}" if one.favourite else one.name, _described(one)) for one in kept]
    size = format_bytes(sum(one.size_bytes for one in kept))
    return table(rows) + small(f"{len(kept)} model{'s' if len(kept) != 1 else ''}, {size}")


def _described(one: Kept) -> str:
    used = f"used {time.strftime('%Y-%m-%d', time.localtime(one.used))}" if one.used else "never used here"
    return " · ".join(part for part in (format_bytes(one.size_bytes), used, one.source, str(one.path)) if part)


def verified_html(name: str, found: Verified) -> str:
    """Whether all is well, or what is not."""
    if not found.broken:
        size = format_bytes(found.checked_bytes)
        return f'<div class="ok">{escape(name)}: all {found.checked} files are what the Hub has ({size} read).</div>'
    head = f'<div class="bad">{escape(name)}: {len(found.broken)} of {found.checked} files are broken. Repair it.</div>'
    return head + table(found.broken.items())


def _repaired(service: Service, name: str) -> str:
    job = service.shelf.repair(name)
    return small(f"{job.order.name} is being checked and repaired; see the downloads on the Model tab.")


def _newer(service: Service, name: str) -> str:
    return _update_in_words(service.shelf.newer_commit(name)) or small(f"{name} is up to date.")


def _noticed(service: Service, name: str | None) -> str:
    """Of a model that was chosen: whether there is an update. Nothing where the Hub cannot be asked about it."""
    try:
        return _update_in_words(service.shelf.newer_commit(name or ""))
    except LoadstoneError:
        return ""


def _update_in_words(commit: str) -> str:
    return small(f"Update available: commit {commit[:10]}.") if commit else ""


def _updated(service: Service, name: str) -> str:
    job = service.shelf.update(name)
    return small(f"{job.order.name} is being updated; see the downloads on the Model tab.")


def _favoured(service: Service, name: str | None) -> list[Any]:
    if not name:
        return [*_shown(service, name), small(_CHOOSE)]
    service.shelf.favourite(name, name not in service.shelf.marks.favourites())
    return [*_shown(service, name), ""]


def _ask(service: Service, name: str | None) -> asking.Question | str:
    if not name:
        return _CHOOSE
    try:
        return asking.Question(name, f"Delete {name} and its {format_bytes(service.shelf.size_of(name))}?")
    except LoadstoneError as error:  # it is gone already
        return str(error)


def _deleted(service: Service, name: str) -> list[Any]:
    size = service.shelf.delete(name)
    return [*_shown(service, None), small(f"{name} is deleted: {format_bytes(size)} freed.")]


def duplicates_html(found: list[Duplicate]) -> str:
    """Files of equal content, and what they take too much."""
    if not found:
        return small("No two models hold the same weights.")
    rows = [(format_bytes(one.size_bytes), ", ".join(one.names)) for one in found]
    extra = sum(one.size_bytes * (len(one.names) - 1) for one in found)
    return small(f"The same weights lie here more than once: {format_bytes(extra)} could be freed.") + table(rows)
