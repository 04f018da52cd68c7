"""Widgets made from the option table, and the way back from their values to options.

Nothing here knows a single option by name except the three that one precision control stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.options import GROUPS, LOAD_OPTIONS, PRECISIONS, LoadOptions, Spec
from modules.service import View
from modules.ui.common import markdown

PRECISION_OPTIONS = frozenset(name for values in PRECISIONS.values() for name in values)
_OPEN_GROUPS = ("precision", "context", "memory")  # what a newcomer sees without opening anything


@dataclass(frozen=True)
class Form:
    """The widgets of the loader options. ``fields`` by option name; precision is one widget for three options."""

    precision: gr.Radio
    fields: Mapping[str, gr.components.Component]
    groups: Mapping[str, gr.Accordion]

    @property
    def widgets(self) -> list[gr.components.Component]:
        """Every widget, in the order of :func:`form_values`' arguments."""
        return [self.precision, *self.fields.values()]


def widget(spec: Spec, value: Any = None, *, prefix: str = "option") -> gr.components.Component:
    """The widget for one option, at ``value`` or the table's default. Bounds are the option's to check, in words.

    ``prefix``: of its HTML id, which is the page's alone.
    """
    shown = widget_value(spec, spec.default if value is None else value)
    common: dict[str, Any] = {
        "label": _label(spec),
        "info": info_text(spec),
        "elem_id": f"{prefix}-{spec.name}",
        "interactive": True,
    }
    if spec.kind == "flag":
        return gr.Checkbox(value=shown, **common)
    if spec.kind == "choice":
        return gr.Dropdown(choices=list(spec.choices), value=shown, filterable=False, **common)
    if spec.kind in ("integer", "number"):
        digits = 0 if spec.kind == "integer" else None
        return gr.Number(
            value=shown, step=spec.step or 1, precision=digits, placeholder=spec.default_help or None, **common
        )
    return gr.Textbox(value=shown, placeholder=spec.default_help or None, **common)


def _label(spec: Spec) -> str:
    return f"{spec.label}, {spec.unit}" if spec.unit else spec.label


def info_text(spec: Spec, reason: str = "", origin: str = "") -> str:
    """The line under an option's label: why it is greyed or what it does, its flag, and where its value is from."""
    text = f"✕ {markdown(reason)}" if reason else spec.help
    source = f" · from {origin}" if origin and origin not in ("default", "form") else ""
    return f"{text} `{spec.flag}`{source}"


def widget_value(spec: Spec, value: Any) -> Any:
    """An option's value as its widget shows it. What is left to the program is an empty field."""
    if spec.kind == "adapters":
        return json.dumps(list(value))
    if spec.kind in ("numbers", "names"):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    if spec.default_help and value == spec.default and spec.kind in ("integer", "number"):
        return None
    return value


def option_value(spec: Spec, value: Any) -> Any:
    """The option's value from what its widget holds. Raises OptionError naming the option."""
    if value is None:
        return spec.default
    return spec.parse(value)


def build_form() -> Form:
    """All loader options, by group: what a newcomer needs is open, the rest is folded."""
    fields: dict[str, gr.components.Component] = {}
    groups: dict[str, gr.Accordion] = {}
    precision = gr.Radio(
        choices=[(_precision_label(name), name) for name in PRECISIONS], value=next(iter(PRECISIONS)),
        label="Precision", info="How the weights are held in memory.", elem_id="option-precision", interactive=True,
    )  # fmt: skip
    for group, title in GROUPS.items():
        members = [
            spec for spec in LOAD_OPTIONS.values()
            if spec.group == group and spec.in_form and spec.name not in PRECISION_OPTIONS
            and spec.kind != "adapters"
        ]  # fmt: skip
        if not members:
            continue
        if group in _OPEN_GROUPS:
            basic, rest = [s for s in members if s.basic], [s for s in members if not s.basic]
            _rows(basic, fields)
            members, title = rest, f"More on {title.lower()}"
        if members:
            with gr.Accordion(title, open=False, elem_id=f"group-{group}") as groups[group]:
                _rows(members, fields)
    for spec in LOAD_OPTIONS.values():
        if spec.kind == "adapters":  # filled in by the LoRA card
            with gr.Row(elem_classes="unseen"):
                fields[spec.name] = gr.Textbox(widget_value(spec, spec.default), label=spec.label)
    return Form(precision, {name: fields[name] for name in LOAD_OPTIONS if name in fields}, groups)


