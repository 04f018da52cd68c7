"""Numbers in words."""

from __future__ import annotations

import pytest

from modules.units import counted, format_bytes, format_count, format_seconds, format_tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (format_bytes(269_060_552), "269 MB"),
        (format_bytes(7.5 * 2**30), "7.5 GiB"),
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(2 * 2**40), "2 TiB"),
        (format_count(134_515_008), "135 M"),
        (format_count(7_240_000_000), "7.24 B"),
        (format_tokens(8192), "8k"),
        (format_tokens(5000), "5,000"),
        (format_seconds(2.31), "2.3 s"),
        (format_seconds(59.4), "59 s"),
        (format_seconds(185), "3:05"),
        (format_seconds(3723), "1:02:03"),
    ],
)
def test_words(words: str, expected: str) -> None:
    assert words == expected


def test_one_thing_is_one() -> None:
    assert [counted(count, "step") for count in (0, 1, 2, 1000)] == [
        "0 steps",
        "1 step",
        "2 steps",
        "1,000 steps",
    ]
