"""Where a text comes from: uploaded, pasted, or a data set on the Hub.

Not a path on this machine: what is shown of the text would be a way to read any of its files from afar. The command
line takes paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.ui.common import DIRECT

UPLOAD, PASTE, HUB = "upload", "paste", "hub"
_WORDS = {UPLOAD: "Upload a file", PASTE: "Paste text", HUB: "From the Hub"}


@dataclass(frozen=True)
class TextSource:
    """The widgets; one of the fields is shown."""

    kind: gr.Radio
    upload: gr.File
    paste: gr.Textbox
    hub: gr.Textbox | None  # None where it is not offered

    @property
    def widgets(self) -> list[Any]:
        """What :func:`chosen` takes, in that order."""
        return [self.kind, *self.fields]

    @property
    def remembered(self) -> dict[str, tuple[Any, Any]]:
        """The widgets that a browser can keep, by name, and their usual values."""
        hub = {HUB: (self.hub, "")} if self.hub is not None else {}
        return {"from": (self.kind, UPLOAD), PASTE: (self.paste, ""), **hub}

    @property
    def fields(self) -> list[Any]:
        return [field for field in (self.upload, self.paste, self.hub) if field is not None]


@dataclass(frozen=True)
class Chosen:
    """What the widgets say; of the three texts one at most is not empty."""

    path: str = ""
    text: str = ""
    hub: str = ""


def build(name: str, label: str, help: str, *, hub: bool = False, placeholder: str = "") -> TextSource:
    """Lay out and wire it. ``name``: what its HTML ids begin with; ``hub``: whether data sets are offered."""
    kinds = [kind for kind in _WORDS if hub or kind != HUB]
    source = gr.Radio(
        [(_WORDS[kind], kind) for kind in kinds], value=UPLOAD, label=label, info=help, elem_id=f"{name}-from"
    )
    upload = gr.File(label="File", elem_id=f"{name}-upload", height=120, type="filepath")
    paste = gr.Textbox(
        label="Text", lines=6, max_lines=14, elem_id=f"{name}-paste", visible="hidden", placeholder=placeholder or None
    )
    hub_name = (
        gr.Textbox(
            label="Data set", placeholder="user/name, or user/name:split", elem_id=f"{name}-hub", visible="hidden",
            max_lines=1,
        )
        if hub
        else None
    )  # fmt: skip
    made = TextSource(source, upload, paste, hub_name)
    source.change(_shown(len(made.fields)), source, made.fields, **DIRECT)
    return made


def _shown(count: int) -> Callable[[str], list[Any]]:
    def shown(kind: str) -> list[Any]:
        return [gr.update(visible=True if each == kind else "hidden") for each in list(_WORDS)[:count]]

    return shown


def chosen(kind: str, upload: str | None, paste: str | None, hub: str | None = "") -> Chosen:
    """What the widgets' values name."""
    given = {UPLOAD: upload, PASTE: paste, HUB: hub}
    value = (given.get(kind) or "").strip("\n" if kind == PASTE else None)
    return Chosen(
        path=value if kind == UPLOAD else "", text=value if kind == PASTE else "", hub=value if kind == HUB else ""
    )
