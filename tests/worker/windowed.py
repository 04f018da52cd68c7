"""Small real models some of whose layers see a window only."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import checkpoints

_HALF = ["sliding_attention", "full_attention"]


def _gemma3(numbers: Mapping[str, Any]) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**numbers, head_dim=16, layer_types=_HALF * 2)


def _gemma3_that_sees(numbers: Mapping[str, Any]) -> Any:
    from transformers import Gemma3Config

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    return Gemma3Config(
        text_config=_gemma3(numbers), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7, tie_word_embeddings=True,
    )  # fmt: skip


def _gemma4(numbers: Mapping[str, Any]) -> Any:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **numbers, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=49152, layer_types=_HALF * 2,
    )  # fmt: skip


def _gemma2(numbers: Mapping[str, Any]) -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**numbers, head_dim=16, layer_types=_HALF * 2)


def _gpt_oss(numbers: Mapping[str, Any]) -> Any:
    from transformers import GptOssConfig

    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return GptOssConfig(
        **{**numbers, "tie_word_embeddings": False}, head_dim=16, layer_types=_HALF * 2, num_local_experts=4,
        num_experts_per_tok=2, rope_parameters=rope,
    )  # fmt: skip


def _mistral(numbers: Mapping[str, Any]) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**numbers, head_dim=16)


def _qwen2(numbers: Mapping[str, Any]) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**numbers, use_sliding_window=True, max_window_layers=2)


def _cohere2(numbers: Mapping[str, Any]) -> Any:
    from transformers import Cohere2Config

    return Cohere2Config(**numbers, head_dim=16, layer_types=[*_HALF[:1] * 3, _HALF[1]])


def _phi3(numbers: Mapping[str, Any]) -> Any:
    from transformers import Phi3Config

    return Phi3Config(**numbers)


KINDS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "gemma3": _gemma3, "gemma3-vision": _gemma3_that_sees, "gemma4": _gemma4, "mistral": _mistral, "qwen2": _qwen2,
    "cohere2": _cohere2, "phi3": _phi3, "gemma2": _gemma2, "gpt-oss": _gpt_oss,
}  # fmt: skip


def windowed(kind: str, window: int) -> Path:
    """Four layers in float32 with random weights, which decide clearly, and windows of so many tokens; the demo
    model's tokenizer, and no end-of-text token that it would hit by chance."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        numbers = {
            "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "sliding_window": window, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": None,
            "tie_word_embeddings": True,
        }  # fmt: skip
        model = checkpoints.new_model(AutoModelForCausalLM, KINDS[kind](numbers)).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.08)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        for file in checkpoints.demo_model().glob("*token*"):
            shutil.copy(file, folder)

    return checkpoints.kept(f"windowed-{kind}-{window}-1", build)
