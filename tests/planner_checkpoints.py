"""Tiny real models of many architectures, made and saved by transformers, and headers of huge ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import copied, kept, llama, llama_config, new_model

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_T5: Mapping[str, Any] = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 300,
    "decoder_start_token_id": 0,
}  # fmt: skip


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: llama_config(num_hidden_layers=3),
        "llama-tied": lambda: llama_config(tie_word_embeddings=True, attention_bias=True),
        "mistral": lambda: t.MistralConfig(**_SMALL, sliding_window=32),
        "qwen2": lambda: t.Qwen2Config(**_SMALL),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(**_SMALL, num_experts=4, num_experts_per_tok=2, head_dim=16,
                                              moe_intermediate_size=48),
        "mixtral": lambda: t.MixtralConfig(**_SMALL, num_local_experts=4),
        "gemma2": lambda: t.Gemma2Config(**_SMALL, head_dim=16, sliding_window=32),
        "gemma3": lambda: t.Gemma3TextConfig(**(_SMALL | {"num_hidden_layers": 7}), head_dim=16, sliding_window=32),
        "gemma3-images": lambda: t.Gemma3Config(
            text_config={**_SMALL, "head_dim": 16, "sliding_window": 32},
            vision_config={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "image_size": 28,
                           "num_attention_heads": 4, "patch_size": 14},
            mm_tokens_per_image=4, boi_token_index=290, eoi_token_index=291, image_token_index=292,
        ),
        "gemma4": lambda: t.Gemma4TextConfig(
            **(_SMALL | {"num_hidden_layers": 4}), head_dim=16, global_head_dim=32, num_global_key_value_heads=1,
            num_kv_shared_layers=0, hidden_size_per_layer_input=0, sliding_window=32, attention_k_eq_v=True,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        "gpt2": lambda: t.GPT2Config(n_layer=3, n_embd=64, n_head=4, n_positions=256, vocab_size=300,
                                     bos_token_id=1, eos_token_id=2),
        "gpt-neox": lambda: t.GPTNeoXConfig(**{k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
        "phi3": lambda: t.Phi3Config(**_SMALL),
        "gpt-oss": lambda: t.GptOssConfig(**(_SMALL | {"num_hidden_layers": 4}), head_dim=16, sliding_window=32,
                                          num_local_experts=4, num_experts_per_tok=2),
        "deepseek-v3": lambda: t.DeepseekV3Config(
            **(_SMALL | {"num_key_value_heads": 4}), moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        ),
        "opt": lambda: t.OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
                                   vocab_size=300, max_position_embeddings=256, word_embed_proj_dim=64),
        "t5": lambda: t.T5Config(**_T5),
        "bart": lambda: t.BartConfig(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                                     decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
                                     vocab_size=300, max_position_embeddings=256),
    }  # fmt: skip


NAMES = (
    "llama", "llama-tied", "mistral", "qwen2", "qwen3-moe", "mixtral", "gemma2", "gemma3", "gemma3-images", "gemma4",
    "gpt2", "gpt-neox", "phi3", "gpt-oss", "deepseek-v3", "opt", "t5", "bart",
)  # fmt: skip


def auto_class(folder: Path) -> Any:
    """The class of transformers that loads the model in ``folder``, as the loader chooses it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = json.loads((folder / "config.json").read_text())
    return AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM


def checkpoint(name: str) -> Path:
    """The folder of a model of that architecture, with random weights in bfloat16; mixtures as hubs store them."""

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        config = _configs()[name]()
        cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        new_model(cls, config).save_pretrained(folder)

    return kept(f"plan-{name}-2", build)


def base_model_only() -> Path:
    """A GPT-2 as older files store it: the base model's names, and each layer's mask beside the weights."""

    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        source = checkpoint("gpt2")
        tensors = {
            name.removeprefix("transformer."): value
            for name, value in load_file(next(source.glob("*.safetensors"))).items()
        }
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((source / "config.json").read_text())

    return kept("plan-base-model-1", build)


