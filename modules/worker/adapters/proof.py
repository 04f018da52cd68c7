"""How far a set of LoRAs moves the model: measured on a fixed prompt, not believed."""

from __future__ import annotations

from typing import Any

import torch

from modules.errors import AdapterError
from modules.protocol import Task

PROMPT = "Question: What should I know about the harbour of Marseille?\nAnswer: It is"


class Proof:
    """Compares next-token distributions with the base model's, which are computed once and kept (one number a token
    of the vocabulary and token of the prompt)."""

    def __init__(self, model: Any, tokenizer: Any, task: Task) -> None:
        self._model = model
        self._ids = torch.tensor([tokenizer(PROMPT).input_ids], dtype=torch.long)
        self._task = task
        self._base: torch.Tensor | None = None

    def measure_base(self) -> None:
        """To be called once at least while no LoRA is active; costs one forward of some twenty tokens."""
        if self._base is None:
            self._base = self._log_probabilities()

    def moved_nats(self) -> float:
        """The Kullback-Leibler divergence of the model's next-token distribution as it is now from the base's,
        KL(base ‖ now), as the mean over the positions of :data:`PROMPT`; 0 = equal to the bit.

        Raises AdapterError where the model predicts nothing any more, and did before: its numbers have overflowed.
        """
        if self._base is None:
            raise AssertionError("the base was not measured")
        now = self._log_probabilities()
        if torch.equal(now, self._base):
            return 0.0
        if now.isnan().any() and not self._base.isnan().any():
            raise AdapterError(
                "With these LoRAs the model computes no numbers any more: they are too large for its precision.",
                "Give them less weight, or load the model in bfloat16 or float32.",
            )
        divergence = torch.nn.functional.kl_div(now, self._base, reduction="none", log_target=True).sum(-1).mean()
        return max(0.0, float(divergence))

    def _log_probabilities(self) -> torch.Tensor:
        """Positions × vocabulary, float32, on the CPU."""
        ids = self._ids.to(self._input_device())
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._task == "seq2seq":
            start = torch.full_like(ids[:, :1], self._model.config.decoder_start_token_id or 0)
            inputs["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
        with torch.no_grad():
            logits = self._model(**inputs, use_cache=False).logits[0]
        return torch.log_softmax(logits.float().cpu(), dim=-1)

    def _input_device(self) -> torch.device:
        """Of the embedding; where its weights lie on disk or in RAM, the hook that brings them takes any device."""
        device = self._model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else torch.device(device)
