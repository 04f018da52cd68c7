"""The widgets of the training options, made from their table, and the way back from their values to options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.options import TRAINING_GROUPS, TRAINING_OPTIONS, Spec, training_options, training_reasons
from modules.ui.form import info_text, option_value, widget

Fields = Mapping[str, gr.components.Component]


def build_fields() -> Fields:
    """What a newcomer needs is open, the rest folded by groups. In the table's order."""
    fields: dict[str, gr.components.Component] = {}
    _rows([spec for spec in TRAINING_OPTIONS.values() if spec.basic], fields)
    for group, title in TRAINING_GROUPS.items():
        rest = [spec for spec in TRAINING_OPTIONS.values() if spec.group == group and not spec.basic]
        if rest:
            with gr.Accordion(f"More on {title[0].lower()}{title[1:]}", open=False, elem_id=f"training-group-{group}"):
                _rows(rest, fields)
    return {name: fields[name] for name in TRAINING_OPTIONS}


def _rows(members: Sequence[Spec], fields: dict[str, gr.components.Component]) -> None:
    for start in range(0, len(members), 2):
        with gr.Row():
            for spec in members[start : start + 2]:
                fields[spec.name] = widget(spec, prefix="training")


def field_values(raw: Sequence[Any]) -> dict[str, Any]:
    """Option values from the widgets' values. Raises OptionError naming the option."""
    return {name: option_value(spec, value) for (name, spec), value in zip(TRAINING_OPTIONS.items(), raw, strict=True)}


def field_updates(raw: Sequence[Any]) -> list[Any]:
    """Updates for the widgets: greyed with the reason where an option has no effect. No value is touched."""
    try:
        reasons = training_reasons(training_options(field_values(raw)))
    except LoadstoneError:  # said where the options are used
        return [gr.skip() for _ in raw]
    return [
        gr.update(interactive=name not in reasons, info=info_text(spec, reasons.get(name, "")))
        for name, spec in TRAINING_OPTIONS.items()
    ]
