"""Token ids, one at a time, into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what decoders put for bytes that are no character, or not yet one
_CHARACTER = 4  # bytes, and so tokens, that a character has at most
_FURTHEST = 64  # ids of a prompt among which one is looked for that has a text


class TextStream:
    """The text of a growing list of token ids.

    The pieces joined equal ``tokenizer.decode`` of all ids, without special tokens and without the clean-up
    of spaces, which changes text that has been handed out already. A character whose bytes come in several
    tokens is handed out when it is whole; bytes that never become one give U+FFFD, as in ``decode``. (Where
    a tokenizer with byte fallback meets such bytes, ``decode`` may take back characters before them; here they stay.)

    ``before``: the ids of a text that these go on with. The pieces are then what decoding all of them gives beyond
    that text, and begin with the blank that many decoders (Llama 2's, Mistral's, Phi 3's) take from the front of a
    text. A character that ``before`` leaves unfinished is handed out when it is whole.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._handed_out: list[str] = []
        self._window = 0  # ids before it no longer influence what follows
        self._read = 0  # ids before it are handed out
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._stream: Any = _decode_stream() if self._backend is not None else None
        self._known = ""  # the end of the text of ``before``, as long as it is not handed out as read
        for token in self._anchor(before):
            self.push(token)
        self._known = self._rest()

    def push(self, token: int) -> str:
        """The text that ``token`` completes; ``""`` where it completes none."""
        self._ids.append(token)
        text = self._step(token) if self._stream is not None else self._windowed()
        if not text:
            return ""
        self._handed_out.append(text)
        self._window, self._read = self._read, len(self._ids)
        return self._unknown(text)

    def finish(self) -> str:
        """The rest: the bytes at the end that did not become a character."""
        return self._unknown(self._rest())

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """The text of each of ``tokens`` if it came next: with the blank before it, special tokens by their names, and
        U+FFFD for a part of a character."""
        ids = self._ids[self._window :]
        before = self._decode(ids)
        found = []
        for token in tokens:
            both = self._decode([*ids, token])
            beyond = both[len(before) :] if both.startswith(before) else ""
            found.append(beyond or str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)))
        return found

    def _anchor(self, before: Sequence[int]) -> list[int]:
        """The last ids of ``before``, as many as what follows depends on: from a token on that has a text, and that
        does not begin amidst a character, since decoders with byte fallback give up on all bytes in a row."""
        tail = list(before[-_FURTHEST:])
        for start in range(len(tail) - 1, -1, -1):
            for count in range(1, _CHARACTER + 1):
                text = self._decode(tail[start : start + count])
                if text and not text.startswith(_UNFINISHED):
                    return tail[start:]
        return tail

    def _unknown(self, text: str) -> str:
        """The first new text, without what of it ended the text of ``before`` already; all later text as it is."""
        known, self._known = self._known, ""
        return text[common(known, text) :]

    def _rest(self) -> str:
        whole, handed_out = self._decode(self._ids), "".join(self._handed_out)
        return whole[len(handed_out) :] if whole.startswith(handed_out) else self._beyond_window()

    def _step(self, token: int) -> str:
        """By the tokenizers library: 0.35 µs a token."""
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:
            # "Invalid prefix": the decoder changed earlier text, which the library's stream gives up on.
            self._stream = None
            return self._windowed()

    def _windowed(self) -> str:
        """By decoding the last few tokens with and without the new ones: decoders look at a token's neighbours."""
        text = self._beyond_window()
        return "" if text.endswith(_UNFINISHED) else text

    def _beyond_window(self) -> str:
        before = self._decode(self._ids[self._window : self._read])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _decode_stream() -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)


class StopText:
    """Text that flows until one of ``stops`` appears, which is cut off with everything behind it.

    Text that may be the beginning of a stop is held back until it is known to be none.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """As much of the text as can be handed out now; sets :attr:`stopped` where a stop appeared."""
        if not self._stops:
            return text
        text = self._held + text
        self._held = ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop."""
        return "" if self.stopped else self._held


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
