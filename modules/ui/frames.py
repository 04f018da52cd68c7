"""Scripts of ours that have to run before Gradio's own: its ``head`` is put into the page after they have run."""

from __future__ import annotations

from pathlib import Path

from gradio.routes import templates
from jinja2.ext import Extension

_SCRIPT = Path(__file__).with_suffix(".js")
_PAGE = "frontend/index.html"  # Gradio's template


class _ScriptFirst(Extension):
    """Puts ``frames.js`` at the beginning of the page's head."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        if name != _PAGE:
            return source
        script = f"{{% raw %}}<script>{_SCRIPT.read_text(encoding='utf-8')}</script>{{% endraw %}}"
        return source.replace("<head>", f"<head>{script}", 1)


def install() -> None:
    """For all pages of this process; more than once is the same as once."""
    templates.env.add_extension(_ScriptFirst)
