"""What a click on the LoRA card does, and which widget it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.service import MergeState, Service, merged_name
from modules.ui import lora_card
from modules.ui.cards import error_box
from modules.ui.common import DIRECT, QUIET, edits, inform, on_latest, warn
from modules.ui.lora_card import LoraCard, as_text, read_set, set_updates, state_updates
from modules.ui.model_tab import ModelTab, menu_update, model_choices

POLL_S = 0.25
# In the browser, so that a click on Apply or Load that follows at once finds the set as it was chosen.
_OLD = """const split = (entry) => { const found = entry.match(/^(.*):([^:]+)$/);
    return found && found[2].trim() && isFinite(found[2]) ? [found[1], found[2]] : [entry, '1']; };
  const old = new Map(JSON.parse(text || '[]').map(split));"""
_SET = """const set = JSON.stringify((menu ?? []).map((name, place) => `${name}:${weight(name, place)}`));
  return [set, set];"""
_CHOSEN = f"(menu, text) => {{ {_OLD} const weight = (name) => old.get(name) ?? 1; {_SET} }}"
_WEIGHED = f"""(menu, text, ...weights) => {{ {_OLD}
  const weight = (name, place) => (place < weights.length ? weights[place] : old.get(name)) ?? 1; {_SET} }}"""


def _same(one: str | None, other: str | None) -> bool:
    """Whether two texts name the same set."""
    try:
        return read_set(one) == read_set(other)
    except LoadstoneError:
        return one == other


def _shown(service: Service, model: str | None, text: str, typed: str, names: list[str]) -> list[Any]:
    """The set has changed. What a person is typing into a weight is not touched."""
    by_hand = bool(typed) and _same(text, typed)
    try:
        now = [name for name, _ in read_set(text)]
    except LoadstoneError:
        now = names
    updates = set_updates(service, model, text, by_hand=by_hand)
    if by_hand and now == names:
        updates[2:] = [gr.skip()] * (len(updates) - 2)
    return [*updates, now]


def _adopted(text: str, typed: str, active: str, before: str) -> list[Any]:
    """Another set is active, or another model is chosen: it is shown, unless something else was chosen by hand."""
    untouched = not typed or not _same(text, typed) or _same(text, before)
    return [active if active and untouched else gr.skip(), active]


def _acted(service: Service, model: str | None, entries: list[str], doing: str) -> Iterator[list[Any]]:
    yield state_updates(service, model, doing=doing)
    try:
        service.loras.apply(entries)
    except LoadstoneError as error:
        warn(error)
        updates = state_updates(service, model)
        updates[0] = f"{error_box(error)}{updates[0]}"
        yield updates
        return
    yield state_updates(service, model)


def _apply(service: Service, model: str | None, text: str) -> Iterator[list[Any]]:
    try:
        entries = list(lora_card.SPEC.parse(text or "[]"))
    except LoadstoneError as error:
        warn(error)
        yield state_updates(service, model)
        return
    yield from _acted(service, model, entries, "Applying …")


def _remove(service: Service, model: str | None, text: str) -> Iterator[list[Any]]:
    """No LoRA acts any more, and none is chosen."""
    for updates in _acted(service, model, [], "Removing …"):
        yield [*updates, gr.skip(), gr.skip()]
    gone = not service.loras.active
    yield [*state_updates(service, model), as_text([]) if gone else gr.skip(), "" if gone else gr.skip()]


def _merge(service: Service, model: str | None, text: str, name: str, size: str) -> Iterator[list[Any]]:
    try:
        chosen = [entry for entry, _ in read_set(text)]
        entries = list(lora_card.SPEC.parse(text or "[]"))
        service.loras.merge(model or "", entries, name.strip() or merged_name(model or "", chosen), size)
    except LoadstoneError as error:
        warn(error)
        yield [error_box(error), *lora_card.merge_updates(service.loras.merger.state())[1:]]
        return
    yield from _follow(service)


def _follow(service: Service) -> Iterator[list[Any]]:
    """The merge's updates until it has ended."""
    while True:
        state: MergeState = service.loras.merger.state()
        yield lora_card.merge_updates(state)
        if not state.running:
            if state.merged:
                inform(f"{Path(state.merged.path).name} is in the model menu.")
            return
        service.loras.merger.wait(state.version, POLL_S)


def _models(service: Service, model: str | None) -> Any:
    return menu_update(service, model_choices(service), model)


def wire(tab: ModelTab, service: Service, page: gr.Tab) -> None:
    """Connect the card's widgets to the service; ``page`` is where they are, and its menu as new as its opening."""
    card: LoraCard = tab.loras
    text = tab.form.fields["lora"]
    names, before = gr.State([]), gr.State("")
    card.menu.input(None, [card.menu, text], [text, card.typed], js=_CHOSEN, **QUIET)
    weighed = [card.menu, text, *card.weights]
    gr.on(edits(card.weights), None, weighed, [text, card.typed], js=_WEIGHED, trigger_mode="multiple", **QUIET)
    shown: dict[str, Any] = {"inputs": [tab.model, text, card.typed, names], "outputs": [*card.follows_set, names]}
    on_latest([text.change, tab.model.change, tab.refresh.click, page.select], partial(_shown, service), **shown)
    card.active.change(
        _adopted, [text, card.typed, card.active, before], [text, before], queue=False, **QUIET
    )  # fmt: skip
    card.apply.click(partial(_apply, service), [tab.model, text], card.follows_state, **QUIET)
    card.remove.click(
        partial(_remove, service), [tab.model, text], [*card.follows_state, text, card.typed], **QUIET
    )  # fmt: skip
    merged = card.merge.click(
        partial(_merge, service), [tab.model, text, card.merge_name, card.shard_size], card.follows_merge, **QUIET
    )  # fmt: skip
    merged.then(partial(_models, service), tab.model, tab.model, **DIRECT)
    card.cancel_merge.click(lambda: service.loras.merger.cancel(), None, None, queue=False, **QUIET)
