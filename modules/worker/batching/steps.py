"""The calls of the model: through a prompt, one token of one answer, one token of many."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from modules.worker.batching import attention
from modules.worker.batching.row import Sequence
from modules.worker.batching.slabs import Slab, Slabs, own_cache
from modules.worker.generation import input_device
from modules.worker.process import memory_given_back

# Tokens at a time, from which on what a step frees goes back to the system: holes between tensors of that size would
# take half as much again as the step itself, and a different amount each time.
_LONG = 256


class Steps:
    """For one model. All scores are float32, rows × vocabulary, on the device that takes the tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = input_device(model)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}

    def read(self, row: Sequence, tokens: int) -> torch.Tensor | None:
        """Go through the next ``tokens`` of a row into a cache of its own; the scores after the last one of all."""
        row.cache = row.cache or self.new_cache()
        end = min(row.read + tokens, len(row.ids))
        ids = torch.tensor([row.ids[row.read : end]], device=self.device)
        positions = torch.arange(row.read, end, device=self.device)[None]
        seen = torch.ones(1, end, dtype=torch.long, device=self.device)
        with memory_given_back() if end - row.read > _LONG else nullcontext():
            scores = self._forward(
                input_ids=ids, position_ids=positions, attention_mask=seen, past_key_values=row.cache, **self._last_only
            )
        row.read = end
        return scores if end == len(row.ids) else None

    def alone(self, row: Sequence) -> torch.Tensor:
        """The scores after the last token of a row that has a cache of its own."""
        ids = torch.tensor([row.ids[-1:]], device=self.device)
        positions = torch.tensor([[row.read]], device=self.device)
        scores = self._forward(input_ids=ids, position_ids=positions, past_key_values=row.cache)
        row.read += 1
        return scores

    def together(self, slabs: list[Slab]) -> tuple[list[Sequence], torch.Tensor]:
        """The rows of these slabs, and the scores after the last token of each."""
        rows = [row for slab in slabs for row in slab.rows]
        ids = torch.tensor([row.ids[-1:] for row in rows], device=self.device)
        positions = torch.tensor([[row.read] for row in rows], device=self.device)
        with attention.over(self._model, slabs) as step:
            scores = self._forward(input_ids=ids, position_ids=positions, past_key_values=step)
        for row in rows:
            row.read += 1
        return rows, scores

    def set_apart(self, row: Sequence, slabs: Slabs) -> None:
        """Give a row of a slab a cache of its own again."""
        row.cache = own_cache(self.new_cache(), slabs.take_out(row), row.read)

    def new_cache(self) -> Any:
        """An empty cache for one sequence."""
        return DynamicCache(config=self._model.config)

    def _forward(self, **inputs: Any) -> torch.Tensor:
        with torch.inference_mode():  # no_grad would cost a small model 3 % of its speed
            logits = self._model(**inputs, use_cache=True, return_dict=True).logits[:, -1]
        # A copy, as in generate(): the scores of a whole prompt would be kept alive otherwise. Out here, so that
        # whoever chooses from them may change them.
        with torch.no_grad():
            scores: torch.Tensor = logits.to(copy=True, dtype=torch.float32, device=self.device)
        return scores
