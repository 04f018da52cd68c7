"""The LoRA card of the Model tab: which LoRAs, how much of each, what they do to the model, merging them into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS, split_adapter
from modules.options.adapters import LEAST_WEIGHT, MOST_WEIGHT
from modules.service import LoraOffer, MergeState, Service, entries_of
from modules.service.loras import DEFAULT_SHARD_SIZE
from modules.supervisor import Snapshot
from modules.ui.cards import active_in_words, busy, error_box
from modules.ui.common import MOVING_BAR, bar, small
from modules.units import format_bytes, format_seconds

SPEC = LOAD_OPTIONS["lora"]
MOST_CHOSEN = 8  # weight fields; a set from the command line may hold more
_REASON_LENGTH = 90
_NO_ONES = "weight"  # the label of a weight field that no LoRA has


@dataclass(frozen=True)
class LoraCard:
    """The widgets. The set itself is the form's hidden field of the option ``lora``, as a JSON list."""

    menu: gr.Dropdown
    weights: tuple[gr.Number, ...]
    typed: gr.Textbox  # the set as it was last chosen by hand; hidden
    active: gr.Textbox  # the set that is active, where the model chosen is the one loaded, else ""; hidden
    about: gr.HTML
    apply: gr.Button
    remove: gr.Button
    line: gr.HTML
    merge_name: gr.Textbox
    shard_size: gr.Textbox
    merge: gr.Button
    cancel_merge: gr.Button
    merge_line: gr.HTML

    @property
    def follows_state(self) -> list[Any]:
        """What :func:`state_updates` updates."""
        return [self.line, self.active, self.apply, self.remove, *self.follows_merge]

    @property
    def follows_merge(self) -> list[Any]:
        return [self.merge_line, self.merge, self.cancel_merge]

    @property
    def follows_set(self) -> list[Any]:
        """What :func:`set_updates` updates."""
        return [self.menu, self.about, *self.weights]


def build() -> LoraCard:
    """Lay out the card."""
    with gr.Column(elem_id="lora-card"):
        menu = gr.Dropdown(
            choices=[], multiselect=True, max_choices=MOST_CHOSEN, label=SPEC.label, elem_id="loras",
            info=f"What they change lies beside the model, and can be taken off again. `{SPEC.flag}`", interactive=True,
        )  # fmt: skip
        with gr.Row(elem_id="lora-weights"):
            weights = tuple(_weight(place) for place in range(MOST_CHOSEN))
        about = gr.HTML(elem_id="lora-about", padding=False)
        with gr.Row(elem_id="lora-buttons"):
            apply = gr.Button("Apply", size="sm", elem_id="lora-apply", min_width=90, interactive=False)
            remove = gr.Button("Remove all", size="sm", elem_id="lora-remove", min_width=90, interactive=False)
        line = gr.HTML(elem_id="lora-line", padding=False)
    with gr.Accordion("Merge the LoRAs into a new model", open=False, elem_id="merge"):
        with gr.Row():
            name = gr.Textbox(
                label="Name", info="Of the new model, under models/.", placeholder="after the model and the LoRAs",
                elem_id="merge-name",
            )  # fmt: skip
            size = gr.Textbox(
                DEFAULT_SHARD_SIZE, label="Largest file", info="Larger models get several.", elem_id="shard-size"
            )
        with gr.Row(elem_id="merge-buttons"):
            merge = gr.Button("Merge", size="sm", elem_id="merge-start", min_width=90)
            cancel = gr.Button("Cancel merging", size="sm", variant="stop", visible="hidden", elem_id="merge-cancel")
        merge_line = gr.HTML(elem_id="merge-line", padding=False)
    with gr.Row(elem_classes="unseen"):
        typed, active = (gr.Textbox("", label=word) for word in ("LoRAs chosen", "LoRAs active"))
    return LoraCard(
        menu, weights, typed, active, about, apply, remove, line, name, size, merge, cancel, merge_line
    )  # fmt: skip


def _weight(place: int) -> gr.Number:
    return gr.Number(
        1.0, step=0.05, minimum=LEAST_WEIGHT, maximum=MOST_WEIGHT, visible="hidden", min_width=130,
        elem_id=f"lora-weight-{place}", interactive=True, label=_NO_ONES,
    )  # fmt: skip


# --- the set, as the hidden field holds it ---


def read_set(text: str | None) -> list[tuple[str, float]]:
    """Names and weights. Raises OptionError for what is no set."""
    return [split_adapter(entry) for entry in SPEC.parse(text or "[]")]


def as_text(entries: Sequence[str]) -> str:
    return json.dumps(list(entries))


# --- what the widgets show ---


def set_updates(service: Service, model: str | None, text: str | None, *, by_hand: bool) -> list[Any]:
    """Updates for ``card.follows_set``. ``by_hand``: menu and weights are where it came from, and stay as they are."""
    try:
        chosen = read_set(text)
    except LoadstoneError as error:
        return [gr.skip(), error_box(error), *[gr.skip()] * MOST_CHOSEN]
    offers = service.loras.offers(model or "")
    names = [name for name, _ in chosen]
    choices = [*labelled(offers), *((f"✕ {name} · not found", name) for name in _missing(names, offers))]
    menu = gr.update(choices=choices) if by_hand else gr.update(choices=choices, value=names)
    return [menu, about(names, offers), *_weight_updates(chosen)]


