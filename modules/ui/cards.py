"""The page's HTML: the status line, the status card, the memory bars. Pure functions of what the service says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from html import escape
from zlib import crc32

from modules.devices import Machine
from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS, PRECISIONS, LoadOptions, adapters_in_words, changed
from modules.planner import DevicePlan
from modules.planner.learning import Measurement, device_of
from modules.service import Fit, View, nothing_loaded
from modules.supervisor import LOAD_STATES, Loaded, Snapshot, State
from modules.ui.common import MOVING_BAR, bar, table
from modules.units import format_bytes, format_seconds, format_tokens

_STATE_WORDS = {
    State.EMPTY: ("idle", "No model loaded"),
    State.STARTING: ("busy", "Starting"),
    State.LOADING: ("busy", "Loading"),
    State.READY: ("ready", "Ready"),
    State.UNLOADING: ("busy", "Unloading"),
    State.FAILED: ("failed", "Failed"),
    State.CANCELLED: ("idle", "Cancelled"),
}


def loaded_since(snapshot: Snapshot) -> float:
    """The time of day at which what is loaded became ready; 0: nothing is loaded."""
    return snapshot.loaded.since if snapshot.loaded else 0.0


def busy(snapshot: Snapshot) -> bool:
    """Whether a load or an unload is under way."""
    return snapshot.state in (*LOAD_STATES, State.UNLOADING)


def options_in_words(options: LoadOptions) -> str:
    """The options that differ from the defaults: ``4-bit nf4 · alpha_value 2.5``."""
    words = []
    for name, value in changed(options).items():
        spec = LOAD_OPTIONS[name]
        if name in ("model", "ctx_size") or spec.kind == "adapters":
            continue
        if name == "load_in_4bit":
            words.append(f"4-bit {options.quant_type}")
        elif spec.kind == "flag":
            words.append(spec.label if value else f"no {spec.label.lower()}")
        elif name != "quant_type":
            shown = " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else value
            words.append(f"{spec.label} {shown} {spec.unit}".strip())
    return " · ".join(words)


def loaded_in_words(loaded: Loaded) -> str:
    """``Llama-3-8B · 4-bit nf4 · 16k``: what is loaded, with which options."""
    chosen = any(getattr(loaded.order.options, name) for values in PRECISIONS.values() for name in values)
    precision = "" if chosen else loaded.order.quantization or loaded.report.dtype
    parts = [
        loaded.order.name,
        precision,
        options_in_words(loaded.order.options),
        format_tokens(loaded.order.ctx_tokens),
        f"LoRA {adapters}" if (adapters := active_in_words(loaded)) else "",
    ]
    return " · ".join(part for part in parts if part)


def active_in_words(loaded: Loaded) -> str:
    """The LoRAs that are active: ``pirate 0.8 + cheese``; ``""`` where there is none."""
    return adapters_in_words((choice.name, choice.weight) for choice in loaded.order.adapters)


_SAID = '<span role="status">'  # read aloud when it changes; numbers, which change all the time, stand outside


def status_line(snapshot: Snapshot) -> str:
    """One line for every tab: state, what is loaded, memory held, tokens a second."""
    css, word = _STATE_WORDS[snapshot.state]
    parts = [f'<span class="dot {css}" aria-hidden="true"></span>']
    if snapshot.loaded:
        parts.append(f"{_SAID}<b>{escape(loaded_in_words(snapshot.loaded))}</b></span>")
        parts.append(f"<span>{format_bytes(snapshot.loaded.report.footprint_bytes)} held</span>")
        parts.append('<span class="rate"></span>')  # filled in by page.js
    if not snapshot.loaded or busy(snapshot):
        name = f" {snapshot.order.name}" if snapshot.order and busy(snapshot) else ""
        parts.append(f"{_SAID}{escape(word + name)}</span><span>{_percent(snapshot)}</span>")
    return f'<div class="status-line">{"".join(parts)}</div>'


def _percent(snapshot: Snapshot) -> str:
    progress = snapshot.progress
    return f"{100 * progress.done // progress.total} %" if progress and progress.total else ""


def status_card(snapshot: Snapshot) -> str:
    """State, progress, what is loaded and since when, memory before and after, the error with its remedy."""
    css, word = _STATE_WORDS[snapshot.state]
    again = f' data-last="{escape(snapshot.last.name)}"' if snapshot.last else ""  # page.js: what Reload loads
    parts = [f'<div class="card {css}"{again}><div class="card-head"><span class="dot {css}"></span>']
    parts.append(f"<b>{escape(_headline(snapshot, word))}</b></div>")
    if busy(snapshot):
        parts.append(_progress(snapshot))
    elif snapshot.error:
        parts.append(error_box(snapshot.error))
    if snapshot.loaded:
        parts.append(_loaded(snapshot.loaded, still=snapshot.state is not State.READY))
    parts.append(_notes([nothing_loaded(snapshot).message] if snapshot.idled else snapshot.notes))
    parts.append(_log(snapshot.log))
    return "".join(parts) + "</div>"


def _headline(snapshot: Snapshot, word: str) -> str:
    if busy(snapshot) and snapshot.order:
        return f"{word} {snapshot.order.name}"
    if snapshot.error and snapshot.order and snapshot.state is State.FAILED:
        return f"{snapshot.order.name}: {snapshot.error.title.lower()}"
    if snapshot.loaded:
        return f"Ready · {snapshot.loaded.order.name} · loaded in {format_seconds(snapshot.elapsed_s)}"
    return word


def _progress(snapshot: Snapshot) -> str:
    progress = snapshot.progress
    stage = progress.stage if progress else "starting"
    if progress and progress.total:
        eta = f" · {format_seconds(snapshot.eta_s)} left" if snapshot.eta_s else ""
        text = f"{stage} · {progress.done:,} of {progress.total:,} {progress.unit}{eta}"
        shown = bar(stage, 100 * progress.done / progress.total)
    else:
        text, shown = stage, MOVING_BAR
    return f'{shown}<div class="small">{escape(text)} · {format_seconds(snapshot.elapsed_s)}</div>'


def _loaded(loaded: Loaded, *, still: bool) -> str:
    report = loaded.report
    since = time.strftime("%H:%M", time.localtime(loaded.since))
    layers = ", ".join(f"{count} {name}" for name, count in report.layer_classes.items())
    limit = f" (the model's limit is {report.context_limit:,})" if report.context_limit else ""
    rows = [
        ("Still loaded" if still else "", loaded.order.name if still else ""),
        ("Model", f"{report.architecture}, {report.dtype}, {report.parameters:,} parameters"),
        ("Options", options_in_words(loaded.order.options) or "defaults"),
        ("Layers", layers),
        ("Held", ", ".join(f"{format_bytes(size)} on {device}" for device, size in report.device_bytes.items())),
        ("Process", f"{format_bytes(loaded.memory_at_load.rss_bytes)} of RAM{_gpu_memory(loaded)}"),
        *_before_after(loaded),
        ("Context", f"{loaded.order.ctx_tokens:,} tokens{limit}"),
        ("Since", since),
    ]
    return table(rows) + _notes(report.notes)


def _gpu_memory(loaded: Loaded) -> str:
    return "".join(f", {format_bytes(size)} of GPU {i}" for i, size in enumerate(loaded.memory_at_load.gpu_bytes))


def _before_after(loaded: Loaded) -> list[tuple[str, str]]:
    before, after = loaded.machine_before, loaded.machine_after
    if not (isinstance(before, Machine) and isinstance(after, Machine)):
        return []
    rows = [("Free RAM", f"{format_bytes(before.ram_free_bytes)} before, {format_bytes(after.ram_free_bytes)} after")]
    for old, new in zip(before.gpus, after.gpus, strict=False):
        words = f"{format_bytes(old.free_bytes)} before, {format_bytes(new.free_bytes)} after"
        rows.append((f"Free on GPU {new.index}", words))
    return rows


def error_box(error: LoadstoneError) -> str:
    """What happened and what to change, with the traceback folded under it."""
    details = ""
    if error.details:
        text = escape(error.details)
        details = (
            f'<details data-keep="details {crc32(text.encode())}"><summary>Details</summary>'
            f'<button class="copy" data-copy>Copy</button><pre>{text}</pre></details>'
        )
    hint = f"<p>{escape(error.hint)}</p>" if error.hint else ""
    return f'<div class="error" role="alert"><p><b>{escape(error.message)}</b></p>{hint}{details}</div>'


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _log(lines: Iterable[str]) -> str:
    text = escape("\n".join(lines))
    return f'<details class="log" data-keep="log"><summary>Log</summary><pre>{text}</pre></details>' if text else ""


def fit_card(view: View, machine: Machine) -> str:
    """One bar a device: what others hold, what this model would take by class, what stays free; the table behind it."""
    parts = ['<div class="card"><div class="card-head"><b>Will it fit</b></div>']
    planned = {device.name: device for device in view.fit.plan.devices} if view.fit else {}
    for gpu in machine.gpus:
        name = f"GPU {gpu.index}"
        parts.append(_device_bar(f"{name} {gpu.name}", gpu.total_bytes, gpu.free_bytes, planned.get(name)))
        parts += [f'<div class="small">held by {escape(holder.in_words)}</div>' for holder in gpu.holders]
    parts.append(_device_bar("RAM", machine.ram_total_bytes, machine.ram_free_bytes, planned.get("RAM")))
    if (disk := planned.get("disk")) and disk.weights_bytes:
        parts.append(f'<div class="small">{format_bytes(disk.weights_bytes)} of layers on disk</div>')
    if view.fit:
        css = "bad" if not view.fit.fits else "slow" if view.fit.plan.offloaded else "ok"
        parts.append(f'<div class="{css}">{escape(view.fit.verdict)}</div>')
        parts.append(_plan_table(view.fit))
        parts += [f'<div class="small">{escape(_last_load(one))}</div>' for one in view.fit.last]
    if view.problem:
        parts.append(error_box(view.problem))
    notes = view.fit.plan.notes if view.fit else ()
    parts.append(_notes((*view.notes, *notes)))
    return "".join(parts) + "</div>"


def _last_load(one: Measurement) -> str:
    """How good the plan of the last load of this kind was."""
    off = f"{abs(one.error):.0%} too {'much' if one.error > 0 else 'little'}" if abs(one.error) >= 0.005 else "right"
    return (
        f"Last time, {one.model} took {format_bytes(one.measured_bytes)} of {device_of(one.kind)} at most; "
        f"{format_bytes(one.corrected_bytes)} were planned: {off}."
    )


_KINDS = (("weights", "weights_bytes"), ("context", "kv_cache_bytes"), ("working", "working_bytes"),
          ("process", "fixed_bytes"))  # fmt: skip


def _device_bar(name: str, total: int, free: int, device: DevicePlan | None) -> str:
    """A stacked bar in shares of the device's memory; what does not fit is drawn as far as the bar goes."""
    held = 100 * (total - free) / total if total else 0
    label = named = f"{format_bytes(free)} of {format_bytes(total)} free"
    fills = [f'<div class="fill held" style="width:{held:.1f}%" title="held"></div>']
    takes = ""
    if device and device.total_bytes:
        over = " over" if device.total_bytes > min(free, device.cap_bytes) else ""
        sizes = [(kind, getattr(device, key)) for kind, key in _KINDS]
        for kind, size in sizes:
            fills.append(
                f'<div class="fill planned {kind}{over}" style="width:{100 * size / max(1, total):.2f}%" '
                f'title="{kind} {format_bytes(size)}"></div>'
            )
        words = " · ".join(f"{kind} {format_bytes(size)}" for kind, size in sizes if size)
        named = f"{label}, would take {format_bytes(device.total_bytes)}"
        takes = f'<div class="small">would take {format_bytes(device.total_bytes)}: {words}</div>'
    return (
        f'<div class="device"><div class="device-head"><span>{escape(name)}</span><span>{label}</span></div>'
        f'<div class="bar" role="img" aria-label="{escape(name)}: {named}">{"".join(fills)}</div>{takes}</div>'
    )


