"""How much of a text is tokenized, and what is told of the rest, with tokenizers that take blanks for nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from modules.worker.tokenizing import ids_within, last_ids, longest_token, most_characters


class Words:
    """Each word is a token; blanks are none. Its longest has 7 characters."""

    bos_token = "<s>"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "bb": 1, "<s>": 2, "longest": 3}

    def ids(self, text: str) -> list[int]:
        vocabulary = self.get_vocab()
        return [vocabulary.get(word, 4) for word in text.replace("<s>", "<s> ").split()]


WORDS: Any = Words()
TEXTS = st.lists(st.sampled_from(["a", "bb", "longest"]), max_size=5).map(" ".join)


@given(text=TEXTS, times=st.integers(1, 5000), most=st.integers(1, 3000), begin=st.sampled_from(["", "<s>"]))
def test_what_may_fit_is_tokenized_and_what_is_left_out_does_not_fit(
    text: str, times: int, most: int, begin: str
) -> None:
    whole = f"{begin}{' '.join([text] * times)}"
    ids = WORDS.ids(whole)
    found = ids_within(WORDS, WORDS.ids, whole, most)
    assert found == ids or (found is None and len(ids) > most)
    last = last_ids(WORDS, WORDS.ids, whole, most)
    assert last[1:][-most:] == ids[1:][-most:] if len(ids) > most else last == ids
    assert last[:1] == ids[:1] or not begin


def test_blanks_that_a_tokenizer_leaves_out_make_no_text_too_long() -> None:
    assert ids_within(WORDS, WORDS.ids, "a" + " " * 60_000 + "bb", 5) == [0, 1]


def test_the_longest_token_bounds_a_text() -> None:
    assert longest_token(WORDS) == 7
    assert most_characters(WORDS, 1_000_000) >= 7_000_000
    assert ids_within(WORDS, WORDS.ids, " " * (most_characters(WORDS, 8) + 1), 8) is None