def _weight_updates(chosen: Sequence[tuple[str, float]]) -> list[Any]:
    shown = [gr.update(visible=True, label=f"{name}, weight", value=weight) for name, weight in chosen[:MOST_CHOSEN]]
    return [*shown, *[gr.update(visible="hidden", label=_NO_ONES)] * (MOST_CHOSEN - len(shown))]


def labelled(offers: Sequence[LoraOffer]) -> list[tuple[str, str]]:
    """The menu's entries: those that fit with their rank, the rest with the reason."""
    return [(_label(offer), offer.lora.name) for offer in offers]


def _label(offer: LoraOffer) -> str:
    if offer.problem is not None:
        reason = offer.problem.message.removeprefix(f"{offer.lora.name} ")
        short = reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]}…"
        return f"✕ {offer.lora.name} · {short}"
    rank = f" · rank {offer.facts.ranks[-1]}" if offer.facts and offer.facts.ranks else ""
    return f"{offer.lora.name}{rank}"


def _missing(names: Sequence[str], offers: Sequence[LoraOffer]) -> list[str]:
    known = {offer.lora.name for offer in offers}
    return [name for name in names if name not in known]


def about(names: Sequence[str], offers: Sequence[LoraOffer]) -> str:
    """A line on each LoRA that is chosen: what it is, or why it cannot be applied."""
    by_name = {offer.lora.name: offer for offer in offers}
    lines = []
    for name in names:
        offer = by_name.get(name)
        if offer is None or offer.problem is not None:
            text = offer.problem.message if offer and offer.problem else f"There is no LoRA {name} any more."
            lines.append(f'<p class="note">{escape(text)}</p>')
            continue
        facts = offer.facts.summary() if offer.facts else ""
        lines.append(f'<div class="small"><b>{escape(name)}</b> · {escape(facts)}</div>')
        lines += [f'<p class="note">{escape(warning)}</p>' for warning in offer.warnings]
    if not offers:
        lines.append(
            '<div class="small">No LoRAs yet: put their folders under loras/, download one, or train one.</div>'
        )
    return "".join(lines)


def state_updates(service: Service, model: str | None, *, doing: str = "") -> list[Any]:
    """Updates for ``card.follows_state``. ``doing``: what is under way, in words.

    Without a model, as while the page is being filled in, nothing is said of what belongs to the chosen one.
    """
    snapshot = service.snapshot()
    loaded = snapshot.loaded
    ready = loaded is not None and not busy(snapshot) and not doing
    ours = loaded is not None and loaded.order.name == model
    active = as_text(entries_of(loaded.order.adapters)) if loaded and ours else ""
    return [
        f'<div class="small">{escape(doing)}</div>' if doing else proof(snapshot),
        active if model else gr.skip(),
        gr.update(interactive=ready and ours) if model else gr.skip(),
        gr.update(interactive=ready and bool(loaded and loaded.order.adapters)),
        *merge_updates(service.loras.merger.state()),
    ]


def proof(snapshot: Snapshot) -> str:
    """What is active, and how far it moves the model: ``pirate 0.8 · moves the next token by 0.42 nats``."""
    loaded = snapshot.loaded
    if loaded is None:
        return '<div class="small">The chosen LoRAs are applied when the model is loaded.</div>'
    if not loaded.order.adapters:
        return '<div class="small">No LoRA is active: the base model answers.</div>'
    report = loaded.adapters
    parts = [f"<b>{escape(active_in_words(loaded))}</b> active"]
    if report and report.moved_nats is not None:
        parts.append(f"moves the next token by {report.moved_nats:.2g} nats")
    if report:
        parts.append(f"applied in {format_seconds(report.seconds)}")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in (report.notes if report else ()))
    return f'<div class="small proof" role="status">{" · ".join(parts)}</div>{notes}'


def merge_updates(state: MergeState) -> list[Any]:
    """Updates for ``card.follows_merge``."""
    return [
        merge_line(state),
        gr.update(interactive=not state.running),
        gr.update(visible=True if state.running else "hidden"),
    ]


def merge_line(state: MergeState) -> str:
    """How the merge stands: the stage with a bar, what was made, or what went wrong."""
    if state.order is None:
        return ""
    name = escape(Path(state.order.out).name)
    if state.error is not None:
        return error_box(state.error)
    if state.merged is not None:
        size = format_bytes(state.merged.size_bytes)
        said = (
            f"<b>{name}</b> is in the model menu · {size} · {state.merged.tokens} tokens of its answers are those of "
            "the unmerged pair"
        )
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in state.merged.notes)
        return f'<div class="small" role="status">{said} · {format_seconds(state.merged.seconds)}</div>{notes}'
    progress = state.progress
    words = f"Merging into {Path(state.order.out).name}: {progress.stage if progress else 'starting'}"
    shown = bar(words, 100 * progress.done / progress.total) if progress and progress.total else MOVING_BAR
    return shown + small(words)