def _plan_table(fit: Fit) -> str:
    """The plan's numbers, folded."""
    rows = []
    for device in fit.plan.devices:
        classes = ", ".join(
            f"{field.name} {format_bytes(size)}"
            for field in dataclasses.fields(device.classes)
            if (size := getattr(device.classes, field.name))
        )
        rows.append((device.name, f"{device.total_bytes:,} bytes of {device.cap_bytes:,} allowed. Weights: {classes}"))
    rows.append(("At most", fit.plan.peak))
    layers = len(fit.plan.device_map)
    if layers > 1:
        rows.append(("Layers", f"{layers} modules placed one by one"))
    return f'<details class="plan" data-keep="plan"><summary>The plan</summary>{table(rows)}</details>'


def code_list(view: View) -> str:
    """The Python files that a model brings, by name and hash."""
    if not view.facts or not view.facts.code_files:
        return ""
    rows = [(file.name, f"SHA-256 {file.sha256}") for file in view.facts.code_files]
    word = "These files are allowed to run" if view.code_approved or view.code_allowed else ""
    label = LOAD_OPTIONS["trust_remote_code"].label
    word = f"{word} while “{label}” is on:" if word else "The model brings these Python files:"
    return f'<p class="note">{word}</p>{table(rows)}'


def summary(view: View, loaded: Loaded | None) -> str:
    """The line under the model menu: ``135 M · bf16 · 269 MB · 8k context``; for scripts, whether it is loaded."""
    if not view.name:
        return '<div class="small">Choose a model, put one under models/, or download one.</div>'
    text = view.facts.summary() if view.facts else view.problem.title if view.problem else ""
    origins = sorted({o for o in view.origin.values() if o not in ("default", "form")})
    source = f" · options from {', '.join(origins)}" if origins else ""
    state = " data-loaded" if loaded and loaded.order.name == view.name else ""
    return f'<div class="small summary" data-model="{escape(view.name)}"{state}>{escape(text + source)}</div>'