def untied_t5() -> Path:
    """A T5 of the kind whose head is a matrix of its own, as older configurations say it."""

    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        source = checkpoint("t5")
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(300, 64, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    return kept("plan-untied-t5-1", build)


def fp8(name: str) -> Path:
    """The model with its layers' linear weights in FP8, a scale for each block of 16 × 16."""

    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        source = checkpoint(name)
        tensors = load_file(source / "model.safetensors")
        for key in [key for key, value in tensors.items() if key.endswith("proj.weight") and value.ndim == 2]:
            rows, columns = tensors[key].shape
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            tensors[key.replace(".weight", ".weight_scale_inv")] = torch.ones(rows // 16, columns // 16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        how = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
        _write_config(folder, source, how)

    return kept(f"plan-fp8-{name}-1", build)


def mxfp4() -> Path:
    """A GPT-OSS with its experts as hubs store them: blocks of 32 numbers of 4 bit, and a scale each."""

    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        source = checkpoint("gpt-oss")
        tensors = load_file(source / "model.safetensors")
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(key).shape
            blocks = (experts, outputs, inputs // 32)
            tensors[f"{key}_blocks"] = torch.zeros((*blocks, 16), dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.full(blocks, 127, dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_config(folder, source, {"quant_method": "mxfp4"})

    return kept("plan-mxfp4-1", build)


def _write_config(folder: Path, source: Path, quantization: Mapping[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(quantization)}))


def quantized_by(method: str, target: Path) -> Path:
    """A copy of a plain checkpoint whose config.json claims to be quantized by ``method``, as its kind says so."""
    config = json.loads((copied(llama(), target) / "config.json").read_text())
    stored = {"quant_method": method, "bits": 4}
    how = {"quantization": {"group_size": 64, "bits": 4}} if method == "mlx" else {"quantization_config": stored}
    (target / "config.json").write_text(json.dumps(config | how))
    return target


def write_headers(folder: Path, config: Mapping[str, Any], shards: list[dict[str, tuple[int, ...]]]) -> None:
    """A checkpoint of headers alone: bfloat16 tensors by name and shape; the files' weights are holes on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in shapes.items():
            size = 2
            for length in shape:
                size *= length
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            weight_map[tensor] = name
            end += size
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            os.truncate(file.fileno(), 8 + len(raw) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LLAMA_70B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 163840, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def llama_70b(folder: Path) -> Path:
    """Headers of a model shaped like Llama 70B: 723 tensors in 30 files, 141 GB of holes."""
    h, i, v = 8192, 28672, 128256
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for n in range(80):
        layer = f"model.layers.{n}."
        for name, shape in {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (1024, h), "self_attn.v_proj": (1024, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }.items():  # fmt: skip
            names[f"{layer}{name}.weight"] = shape
    names |= {"model.norm.weight": (h,), "lm_head.weight": (v, h)}
    write_headers(folder, LLAMA_70B, _dealt(names, 30))
    return folder


def deepseek_v3(folder: Path) -> Path:
    """Headers of a model shaped like DeepSeek-V3 in 16 bit: 45 thousand tensors in 163 files, 1.3 TB of holes."""
    h = 7168
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, h)}
    for n in range(61):
        layer = f"model.layers.{n}."
        attention: dict[str, tuple[int, ...]] = {
            "q_a_proj": (1536, h), "q_a_layernorm": (1536,), "q_b_proj": (24576, 1536),
            "kv_a_proj_with_mqa": (576, h), "kv_a_layernorm": (512,), "kv_b_proj": (32768, 512), "o_proj": (h, 16384),
        }  # fmt: skip
        for name, shape in attention.items():
            names[f"{layer}self_attn.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            names[f"{layer}{name}.weight"] = (h,)
        mlps = (
            {"mlp": 18432} if n < 3 else {f"mlp.experts.{e}": 2048 for e in range(256)} | {"mlp.shared_experts": 2048}
        )
        for name, width in mlps.items():
            for part, shape in {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}.items():
                names[f"{layer}{name}.{part}.weight"] = shape
        if n >= 3:
            names |= {f"{layer}mlp.gate.weight": (256, h), f"{layer}mlp.gate.e_score_correction_bias": (256,)}
    names |= {"model.norm.weight": (h,), "lm_head.weight": (129280, h)}
    write_headers(folder, DEEPSEEK_V3, _dealt(names, 163))
    return folder


def _dealt(names: Mapping[str, tuple[int, ...]], count: int) -> list[dict[str, tuple[int, ...]]]:
    items = list(names.items())
    per = -(-len(items) // count)
    return [dict(items[start : start + per]) for start in range(0, len(items), per)]
