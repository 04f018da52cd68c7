"""Token ids, one at a time, into text."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"  # what decoders put for bytes that are no character, or not yet one


class TextStream:
    """The text of a growing list of token ids.

    The pieces joined equal ``tokenizer.decode`` of all ids, without special tokens and without the clean-up
    of spaces, which changes text that has been handed out already. A character whose bytes come in several
    tokens is handed out when it is whole; bytes that never become one give U+FFFD, as in ``decode``. (Where
    a tokenizer with byte fallback meets such bytes, ``decode`` may take back characters before them; here they stay.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._handed_out: list[str] = []
        self._window = 0  # ids before it no longer influence what follows
        self._read = 0  # ids before it are handed out
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._stream: Any = _decode_stream() if self._backend is not None else None

    def push(self, token: int) -> str:
        """The text that ``token`` completes; ``""`` where it completes none."""
        self._ids.append(token)
        text = self._step(token) if self._stream is not None else self._windowed()
        if text:
            self._handed_out.append(text)
            self._window, self._read = self._read, len(self._ids)
        return text

    def finish(self) -> str:
        """The rest: the bytes at the end that did not become a character."""
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
