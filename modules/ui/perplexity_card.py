"""Perplexity on the Training tab: how well the loaded model predicts a text, and what came out before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError, OptionError
from modules.options import LoadOptions, adapters_in_words, split_adapter
from modules.service import Service
from modules.service.perplexity import Measured, PerplexityState, read_text
from modules.ui import asking, text_source
from modules.ui.cards import error_box, options_in_words
from modules.ui.common import DIRECT, MOVING_BAR, bar, small
from modules.units import counted, format_seconds

PASTED = "pasted text"


@dataclass(frozen=True)
class PerplexityCard:
    source: text_source.TextSource
    window: gr.Number
    stride: gr.Number
    most: gr.Number
    measure: gr.Button
    cancel: gr.Button
    forget: gr.Button
    line: gr.HTML
    table: gr.HTML
    emptying: asking.Asking

    @property
    def numbers(self) -> list[Any]:
        return [self.window, self.stride, self.most]

    @property
    def remembered(self) -> dict[str, tuple[Any, Any]]:
        """The numbers that a browser keeps, by name, and their usual values: empty ones."""
        return {"window": (self.window, None), "stride": (self.stride, None), "most": (self.most, None)}

    @property
    def follows_state(self) -> list[Any]:
        """What :func:`state_updates` updates."""
        return [self.line, self.table, self.measure, self.cancel, self.forget]


def build() -> PerplexityCard:
    """Lay out the section."""
    with gr.Accordion("Perplexity: how well the loaded model predicts a text", open=False, elem_id="perplexity"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                source = text_source.build(
                    "perplexity", "Text", "Lower is better; compare only what was measured on the same text."
                )
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    window = _tokens("Length", "What a token may look back on.", "the loaded context", "window")
                    stride = _tokens("Stride", "From one window to the next.", "half the length", "stride")
                most = _tokens("At most", "Of the text, from its beginning.", "all of it", "most")
                with gr.Row(elem_id="perplexity-buttons", elem_classes="flow"):
                    measure = gr.Button("Measure", variant="primary", elem_id="perplexity-start", min_width=90)
                    cancel = gr.Button(
                        "Cancel", variant="stop", elem_id="perplexity-cancel", min_width=80, visible="hidden"
                    )
                line = gr.HTML(elem_id="perplexity-line", elem_classes="tight", padding=False)
        table = gr.HTML(elem_id="perplexity-table", padding=False)
        with gr.Row(elem_id="perplexity-forget-row", elem_classes="flow"):
            forget = gr.Button(
                "Empty the table …", size="sm", elem_id="perplexity-forget", min_width=90, visible="hidden"
            )
    emptying = asking.build("perplexity-forget", "empty it", "keep it")
    return PerplexityCard(source, window, stride, most, measure, cancel, forget, line, table, emptying)


def _tokens(label: str, info: str, usual: str, name: str) -> gr.Number:
    return gr.Number(
        None, label=f"{label}, tokens", info=info, placeholder=usual, precision=0, step=256,
        elem_id=f"perplexity-{name}", interactive=True, min_width=140,
    )  # fmt: skip


def state_updates(service: Service) -> list[Any]:
    """Updates for ``card.follows_state``: the same in every tab of every browser."""
    state, rows = service.perplexity.state(), service.perplexity.results()
    return [
        line_html(state),
        table_html(rows),
        gr.update(interactive=not state.running),
        gr.update(visible=True if state.running else "hidden"),
        gr.update(visible=True if rows else "hidden"),
    ]


def line_html(state: PerplexityState) -> str:
    """How the measurement stands: a bar, what came out, or what went wrong."""
    if state.error is not None:
        return error_box(state.error)
    if state.result is not None:
        return (
            f'<div role="status"><p class="result">{escape(in_words(state.result))}</p>{_by_place(state.result)}</div>'
        )
    if not state.running:
        return ""
    progress = state.progress
    head = f"{state.model} on {state.text}"
    if progress is None or not progress.total:
        return MOVING_BAR + small(head)
    left = (time.monotonic() - state.started) * (progress.total - progress.done) / max(1, progress.done)
    words = f"{progress.done:,} of {progress.total:,} {progress.unit} · {format_seconds(left)} left"
    return bar(head, 100 * progress.done / progress.total) + small(f"{head} · {words}")


def in_words(row: Measured) -> str:
    """``Perplexity 12.34: SmolLM2 on notes.txt, 4,095 tokens in 32 s``."""
    return (
        f"Perplexity {number(row.perplexity)}: {row.model} on {row.text}, {row.tokens:,} tokens "
        f"in {format_seconds(row.seconds)}"
    )


def number(perplexity: float) -> str:
    return f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def _by_place(row: Measured) -> str:
    """Where in the window predictions are good: they fall apart beyond the context that a model is made for."""
    shown = " · ".join("–" if value is None else f"{value:.1f}" for value in row.stretches)
    return small(f"By place in the window, {row.stretch_tokens:,} tokens each: {shown}")


_COLUMNS: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    ("Perplexity", lambda row: number(row.perplexity)),
    ("Model", lambda row: row.model),
    ("Options", lambda row: _options(row) or "defaults"),
    ("LoRAs", lambda row: adapters_in_words(map(split_adapter, row.loras)) or "none"),
    ("Alpha", lambda row: f"{row.alpha:g}"),
    ("Text", lambda row: row.text),
    ("Length", lambda row: f"{row.window_tokens:,}"),
    ("Stride", lambda row: f"{row.stride_tokens:,}"),
    ("Tokens", lambda row: f"{row.tokens:,}"),
    ("Took", lambda row: format_seconds(row.seconds)),
    ("When", lambda row: time.strftime("%Y-%m-%d %H:%M", time.localtime(row.when))),
)


def _options(row: Measured) -> str:
    """In words; a table of an earlier version may hold options that are no more."""
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.options.items()
        }
        return options_in_words(LoadOptions(**{**values, "alpha_value": 1.0}))
    except TypeError:
        return " ".join(row.options)


def table_html(rows: Sequence[Measured]) -> str:
    """Past results, the latest first."""
    if not rows:
        return small("Nothing measured yet.")
    head = "".join(f"<th scope=col>{name}</th>" for name, _ in _COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell(row))}</td>' for _, cell in _COLUMNS)}</tr>" for row in rows)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Past results"><table class="results"><thead>'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(chosen: text_source.Chosen) -> tuple[str, str]:
    """The text and its name. Raises UserError."""
    if chosen.path:
        path = Path(chosen.path).expanduser()
        return read_text(path), path.name
    return chosen.text, PASTED


def _count(value: float | None, name: str) -> int:
    """Raises OptionError."""
    if value is None:
        return 0
    if value < 0 or value != int(value):
        raise OptionError(f"{name} takes a whole number of tokens, not {value:g}.")
    return int(value)


def _measure(service: Service, window: Any, stride: Any, most: Any, *source: Any) -> list[Any]:
    try:
        text, name = _text(text_source.chosen(*source))
        service.perplexity.start(
            text, name, window=_count(window, "Length"), stride=_count(stride, "Stride"), most=_count(most, "At most"),
        )  # fmt: skip
    except LoadstoneError as error:
        return [error_box(error), *state_updates(service)[1:]]
    return state_updates(service)


def _cancel(service: Service) -> list[Any]:
    service.perplexity.cancel()
    return state_updates(service)


def _ask(service: Service) -> asking.Question:
    rows = len(service.perplexity.results())
    return asking.Question(rows, f"Empty the table, with {counted(rows, 'measurement')}?")


def _forget(service: Service, _: int) -> list[Any]:
    service.perplexity.forget()
    return state_updates(service)


def wire(card: PerplexityCard, service: Service) -> None:
    """Connect the section's widgets to the service."""
    inputs = [*card.numbers, *card.source.widgets]
    card.measure.click(partial(_measure, service), inputs, card.follows_state, **DIRECT)
    card.cancel.click(partial(_cancel, service), None, card.follows_state, **DIRECT)
    ask, forget = partial(_ask, service), partial(_forget, service)
    back = [f"#{card.measure.elem_id}", "#perplexity button"]
    asking.wire(card.emptying, card.forget, ask, None, forget, [], card.follows_state, back=back)