def _rows(members: Sequence[Spec], fields: dict[str, gr.components.Component]) -> None:
    """Two widgets a row; one column on a narrow screen, which Gradio does by ``min_width``."""
    for start in range(0, len(members), 2):
        with gr.Row():
            for spec in members[start : start + 2]:
                fields[spec.name] = widget(spec)


def _precision_label(name: str) -> str:
    flags = " ".join(LOAD_OPTIONS[option].flag.lstrip("-") for option in PRECISIONS[name])
    return f"{name} ({flags})" if flags and flags != name else name


def precision_of(options: LoadOptions) -> str:
    """Which state of the precision control the options are."""
    for name, values in PRECISIONS.items():
        if values and all(getattr(options, option) == value for option, value in values.items()):
            if name == "bf16" and (options.load_in_4bit or options.load_in_8bit):
                continue
            return name
    return next(iter(PRECISIONS))


def form_values(form: Form, raw: Sequence[Any]) -> dict[str, Any]:
    """Option values from the widgets' values, in the order of ``form.widgets``. Raises OptionError."""
    precision, *rest = raw
    chosen = PRECISIONS.get(precision, {})
    values: dict[str, Any] = {name: chosen.get(name, False) for name in PRECISION_OPTIONS}
    for name, value in zip(form.fields, rest, strict=True):
        values[name] = option_value(LOAD_OPTIONS[name], value)
    return values


def form_updates(form: Form, view: View, *, with_values: bool) -> list[Any]:
    """Updates for ``form.widgets``: greyed with the reason where an option does not apply.

    Without ``with_values`` no value is touched, so that nothing that is being typed is overwritten.
    """
    updates = [_precision_update(view, with_values)]
    for name in form.fields:
        spec, reason = LOAD_OPTIONS[name], view.reasons.get(name, "")
        update: dict[str, Any] = {
            "interactive": not reason,
            "info": info_text(spec, reason, view.origin.get(name, "")),
        }
        if with_values:
            shown = spec.default if reason and spec.strict else getattr(view.options, name)
            update["value"] = widget_value(spec, shown)
        if name == "ctx_size":
            update["placeholder"] = f"{view.context_tokens:,}" if view.context_tokens else spec.default_help
        updates.append(gr.update(**update))
    return updates


def _precision_update(view: View, with_values: bool) -> Any:
    reason = view.reasons.get("load_in_4bit", "")
    origin = next((o for n in PRECISION_OPTIONS if (o := view.origin.get(n, "default")) != "default"), "")
    source = f" · from {origin}" if origin and origin != "form" else ""
    info = f"✕ {markdown(reason)}" if reason else f"How the weights are held in memory.{source}"
    value = {"value": next(iter(PRECISIONS)) if reason else precision_of(view.options)} if with_values else {}
    return gr.update(interactive=not reason, info=info, **value)


def group_updates(form: Form, view: View) -> list[Any]:
    """Updates for ``form.groups``: opened where something in them differs from the default; none is closed."""

    def differs(group: str) -> bool:
        members = [spec for spec in LOAD_OPTIONS.values() if spec.group == group and spec.name in form.fields]
        folded = [spec for spec in members if not (group in _OPEN_GROUPS and spec.basic)]
        return any(getattr(view.options, s.name) != s.default and s.name not in view.reasons for s in folded)

    return [gr.update(open=True) if differs(group) else gr.skip() for group in form.groups]
