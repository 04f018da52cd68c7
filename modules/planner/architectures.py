"""What names, shapes and config.json alone do not tell of an architecture, as transformers 5.23 builds it.

A test builds every language model that transformers knows and compares. What is not listed follows the rules of
``layout``: a 2-D ``weight`` is a Linear layer unless its module is named like an embedding or a router.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Modules whose class says ``_keep_in_fp32_modules``: float32 where the rest is float16, and never quantized.
KEPT_FP32: Mapping[str, tuple[str, ...]] = {
    "afmoe": ("expert_bias", "input_layernorm", "k_norm", "norm", "post_attention_layernorm", "post_mlp_layernorm",
              "pre_mlp_layernorm", "q_norm"),
    "axk2": ("indexer.weights_proj",),
    "deepseek_v32": ("indexer.weights_proj",),
    "deepseek_v4": ("self_attn.compressor.gate_proj", "self_attn.compressor.indexer.gate_proj",
                    "self_attn.compressor.indexer.kv_proj", "self_attn.compressor.indexer.scorer.weights_proj",
                    "self_attn.compressor.kv_proj"),
    "glm_moe_dsa": ("indexer.weights_proj",),
    "gpt_oss": ("input_layernorm", "norm", "post_attention_layernorm"),
    "longcat_flash": ("classifier.weight",),
    "mt5": ("wo",),
    "rwkv": ("time_decay", "time_first"),
    "t5": ("wo",),
    "umt5": ("wo",),
}  # fmt: skip

# … ``_keep_in_fp32_modules_strict``: float32 whatever 16-bit type the rest has.
_CORRECTION = ("e_score_correction_bias",)
STRICT_FP32: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note", "dots3_note_text", "exaone_moe",
         "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "kolibri1", "mimo_v2_flash", "nemotron_h",
         "solar_open"),
        _CORRECTION,
    ),
    "bailing_hybrid": (*_CORRECTION, "A_log", "conv1d", "dt_bias"),
    "beam": (*_CORRECTION, "mlp.gate.weight"),
    "deepseek_v4": (*_CORRECTION, "attn_hc", "ffn_hc", "hc_head", "input_layernorm", "kv_norm", "norm",
                    "position_bias", "post_attention_layernorm", "q_a_norm", "sinks"),
    "ernie4_5_moe": ("gate.weight", "moe_statics"),
    "flint": ("gate.weight", "sinks"),
    "hy_v4": (*_CORRECTION, "base", "fn", "hc_base", "hc_fn", "hc_scale", "k_norm", "lm_head", "scale", "sinks",
              "weights_proj"),
    "inkling2_text": (*_CORRECTION, "attention_input", "final_input", "k_sconv.conv1d", "mlp.gate.weight",
                      "mlp_input", "post_attention_convolution", "post_mlp_convolution", "v_sconv.conv1d"),
    "inkling_text": (*_CORRECTION, "attn_sconv", "gate.global_scale", "k_sconv", "mlp_sconv", "v_sconv"),
}  # fmt: skip

# Where the modules stand whose weights are K×N, not N×K (transformers' Conv1D).
CONV1D = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})

# 2-D weights named like Linear layers that are none, for bitsandbytes at least.
NOT_LINEAR: Mapping[str, re.Pattern[str]] = {
    "falcon": re.compile(r"\.(dense|dense_4h_to_h|dense_h_to_4h|query_key_value)$"),  # a subclass
    "deepseek_v4": re.compile(r"\.o_a_proj$"),  # a subclass
}
# … and the other way round: named like a router, and yet a Linear layer.
LINEAR_ROUTERS = frozenset({"afmoe"})

# base_model_prefix, for files that hold the base model alone; "model" where nothing stands here.
PREFIXES: Mapping[str, str] = {
    **dict.fromkeys(
        ("bloom", "codegen", "ctrl", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt",
         "openai-gpt", "xlm", "xlnet"),
        "transformer",
    ),
    "gpt_neox": "gpt_neox",
    "gpt_neox_japanese": "gpt_neox_japanese",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), "backbone"),
    **dict.fromkeys(("longt5", "mt5", "switch_transformers", "t5", "umt5"), ""),
}  # fmt: skip

# Architectures whose attention always keeps all scores in memory, each with whether it answers many at once, and so
# reads prompts in parts.
EAGER: Mapping[str, bool] = {
    **dict.fromkeys(("flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "vaultgemma"),
                    True),
    **dict.fromkeys(("bigbird_pegasus", "bloom", "codegen", "cpmant", "git", "gpt_neo", "gpt_neox_japanese", "gptj",
                     "inkling2_text", "megatron-bert", "mpt", "mvp", "openai-gpt", "prophetnet", "rembert", "roformer",
                     "trocr", "xglm", "xlm", "xlnet"), False),
}  # fmt: skip

# The output embedding's module where it is not lm_head.
HEADS: Mapping[str, str] = {
    **dict.fromkeys(("bert", "big_bird", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer"),
                    "cls.predictions.decoder"),
    **dict.fromkeys(("bert-generation", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
                     "xlm-roberta-xl", "xmod"), "lm_head.decoder"),
    "biogpt": "output_projection", "electra": "generator_lm_head", "gpt_neox_japanese": "embed_out",
    "modernbert-decoder": "decoder", "rwkv": "head", "trocr": "output_projection", "whisper": "proj_out",
    "xlm": "pred_layer.proj", "xlnet": "lm_loss",
}  # fmt: skip

# Gemma multiplies its embeddings by a number that lies beside them as a buffer of the model's dtype.
SCALED_EMBEDDINGS = ("gemma", "t5gemma", "vaultgemma")

# Tensors that files hold and the language model does not: caches of masks and frequencies, draft layers (MTP).
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.(attn|attention|crossattention|self_attn)\.(masked_bias|bias)$|(^|\.)mtp(_layers)?\.|"
    r"\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$|(^|\.)(en|de)coder\.version$"
)

# Models that rotate, and compute the frequencies without keeping them as buffers of one rotary module.
NO_ROTARY_BUFFERS = frozenset({
    "codegen", "gptj", "jamba", "kimi_linear", "moshi", "nemotron_h", "recurrent_gemma", "roformer", "zamba",
})  # fmt: skip
# … and those whose configuration says by position_embedding_type whether they rotate.
POSITIONS_BY_CHOICE = frozenset({"granitemoehybrid"})

# Tensors in files that are buffers of their modules, not parameters.
BUFFERS = frozenset({
    "balancing_biases", "diagonal_decay", "e_score_correction_bias", "expert_bias", "final_logits_bias", "key_decay",
    "layer_scalar", "num_batches_tracked", "query_decay", "running_mean", "running_var", "slope_rate", "tid2eid",
})  # fmt: skip

# Architectures whose bytes are close, not exact: buffers computed from odd numbers, layers tied to each other.
APPROXIMATE = frozenset({
    "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blt", "camembert", "ctrl", "data2vec-text",
    "deepseek_v4", "electra", "encoder-decoder", "ernie", "falcon_h1", "falcon_mamba", "gemma3n_text", "git",
    "glmasr", "granite_speech", "granite_speech_plus", "granite_swa", "granitemoe_swa", "hrm_text", "megatron-bert",
    "moshi", "musicflamingo", "nemo_speechlm", "openai-gpt", "phi4_multimodal", "prophetnet", "qwen3_asr",
    "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "seamless_m4t", "seamless_m4t_v2",
    "t5gemma", "t5gemma2", "voxtral", "voxtral_realtime", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "zamba",
    "zamba2",
})  # fmt: skip
