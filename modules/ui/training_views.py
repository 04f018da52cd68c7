"""The HTML of the Training tab: the examples as the model sees them, what a training would take, how one goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from modules.errors import LoadstoneError
from modules.options import TRAINING_OPTIONS, TrainingOptions
from modules.protocol import Progress
from modules.service.training import Estimate, Phase, Run, TrainState
from modules.training.messages import Preview, PreviewExample, PreviewToken, Trained
from modules.ui.cards import error_box
from modules.ui.common import MOVING_BAR, bar, small, table
from modules.ui.curve import curve
from modules.units import counted, format_bytes, format_count, format_seconds

_PHASES = {
    Phase.NONE: ("idle", "No training yet"),
    Phase.STARTING: ("busy", "Starting"),
    Phase.TRAINING: ("busy", "Training"),
    Phase.ENDING: ("busy", "Ending"),
    Phase.PAUSED: ("idle", "Paused"),
    Phase.DONE: ("ready", "Trained"),
    Phase.FAILED: ("failed", "Failed"),
    Phase.CANCELLED: ("idle", "Cancelled"),
}
_FORMATS = {"text": "plain text", "chat": "conversations", "pairs": "prompts with completions"}


# --- the data ---


def preview_card(preview: Preview) -> str:
    """Counts, then the first examples; what carries loss is underlined and shaded, what was cut is marked."""
    counts = small(_counts(preview))
    legend = (
        '<div class="small legend"><span class="token learned">underlined</span> is learned · '
        '<span class="token">plain</span> is only read · <span class="cut-off">✂</span> marks what is cut</div>'
    )
    examples = "".join(_example(place, example) for place, example in enumerate(preview.examples, 1))
    return (
        f'<div class="card preview">{counts}{_notes(preview.notes)}{legend}<ol class="examples">{examples}</ol></div>'
    )


def _counts(preview: Preview) -> str:
    part = f"the first {preview.counted:,} of " if preview.counted < preview.total else ""
    share = 100 * preview.learned_tokens / preview.tokens if preview.tokens else 0
    parts = [
        f"{part}{counted(preview.total, 'example')} of {_FORMATS.get(preview.data_format, preview.data_format)}",
        f"{preview.tokens:,} tokens, {preview.learned_tokens:,} of them learned ({share:.0f} %)",
        f"the longest has {preview.longest:,}",
        counted(preview.steps, "step") if preview.steps else "",
    ]
    return " · ".join(part for part in parts if part)


def _example(place: int, example: PreviewExample) -> str:
    learned = sum(token.learned for token in example.tokens)
    where = f"line {example.line:,} · " if example.line else ""
    head = f"Example {place} · {where}{len(example.tokens):,} tokens, {learned:,} learned"
    cut = f'<span class="cut-off">✂ {example.cut:,} tokens cut here</span>' if example.cut else ""
    return (
        f'<li><div class="small">{escape(head)}</div>'
        f'<div class="tokens" tabindex="0" aria-label="{escape(head)}">{_tokens(example.tokens)}{cut}</div></li>'
    )


def _tokens(tokens: Sequence[PreviewToken]) -> str:
    """One span a token, so that its ends can be seen; line breaks are shown as signs too."""
    spans = []
    for token in tokens:
        text = escape(token.text).replace("\n", "↵\n")
        spans.append(f'<span class="token{" learned" if token.learned else ""}">{text}</span>')
    return "".join(spans)


# --- before it starts ---


def estimate_card(estimate: Estimate) -> str:
    """Memory by parts against what is free, time, and what would make it fit."""
    free, total = max(1, estimate.free_bytes), estimate.total_bytes
    over = "" if estimate.fits else " over"
    label = f"{format_bytes(total)} of {format_bytes(estimate.free_bytes)} free"
    fills = "".join(
        f'<div class="fill planned part-{place % 4}{over}" style="width:{100 * size / max(free, total):.2f}%" '
        f'title="{escape(name)} {format_bytes(size)}"></div>'
        for place, (name, size) in enumerate(estimate.parts.items())
    )
    parts = " · ".join(f"{name} {format_bytes(size)}" for name, size in estimate.parts.items() if size)
    verdict = "Fits." if estimate.fits else "Does not fit."
    took = f" About {format_seconds(estimate.seconds)}." if estimate.seconds is not None else ""
    learns = f" {format_count(estimate.parameters)} parameters are trained." if estimate.parameters else ""
    notes = [*estimate.notes]
    if estimate.ends_first:
        notes.insert(0, f"{estimate.ends_first} has to be unloaded while it trains, and comes back afterwards.")
    ways = f"Would fit: {'; or '.join(estimate.suggestions)}." if estimate.suggestions else ""
    return (
        '<div class="card"><div class="card-head"><b>What it takes</b></div>'
        '<div class="device"><div class="device-head">'
        f"<span>{escape(estimate.on)}</span><span>{label}</span></div>"
        f'<div class="bar" role="img" aria-label="{escape(estimate.on)}: {label}">{fills}</div>{small(parts)}</div>'
        f'<div class="{"ok" if estimate.fits else "bad"}">{verdict}{took}{learns}</div>'
        f"{_notes([*notes, *([ways] if ways else [])])}</div>"
    )


def problem_card(problem: LoadstoneError | None) -> str:
    """Why nothing can be trained now."""
    return f'<div class="card failed">{error_box(problem)}</div>' if problem else ""


# --- how it goes ---


def training_card(state: TrainState) -> str:
    """The training that runs, or the last one: bar, numbers, curve, result or error."""
    css, word = _PHASES[state.phase]
    if state.order is None:
        return ""
    head = f"{word}: {state.name}" if state.phase is not Phase.DONE else f"{state.name} is in the LoRA menu"
    parts = [
        f'<div class="card {css}" data-phase="{state.phase}"><div class="card-head">',
        f'<span class="dot {css}" aria-hidden="true"></span><b role="status">{escape(head)}</b></div>',
        _bar(state) if state.running else "",
        small(numbers) if (numbers := _numbers(state)) and not state.trained else "",
        curve(state.steps, state.evaluations, state.total_steps),
        _result(state.trained) if state.trained else "",
        error_box(state.error) if state.error and state.phase is Phase.FAILED else "",
        small("It can go on from where it stands: see below.") if state.phase is Phase.PAUSED else "",
        f'<details data-keep="training-order"><summary>What is trained</summary>{_order(state)}</details>',
        _notes(state.notes) if state.running else "",
    ]
    return "".join(parts) + "</div>"


def _bar(state: TrainState) -> str:
    last, total, progress = state.last, state.total_steps, state.progress
    if state.phase is Phase.TRAINING and total:
        done = last.step if last else state.started.step if state.started else 0
        return bar(state.name, 100 * done / total)
    if progress and progress.total:
        return bar(progress.stage, 100 * progress.done / progress.total)
    return MOVING_BAR


def _numbers(state: TrainState) -> str:
    """``step 12 of 60 · epoch 0.6 · loss 1.234 · learning rate 1.8e-04 · 210 tokens/s · 1:20 left``."""
    last, progress = state.last, state.progress
    if last is None or (progress and state.phase is Phase.STARTING):
        return _stage(progress) if progress else "the first step" if state.running else ""
    best = min(state.evaluations, key=lambda one: one.loss, default=None)
    parts = [
        f"step {last.step:,} of {state.total_steps:,}",
        f"epoch {last.epoch:.2f}",
        f"loss {last.loss:.3f}",
        f"best evaluation {best.loss:.3f}, at step {best.step:,}" if best else "",
        f"learning rate {last.learning_rate:.2g}",
        f"{last.tokens_per_second:,.0f} tokens/s",
        f"{format_seconds(last.eta_s)} left" if last.eta_s and state.phase is Phase.TRAINING else "",
        _stage(progress) if progress and state.running else "",
    ]
    return " · ".join(part for part in parts if part)


def _stage(progress: Progress) -> str:
    of = f" · {progress.done:,} of {progress.total:,} {progress.unit}" if progress.total else ""
    return progress.stage + of


def _result(trained: Trained) -> str:
    early = f" of step {trained.step:,}, the best by evaluation" if trained.step < trained.steps else ""
    rows = [
        ("Kept", f"the LoRA{early}, {format_bytes(trained.size_bytes)} in loras/{Path(trained.path).name}"),
        ("Loss", f"{trained.loss:.3f} at the end of training"),
        ("Evaluation", f"{trained.evaluation_loss:.3f}" if trained.evaluation_loss is not None else ""),
        ("Took", f"{counted(trained.steps, 'step')} in {format_seconds(trained.seconds)}, "
                 f"{trained.tokens_per_second:,.0f} tokens/s, {format_bytes(trained.peak_bytes)} of memory at most"),
    ]  # fmt: skip
    return table(rows) + _notes(trained.notes)


def _order(state: TrainState) -> str:
    order, started = state.order, state.started
    assert order is not None
    rows = [
        ("Model", order.load.name),
        ("Data", order.data.name or Path(order.data.path).name),
        ("Options", training_in_words(order.options) or "all at their defaults"),
    ]
    if started:
        rows += [
            ("Examples", f"{started.examples:,}, and {started.evaluation_examples:,} to evaluate on"),
            ("Tokens", f"{started.tokens:,} in an epoch, {started.learned_tokens:,} of them learned"),
            ("Trained", f"{started.trainable_parameters:,} parameters"),
        ]
    return table(rows)


def training_in_words(options: TrainingOptions) -> str:
    """The options that differ from the defaults: ``Rank 8 · DoRA``."""
    words = []
    for name, spec in TRAINING_OPTIONS.items():
        value = getattr(options, name)
        if value == spec.default:
            continue
        if spec.kind == "flag":
            words.append(spec.label if value else f"no {spec.label}")
        else:
            shown = (
                " ".join(map(str, value))
                if isinstance(value, tuple)
                else f"{value:g}"
                if spec.kind == "number"
                else value
            )
            words.append(f"{spec.label} {shown} {spec.unit}".strip())
    return " · ".join(words)


def run_in_words(run: Run) -> str:
    """``pirate · on SmolLM2 · step 30 of 100 · 16:02``."""
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    step = f"step {run.step:,}{of}" if run.step else "not begun"
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
    return f"{run.name} · on {run.order.load.name} · {step} · {changed}"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
