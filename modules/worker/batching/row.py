"""One answer under way, and how it chooses its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from modules.protocol import AdapterChoice
from modules.worker.batching.line import Ticket
from modules.worker.generation import Answer

if TYPE_CHECKING:
    from modules.worker.batching.slabs import Slab

Set = tuple[AdapterChoice, ...]


@dataclass(eq=False)
class Sequence:
    """Tokens, and where their keys and values lie: in a cache of their own, in a slab with others, or nowhere yet.

    ``read``: of how many of ``ids`` there are keys and values. All but the last one's when a step is due.
    """

    ids: list[int]
    adapters: Set = ()
    read: int = 0
    cache: Any = None
    slab: Slab | None = None

    @property
    def reading(self) -> bool:
        """Whether the model has to go through more than the last token first."""
        return self.slab is None and (self.cache is None or len(self.ids) - self.read > 1)

    def forget(self) -> None:
        """Give up keys and values of its own, which can be read again."""
        self.cache, self.read = None, 0


@dataclass(eq=False)
class Row(Sequence):
    """A sequence that is the prompt and the answer of one ticket."""

    ticket: Ticket = field(kw_only=True)
    answer: Answer = field(kw_only=True)
    chooser: Chooser = field(kw_only=True)


class Chooser:
    """Chooses tokens as ``model.generate`` would for this answer alone, with a random generator of its own."""

    def __init__(self, model: Any, answer: Answer, device: Any) -> None:
        kwargs = answer.choosing()
        own = LogitsProcessorList(kwargs.pop("logits_processor", ()))
        # What generate() itself does, by the same functions of transformers 5.23: processors in its order, and those
        # that the model's generation_config.json asks for.
        config, _ = model._prepare_generation_config(None, **kwargs)
        model._prepare_special_tokens(config, True, device=device)
        self._processors = model._get_logits_processor(
            config, input_ids_seq_length=len(answer.prompt_ids), logits_processor=own, device=device
        )
        self._ids = torch.tensor([answer.prompt_ids], dtype=torch.long, device=device)
        self._generator: torch.Generator | None = None
        if config.do_sample:
            self._generator = torch.Generator(device)
            if answer.options.seed < 0:
                self._generator.seed()
            else:
                self._generator.manual_seed(answer.options.seed)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, whatever went before."""
        return self._generator is None and not self._processors

    def __call__(self, scores: torch.Tensor) -> int:
        """``scores``: float32, 1 × vocabulary; may be changed."""
        scores = self._processors(self._ids, scores)
        if self._generator is None:
            token = scores.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        if self._processors:
            self._ids = torch.cat([self._ids, token], dim=-1)
        return int(token)
