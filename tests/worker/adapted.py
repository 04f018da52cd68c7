"""What the LoRA tests share: loaded models, and what they answer and compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modules.worker import transformers_loader
from modules.worker.adapters import Adapters
from tests import checkpoints, loras


@dataclass
class Adapted:
    """A loaded model and its LoRAs."""

    model: Any
    tokenizer: Any
    adapters: Adapters
    task: str = "causal"

    @cached_property
    def ids(self) -> torch.Tensor:
        """A prompt, 1×n."""
        if not self.tokenizer.chat_template:
            return torch.tensor([[5, 17, 3, 99, 41, 7, 250, 8]])
        messages = [{"role": "user", "content": loras.QUESTION}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return torch.tensor([prompt])

    def logits(self) -> torch.Tensor:
        """Positions × vocabulary, as the model stands."""
        return logits(self.model, self.ids, self.task)

    def text(self, tokens: int = 6) -> str:
        """A greedy answer, as the model stands."""
        output = self.model.generate(input_ids=self.ids, max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(output[0, self.ids.shape[1] :]))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Fails where the active set, or anything that the model computes, is another afterwards."""
        active, before = self.adapters.active, self.logits()
        modules = list(self.model.modules())
        yield
        assert self.adapters.active == active
        assert torch.equal(self.logits(), before)
        assert active or all(now is then for now, then in zip(self.model.modules(), modules, strict=True))


def logits(model: Any, ids: torch.Tensor, task: str = "causal") -> torch.Tensor:
    decoder = {"decoder_input_ids": ids[:, :3]} if task == "seq2seq" else {}
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, **decoder).logits[0]).clone()


def load(path: Path, work: Path, **facts: Any) -> Adapted:
    """Load the checkpoint at ``path`` on the CPU, as a worker does."""
    loaded = transformers_loader.load(checkpoints.order_for(path, work, cpu=True, **facts), lambda _: None)
    adapters = Adapters(loaded.model, loaded.tokenizer, loaded.order)
    return Adapted(loaded.model, loaded.tokenizer, adapters, loaded.order.task)
