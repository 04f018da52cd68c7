"""Texts as vectors: the mean over the hidden states that the model's last layer gives their tokens.

A causal model was not trained for this: texts that share words and subjects come near each other, but a model that was
made for embeddings tells far better what two texts have in common.
"""

from __future__ import annotations

import base64
import threading
from array import array
from functools import partial
from typing import TYPE_CHECKING

from modules.embeddings import Embedded, EmbedOrder, Input
from modules.errors import OptionError, RequestTooLong, UnsupportedModel
from modules.protocol import Progress
from modules.worker.engine import Engine
from modules.worker.generation import Loaded, input_device
from modules.worker.perplexity import Using, beside
from modules.worker.telling import Tell
from modules.worker.tokenizing import ids_within

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 4096  # of a batch, padding included; a longer text is a batch of its own
READ_TOKENS = 65_536  # that inputs are made at a time before others have their turn


def embed(
    loaded: Loaded, order: EmbedOrder, using: Using, engine: Engine, tell: Tell, stopped: threading.Event
) -> None:
    """Embed on the engine's thread: one batch between two turns of those who are answered, which neither waits for.

    ``using``: lets a set of LoRAs act. ``tell`` gets Progress …, then one Embedded or Failed, which is not sure to come
    where ``stopped`` is set.
    """

    def begin() -> None:
        go_on(Embedding(loaded, order))

    def go_on(embedding: Embedding) -> None:
        if not embedding.read:
            embedding.read_on()
        else:
            with using(order.adapters):
                embedding.batch()
        tell(Progress("embedding", embedding.done, len(order.inputs), "inputs"))
        if embedding.done == len(order.inputs):
            tell(embedding.result())
        elif not stopped.is_set():
            engine.slip_in(beside, partial(go_on, embedding), loaded, engine, tell)

    engine.slip_in(beside, begin, loaded, engine, tell)


class Embedding:
    """The inputs of one order: read some at a time until :attr:`read`, then computed in batches of about equal length.

    Raises UnsupportedModel for a model that is no causal one.
    """

    def __init__(self, loaded: Loaded, order: EmbedOrder) -> None:
        if loaded.order.task != "causal":
            raise UnsupportedModel(
                f"{loaded.order.name} gives no embeddings: it reads with an encoder and writes with a decoder.",
                "Ask a causal model.",
            )
        self._model = loaded.model
        self._loaded = loaded
        self._inputs = order.inputs
        self._ids: list[array[int]] = []
        self._batches: list[list[int]] = []
        self._vectors: list[torch.Tensor | None] = [None] * len(order.inputs)
        self.done = 0

    @property
    def read(self) -> bool:
        """Whether all inputs are tokens."""
        return len(self._ids) == len(self._inputs)

    def read_on(self) -> None:
        """Make the next inputs tokens, about :data:`READ_TOKENS` of them.

        Raises OptionError for an input without tokens, or with one that the model does not know, RequestTooLong for one
        beyond the context.
        """
        tokens = 0
        while not self.read and tokens < READ_TOKENS:
            place = len(self._ids)
            self._ids.append(array("q", _ids(self._loaded, self._inputs[place], place)))
            tokens += len(self._ids[place])
        if self.read:
            lengths = [len(ids) for ids in self._ids]
            self._batches = _batches(sorted(range(len(lengths)), key=lengths.__getitem__), lengths)

    def batch(self) -> None:
        """Compute the next batch. One that fails is the next once more."""
        import torch

        places = self._batches[0]
        rows = [self._ids[place] for place in places]
        longest = max(map(len, rows))
        device = input_device(self._model)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        with torch.no_grad():
            states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            weights = mask.to(states.device).unsqueeze(-1)
            means = (states.float() * weights).sum(1) / weights.sum(1)  # batch × hidden size
            unit = torch.nn.functional.normalize(means, dim=-1).cpu()
        for place, vector in zip(places, unit, strict=True):
            self._vectors[place] = vector
        del self._batches[0]
        self.done += len(places)

    def result(self) -> Embedded:
        """All vectors, in the order of the inputs."""
        import torch

        whole = torch.stack([vector for vector in self._vectors if vector is not None])
        data = whole.numpy().astype("<f4").tobytes()
        return Embedded(base64.b64encode(data).decode(), whole.shape[1], tuple(map(len, self._ids)))


def _ids(loaded: Loaded, one: Input, place: int) -> list[int]:
    """The ids of one input, with the special tokens that the tokenizer gives a text."""
    tokenizer, most = loaded.tokenizer, loaded.order.ctx_tokens
    ids = list(one.ids) or ids_within(tokenizer, lambda text: list(tokenizer(text).input_ids), one.text, most)
    if ids is None or len(ids) > most:
        size = f"{len(ids):,} tokens" if ids is not None else f"{len(one.text):,} characters"
        raise RequestTooLong(f"Input number {place + 1} has {size}; a context of {most:,} tokens takes no more.")
    if not ids:
        raise OptionError(f"input: number {place + 1} has no tokens.")
    known = loaded.model.get_input_embeddings().weight.shape[0]
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise OptionError(f"input: the model has no token {unknown}; its last is {known - 1}.")
    return ids


def _batches(places: list[int], lengths: list[int]) -> list[list[int]]:
    """``places``, shortest input first, cut so that no batch has more than :data:`BATCH_TOKENS`, padding included."""
    batches: list[list[int]] = []
    for place in places:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= BATCH_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
