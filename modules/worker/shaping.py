"""What one answer is held to beside the sampling options: penalties, biases, a grammar; and its log probabilities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from modules.errors import OptionError, UnsupportedParameter
from modules.protocol import Shape
from modules.worker.tools import ToolFormat, call_grammar


class Shaping:
    """A logits processor for one answer. It comes before temperature, top-k, top-p and min-p.

    ``thinking`` tells whether the answer is still reasoning, which no grammar holds. ``texts`` gives the text of each
    of some tokens if it came next.
    """

    def __init__(
        self,
        shape: Shape,
        tokenizer: Any,
        end_tokens: frozenset[int],
        tools: ToolFormat | None,
        thinking: Callable[[], bool],
        texts: Callable[[list[int]], list[str]],
        repetition_penalty: float = 1.0,
    ) -> None:
        """Raises UnsupportedParameter and OptionError for a grammar that cannot be followed."""
        self._shape = shape
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._texts = texts
        self._repetition_penalty = repetition_penalty
        self._bias = {int(token): value for token, value in shape.logit_bias.items()}
        self._counts: Counter[int] = Counter()
        self._logprobs: torch.Tensor | None = None  # of the step under way, over the vocabulary
        self._end_tokens = end_tokens
        self._matcher: Any = None
        self._grammar = _grammar(shape, tools)
        if self._grammar:
            _check_grammar(self._grammar, tokenizer, "response_format" if shape.json_schema is not None else "tools")

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores``: float32, 1 × vocabulary, the model's own; returns them changed."""
        if self._shape.logprobs is not None:
            self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        if self._repetition_penalty != 1:
            from transformers import RepetitionPenaltyLogitsProcessor

            scores = RepetitionPenaltyLogitsProcessor(self._repetition_penalty)(input_ids, scores)
        scores = self._penalized(scores)
        return self._held(scores) if self._grammar and not self._thinking() else scores

    def _penalized(self, scores: Any) -> Any:
        """OpenAI's formula: logit − count · frequency_penalty − (count > 0) · presence_penalty, then the bias."""
        change: dict[int, float] = {}
        if self._shape.frequency_penalty or self._shape.presence_penalty:
            for token, count in self._counts.items():
                change[token] = -count * self._shape.frequency_penalty - self._shape.presence_penalty
        width = scores.shape[-1]
        for token, value in self._bias.items():
            if token >= width:
                raise OptionError(f"logit_bias: the model has no token {token}; its last is {width - 1}.")
            change[token] = change.get(token, 0.0) + value
        if change:
            index = torch.tensor(list(change), device=scores.device)
            scores[0].index_add_(
                0, index, torch.tensor(list(change.values()), device=scores.device, dtype=scores.dtype)
            )
        return scores

    def _held(self, scores: Any) -> Any:
        """Only the tokens that the grammar allows next."""
        from llguidance import LLMatcher

        if self._matcher is None:
            tokens = _ll_tokenizer(self._tokenizer, scores.shape[-1], tuple(sorted(self._end_tokens)))
            self._matcher = LLMatcher(tokens, self._grammar)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise OptionError(f"The form asked for cannot be kept to: {self._matcher.get_error()}")
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[-1]].astype(bool)
        if allowed.size < scores.shape[-1]:
            allowed = np.pad(allowed, (0, scores.shape[-1] - allowed.size))
        if self._matcher.is_stopped():
            allowed[list(self._end_tokens)] = True
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def chosen(self, token: int) -> dict[str, Any] | None:
        """Note the token that was chosen in this step. Its log probabilities, if they are wanted."""
        self._counts[token] += 1
        if self._matcher is not None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._logprobs is None or token in self._end_tokens:
            return None
        best = torch.topk(self._logprobs, self._shape.logprobs or 0)
        text, *others = self._texts([token, *best.indices.tolist()])
        return {
            "token": text,
            "logprob": float(self._logprobs[token]),
            "top": [
                {"token": other, "logprob": value} for other, value in zip(others, best.values.tolist(), strict=True)
            ],
        }


def _grammar(shape: Shape, tools: ToolFormat | None) -> str:
    """The grammar in llguidance's form; "" for free text. Raises OptionError for a schema that is none."""
    if shape.tools and shape.tool_choice != "auto" and tools is not None:
        return call_grammar(tools, shape.tools, shape.tool_choice)
    if shape.json_schema is None:
        return ""
    from llguidance import LLMatcher

    # One way of writing the spaces: a small model would otherwise write them for ever.
    schema = json.dumps(shape.json_schema or {"type": "object"})
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))


def _check_grammar(grammar: str, tokenizer: Any, parameter: str) -> None:
    """``parameter``: what the schema came with, for the errors."""
    from llguidance import LLMatcher

    if not tokenizer.is_fast:
        raise UnsupportedParameter(
            "response_format and forced tools need a tokenizer of the tokenizers library, which this model has not.",
            "Load the model with --use_fast, or leave them out.",
        )
    if problem := LLMatcher.validate_grammar(grammar):
        raise OptionError(f"{parameter}: the schema cannot be used: {problem}")


@lru_cache(maxsize=1)  # about a second of work; a process has one model
def _ll_tokenizer(tokenizer: Any, vocabulary: int, end_tokens: tuple[int, ...]) -> Any:
    from llguidance import LLTokenizer

    backend = tokenizer.backend_tokenizer
    copied = type(backend).from_str(backend.to_str())
    copied.no_padding()
    copied.no_truncation()
    return LLTokenizer(copied.to_str(), n_vocab=vocabulary, eos_token=list(end_tokens) or None)
