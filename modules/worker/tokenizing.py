"""Texts into token ids, without tokenizing at length what is too long anyway.

A megabyte of text takes about a second and 100 MB to tokenize, and an answer's prompt is tokenized between the steps of
everybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

from modules.errors import RequestTooLarge

MOST_TEXT_BYTES = 1 << 20  # of a text whose ids, or their number, are asked for; and so many ids become a text
Encode: TypeAlias = Callable[[str], list[int]]

_NORMALIZED = 4  # times as many characters as a token has may a normalizer have made it of
_NEVER_MANY = 1 << 16  # characters that are tokenized whatever they are: a tokenizer may leave out blanks
_FIRST_PART = 8  # characters for each token that is allowed: most texts have 3 to 5
_NEXT_PART = 2  # times as long as the part before


@lru_cache(maxsize=1)  # a tenth of a second of work; a process has one model
def longest_token(tokenizer: Any) -> int:
    """The characters of the vocabulary's longest token, at least 1."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1) or 1


def most_characters(tokenizer: Any, tokens: int) -> int:
    """How many characters a text of so many tokens has at most."""
    return max(_NEVER_MANY, (tokens + 1) * longest_token(tokenizer) * _NORMALIZED)


def too_many(tokenizer: Any, characters: int, tokens: int) -> bool:
    """Whether a text of so many characters has more than ``tokens`` tokens for sure."""
    return characters > _NEVER_MANY and characters > most_characters(tokenizer, tokens)


def ids_within(tokenizer: Any, encode: Encode, text: str, most: int) -> list[int] | None:
    """What ``encode`` makes of ``text``; None where its front alone, or its length, tells of more than ``most`` ids.

    What is only a little longer is tokenized whole, so that there may be more than ``most`` ids.
    """
    if too_many(tokenizer, len(text), most):
        return None
    if any(len(encode(text[:part])) > _surely(most) for part in _parts(len(text), most)):
        return None
    return encode(text)


def last_ids(tokenizer: Any, encode: Encode, text: str, most: int) -> list[int]:
    """What ``encode`` makes of ``text``, or of its right end alone where that has more than ``most`` ids already.

    A special token that begins the text stays its beginning.
    """
    begin = tokenizer.bos_token if tokenizer.bos_token and text.startswith(tokenizer.bos_token) else ""
    if too_many(tokenizer, len(text), most):
        text = text[-most_characters(tokenizer, most) :]
    for part in _parts(len(text), most):
        ids = encode(begin + text[-part:])
        if len(ids) > _surely(most):
            return ids
    return encode(text if text.startswith(begin) else begin + text)


def refuse_large(count: int, unit: str) -> None:
    """Raises RequestTooLarge beyond :data:`MOST_TEXT_BYTES`. ``unit``: "bytes of text" or "tokens"."""
    if count > MOST_TEXT_BYTES:
        raise RequestTooLarge(
            f"{count:,} {unit} are too many: the tokenizer takes {MOST_TEXT_BYTES:,} at a time.",
            "Send them in parts, and put together what comes back.",
        )


def size_bytes(text: str) -> int:
    """As UTF-8, of which each byte is a token at most."""
    return len(text.encode("utf-8", "surrogatepass"))


def _surely(most: int) -> int:
    """So many ids of a part tell that the whole has more than ``most``: only where it was cut may they differ."""
    return most + most // 4 + 64


def _parts(length: int, most: int) -> Iterator[int]:
    """The lengths of the parts to try before the whole, shortest first, in characters."""
    part = _FIRST_PART * _surely(most)
    while part * 2 < length:
        yield part
        part *= _NEXT_PART
