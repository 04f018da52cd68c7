"""Tags of HTML in what is said: shown as they were written.

Markdown takes them for markup, and what Gradio then does not allow, ``<script>`` or ``<think>``, is gone from the page.
There is no switch for that in Gradio, and an entity, ``&lt;``, would stand in what is edited and copied. So a
character that nobody sees follows the ``<`` on the page, and is taken out wherever text leaves it: here, and in
clipboard.js.
"""

from __future__ import annotations

import re
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token

_UNSEEN = "\u2060"  # word joiner: no width, no line break
_TAG = re.compile(r"<(?=/?[A-Za-z][A-Za-z0-9_-]*(?:[\s/>]|\Z)|[!?])")
_CODE_SPAN = re.compile(r"(?<![\\`])(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.DOTALL)


@lru_cache(maxsize=256)  # a conversation is rendered again and again while an answer comes
def shown(text: str) -> str:
    """``text`` as the page's Markdown has to have it. In code everything is shown as it stands anyway."""
    marked = _TAG.sub("<" + _UNSEEN, text)
    if marked == text:
        return text
    lines = marked.split("\n")
    for block in MarkdownIt("commonmark").parse(marked):
        if block.type in ("fence", "code_block") and block.map:
            for number in range(*block.map):
                lines[number] = written(lines[number])
        elif block.type == "inline":
            _unmark_spans(block, lines)
    return "\n".join(lines)


def written(text: str) -> str:
    """What was written, of a text from the page."""
    return text.replace("<" + _UNSEEN, "<")


def _unmark_spans(block: Token, lines: list[str]) -> None:
    """Take the marks out of the code spans of a paragraph or heading, in the ``lines`` where it stands.

    Not of spans over several lines: a line within that begins with a tag would begin a block of HTML.
    """

    def plain(span: re.Match[str]) -> str:
        return span.group() if "\n" in span.group() else written(span.group())

    news = _CODE_SPAN.sub(plain, block.content).split("\n")
    first = block.map[0] if block.map else 0
    for number, (old, new) in enumerate(zip(block.content.split("\n"), news, strict=True), first):
        lines[number] = lines[number].replace(old, new)
