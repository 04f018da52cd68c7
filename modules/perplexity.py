"""The messages of a measurement of perplexity, beside those of :mod:`modules.protocol`.

``POST /perplexity`` with a :class:`PerplexityOrder` is answered by lines of JSON: Progress …, then one
:class:`Perplexity` or Failed. Closing the connection stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

from modules.protocol import AdapterChoice, message

PERPLEXITY = "/perplexity"


@message(adapters=AdapterChoice)
@dataclass(frozen=True)
class PerplexityOrder:
    """How well the model predicts a text, window by window.

    The first window predicts all of its tokens but the first, each later one those that none before it has, so that
    every token is predicted once, with at least ``window_tokens - stride_tokens`` tokens before it. Where windows do
    not overlap, nothing predicts the first token of each.
    """

    text: str
    window_tokens: int = 0  # what a token may look back on; 0: the context that was loaded
    stride_tokens: int = 0  # from one window's beginning to the next one's; 0: half a window
    most_tokens: int = 0  # of the text, from its beginning; 0: all
    adapters: tuple[AdapterChoice, ...] | None = None  # as a GenerateOrder's


@message()
@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of -ln p(token) over the tokens that were predicted.

    ``stretches``: the same by place in the window, for each ``stretch_tokens`` of it; None where none was predicted.
    """

    perplexity: float
    tokens: int  # that were predicted
    windows: int
    window_tokens: int
    stride_tokens: int
    stretch_tokens: int
    stretches: tuple[float | None, ...]
    seconds: float  # of computing, waiting for answers not counted
