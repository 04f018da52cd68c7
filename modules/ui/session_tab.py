"""The Session tab: this machine, its packages, and what the server was started with."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from modules import packages
from modules.copies import QuantizedCopy
from modules.devices import torch_has_cuda
from modules.options import GENERATION_OPTIONS, LOAD_OPTIONS, SERVER_OPTIONS, ServerOptions, Spec
from modules.service import Service
from modules.ui import asking, now_card, shelf_card
from modules.ui.common import QUIET, table
from modules.units import format_bytes


def build(service: Service, tab: gr.Tab) -> None:
    """Lay out and wire the tab; its content is made when it is opened and when Refresh is clicked."""
    now_card.build(service, tab)
    shelf_card.build(service, tab)
    content = gr.HTML(elem_id="session")
    with gr.Row(visible=False, equal_height=True) as row:
        copy = gr.Dropdown(choices=[], label="Quantized copy", elem_id="copy", scale=4)
        delete = gr.Button("Delete …", size="sm", min_width=90, elem_id="copy-delete")
    sure = asking.build("copy", "delete it", "keep it")
    refresh = gr.Button("⟳ Refresh", size="sm", min_width=90, elem_id="session-refresh")

    def shown(chosen: str | None) -> list[Any]:
        copies = service.quantized_copies()
        return [session_html(service), gr.update(visible=bool(copies)), copies_update(copies, chosen)]

    def ask(key: str | None) -> asking.Question | str:
        found = next((copy for copy in service.quantized_copies() if copy.key == key), None)
        if found is None:
            return "This copy is not there any more."
        size = format_bytes(found.size_bytes)
        return asking.Question(key, f"Delete the copy {copy_label(found)}, {size}? It can be made again.")

    def deleted(key: str, chosen: str | None) -> list[Any]:
        service.delete_copy(key)
        return shown(chosen)

    outputs = [content, row, copy]
    gr.on([tab.select, refresh.click], shown, copy, outputs, **QUIET)
    back = ["#session-refresh"]
    asking.wire(sure, delete, ask, copy, deleted, [copy], outputs, back=back, acts=QUIET)


def copy_label(copy: QuantizedCopy) -> str:
    return f"{copy.model or copy.key}, {copy.what}"


def copies_update(copies: Sequence[QuantizedCopy], chosen: str | None) -> Any:
    """The menu of the copies. Which is chosen stays a person's choice while it is there."""
    keys = [copy.key for copy in copies]
    value = chosen if chosen in keys else next(iter(keys), None)
    return gr.update(choices=[(copy_label(copy), copy.key) for copy in copies], value=value)


def session_html(service: Service) -> str:
    """Machine, packages, folders and options in force, as tables."""
    machine = service.measure()
    why = "" if torch_has_cuda() else " (this torch has no CUDA)"
    without = [] if machine.gpus else [("GPU", f"none that Loadstone can use{why}: models run on the CPU")]
    rows = [*machine.in_words, *without]
    base, _ = service.base("")
    set_options = [
        (spec.flag, f"{getattr(base.options, name)} (from {base.origin[name]})")
        for name, spec in LOAD_OPTIONS.items()
        if base.origin.get(name, "default") != "default"
    ]
    defaults = service.generation_defaults()
    set_options += [
        (spec.flag, str(value))
        for name, spec in GENERATION_OPTIONS.items()
        if (value := getattr(defaults, name)) != spec.default
    ]
    extras = [
        (feature, "installed" if not packages.missing(feature) else f"missing: {', '.join(packages.missing(feature))}")
        for feature in packages.EXTRAS
    ]
    sections = [
        ("Machine", rows),
        ("Flags in force for the server", server_flags(service.server) or [("", "all at their defaults")]),
        ("Options in force for every model", set_options or [("", "all at their defaults")]),
        ("Model folders", [("", str(root)) for root in service.library.roots]),
        ("Quantized copies", [(copy.model or copy.key, _described(copy)) for copy in service.quantized_copies()]),
        ("Packages", list(packages.installed_versions().items())),
        ("Optional packages", extras),
    ]
    return "".join(f"<h3>{escape(title)}</h3>{table(cells)}" for title, cells in sections if cells)


def server_flags(server: ServerOptions) -> list[tuple[str, str]]:
    """The flags that differ from their default; of a secret only that it is set."""
    given = [(spec, getattr(server, name)) for name, spec in SERVER_OPTIONS.items()]
    return [(spec.flag, _flag_value(spec, value)) for spec, value in given if value != spec.default]


def _flag_value(spec: Spec, value: Any) -> str:
    if spec.secret:
        return f"set ({len(value)}, not shown)" if isinstance(value, tuple) else "set (not shown)"
    if spec.kind == "flag":
        return "on" if value else "off"
    if spec.kind == "number":
        return f"{value:g} {spec.unit}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _described(copy: QuantizedCopy) -> str:
    return f"{copy.what}, {format_bytes(copy.size_bytes)}, made {copy.made:%Y-%m-%d %H:%M}"
