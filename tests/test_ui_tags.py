"""Tags of HTML in messages: none is left to Markdown, code is as it was, and what is written comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from modules.ui.tags import shown, written

PIECES = [
    "<b>",
    "</b>",
    '<div a="b">',
    "<think>",
    "<!--",
    "-->",
    "<",
    "`",
    "``",
    "```",
    "~~~",
    "html",
    "x",
    " ",
    "\n",
    "\n\n",
]


def tokens(text: str) -> Iterator[Token]:
    for block in MarkdownIt("commonmark").parse(text):
        yield block
        yield from block.children or []


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_no_tag_is_left_and_code_is_as_it_was(text: str) -> None:
    assert written(shown(text)) == text
    for token in tokens(shown(text)):
        assert token.type not in ("html_block", "html_inline")
        if token.type in ("fence", "code_block"):
            assert written(token.content) == token.content


@pytest.mark.parametrize(
    "text",
    ["", "2 < 3 and 5 > 4", "`<b>` and ``<p>``", "```html\n<p>\n```\ntext", "see <https://a.example> or <a@b.example>"],
)
def test_what_holds_no_tag_outside_of_code_is_left_alone(text: str) -> None:
    assert shown(text) == text


def test_a_tag_is_shown_beside_code_that_holds_the_same() -> None:
    assert shown("<b> is `<b>`") == shown("<b>") + " is `<b>`"
