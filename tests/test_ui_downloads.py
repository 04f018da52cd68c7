"""What the download panel takes what is typed for."""

from __future__ import annotations

import pytest

from modules.ui.download_card import is_search


@pytest.mark.parametrize(
    ("text", "searched"),
    [
        ("small chat model", True),
        ("llama", True),
        ("user/model", False),
        ("https://huggingface.co/user/model", False),
        ("https://github.com/user/model", False),  # whose refusal says more than that nothing is found
        ("https://huggingface.co/datasets/user/data", False),
        (" ", False),
    ],
)
def test_words_are_searched_for_addresses_are_not(text: str, searched: bool) -> None:
    assert is_search(text) is searched
