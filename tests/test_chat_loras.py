"""How the Chat tab's menus name sets of LoRAs, by a choice or written by hand."""

from __future__ import annotations

import pytest

from modules.errors import OptionError
from modules.ui.chat_loras import ACTIVE, BASE, set_of
from modules.ui.lora_card import read_set


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        (ACTIVE, None),
        (BASE, []),
        ('["with space:0.5"]', ["with space:0.5"]),
        ("pirate", ["pirate"]),
        ("pirate 0.5 + cheese", ["pirate:0.5", "cheese"]),
        ("pirate:-0.5+org/cheese 2", ["pirate:-0.5", "org/cheese:2"]),
        ("with space + with space 2 0.25", ["with space", "with space 2:0.25"]),
    ],
)
def test_a_choice_or_a_text_names_a_set(value: str | None, expected: list[str] | None) -> None:
    assert set_of(value) == expected


@pytest.mark.parametrize("value", ["pirate 7", "pirate + pirate", "pirate + ", "[", "+"])
def test_what_names_no_set_is_refused(value: str) -> None:
    with pytest.raises(OptionError):
        set_of(value)


def test_the_hidden_field_holds_names_and_weights() -> None:
    assert read_set('["a:1", "b c:-0.5"]') == [("a", 1.0), ("b c", -0.5)]
    assert read_set("") == read_set(None) == []
    with pytest.raises(OptionError):
        read_set('["a:9"]')
