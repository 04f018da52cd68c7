"""What a browser remembers of a form.

In the browser and not on the server: answers that overtake one another would bring old values back. Only what differs
from the usual is kept, so that a changed default is not hidden by an old one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import Dependency

from modules.ui.common import QUIET, edits

# Gradio 6.31 draws an empty number as 0, and so nobody can mean it where the usual is an empty one.
# A browser may keep nothing, or not that much: a text beyond its five megabytes goes, the rest stays.
_KEEP = """const changed = usual.map(([name, value], i) => [name, value === null ? now[i] || null : now[i], value])
    .filter(([, is, value]) => is !== null && is !== value);
  const keep = (most) => localStorage.setItem(key, JSON.stringify(Object.fromEntries(
    changed.filter(([, is]) => String(is).length < most))));
  try { keep(Infinity) } catch { try { keep(10000) } catch {} }"""
# What somebody has typed before the page was complete stays.
_RECOVER = """let kept = {}; try { kept = JSON.parse(localStorage.getItem(key)) ?? {} } catch {}
  return usual.map(([name, value], i) => {
    const is = value === null ? now[i] || null : now[i] ?? value;
    return is !== value ? is : kept[name] ?? value })"""


@dataclass(frozen=True)
class Remembered:
    """Widgets by name, each with its value where nothing is kept; None: an empty number.

    ``key``: of the browser's localStorage.
    """

    key: str
    fields: Mapping[str, tuple[gr.components.Component, Any]]

    def keep(self) -> None:
        """Keep what is changed by hand."""
        gr.on(edits(self._widgets), None, self._widgets, None, js=self._script(_KEEP), trigger_mode="multiple", **QUIET)

    def recover(self, page: gr.Blocks) -> Dependency:
        """Bring it back when ``page`` is opened."""
        return page.load(None, self._widgets, self._widgets, js=self._script(_RECOVER))

    @property
    def _widgets(self) -> list[gr.components.Component]:
        return [widget for widget, _ in self.fields.values()]

    def _script(self, body: str) -> str:
        usual = [(name, value) for name, (_, value) in self.fields.items()]
        return f"(...now) => {{ const key = {json.dumps(self.key)}, usual = {json.dumps(usual)}; {body} }}"
