"""The loader options: every row of the table that says how a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modules.errors import OptionConflict, OptionError
from modules.options.circumstances import Circumstances
from modules.options.spec import option, specs

DEFAULT_CONTEXT_TOKENS = 8192

GROUPS: Mapping[str, str] = {
    "model": "Model",
    "precision": "Precision",
    "context": "Context",
    "memory": "Memory",
    "4-bit": "4-bit details",
    "rope": "Longer context",
    "adapters": "LoRAs",
    "advanced": "Tokenizer, attention, custom code",
}

# One control with a few states stands for three options. Each state's values; what is absent is off.
PRECISIONS: Mapping[str, Mapping[str, bool]] = {
    "as stored": {},
    "bf16": {"bf16": True},
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True},
}


# The quant_methods that transformers (5.23) refuses with layers in RAM beside a GPU, and with layers on disk.
ON_GPUS_ALONE = frozenset({"bitsandbytes", "bitnet", "eetq", "higgs", "hqq", "quanto"})
NEVER_ON_DISK = ON_GPUS_ALONE | {"gguf", "torchao"}


def _quantizes(c: Circumstances) -> bool:
    return c.on("load_in_4bit") or c.on("load_in_8bit")


def _plain_weights(c: Circumstances) -> str:
    return f"The checkpoint is already quantized ({c.quantization})." if c.quantization else ""


def _in_4bit(c: Circumstances) -> str:
    return _plain_weights(c) or ("" if c.on("load_in_4bit") else "Only with load-in-4bit.")


def _not_quantized(c: Circumstances) -> str:
    return _plain_weights(c) or ("The weights will be quantized." if _quantizes(c) else "")


def _gpu(c: Circumstances) -> str:
    if not c.gpu_names:
        return "This machine has no GPU that Loadstone can use."
    return "Only the CPU is used (cpu)." if c.on("cpu") else ""


def _rope(c: Circumstances) -> str:
    return "" if c.has_rope else "The model has no rotary position embedding (RoPE)."


def _linear_rope(c: Circumstances) -> str:
    if c.rope_scaling not in ("", "default", "linear"):
        return f"The model has a scaling of its own ({c.rope_scaling}), which this would destroy."
    return _rope(c)


def _custom_code(c: Circumstances) -> str:
    return "" if c.has_custom_code or not c.model_chosen else "The model brings no Python code."


def _two_tokenizers(c: Circumstances) -> str:
    return "" if c.has_slow_tokenizer or not c.model_chosen else "The model has only the fast form of its tokenizer."


def _gptq(c: Circumstances) -> str:
    return "" if c.quantization == "gptq" or not c.model_chosen else "The model is not a GPTQ checkpoint."


def _leaves_ram(c: Circumstances) -> str:
    if _quantizes(c) and _gpu(c):
        return "Layers that are quantized without a GPU stay in RAM."
    return f"Layers of a {c.quantization} checkpoint cannot lie on disk." if c.quantization in NEVER_ON_DISK else ""


def _takes_ram(c: Circumstances) -> str:
    whole = not _gpu(c) and c.quantization in ON_GPUS_ALONE
    return f"Layers of a {c.quantization} checkpoint stay on the GPUs, where there are some." if whole else ""


def _offloads(c: Circumstances) -> str:
    return "" if c.on("disk") else "Only with disk."


@dataclass(frozen=True)
class LoadOptions:
    """How to load one model. Values are validated one by one by their Spec, together by :func:`check`."""

    model: str = option(
        "text", "", "Model", "The model to load: a name under models/ or another model folder, or a path.",
        group="model", in_form=False,
    )  # fmt: skip
    loader: str = option(
        "choice", "auto", "Loader", "Which loader takes the model. auto reads it from the files.",
        group="advanced", choices=("auto", "Transformers"),
    )  # fmt: skip
    load_in_8bit: bool = option(
        "flag", False, "8-bit", "Quantize the weights to 8 bits while loading: about half the memory of 16-bit.",
        group="precision", basic=True, applies=_plain_weights, strict=True,
        effect="BitsAndBytesConfig(load_in_8bit=True)",
    )  # fmt: skip
    load_in_4bit: bool = option(
        "flag", False, "4-bit",
        "Quantize the weights to 4 bits while loading: about a third of the memory of 16-bit, slightly worse answers.",
        group="precision", basic=True, applies=_plain_weights, strict=True,
        effect="BitsAndBytesConfig(load_in_4bit=True)",
    )  # fmt: skip
    bf16: bool = option(
        "flag", False, "bfloat16", "Hold the weights as bfloat16, whatever the checkpoint stores.",
        group="precision", basic=True, applies=_not_quantized, effect="dtype=torch.bfloat16",
    )  # fmt: skip
    cpu: bool = option(
        "flag", False, "CPU only", "Touch no GPU. Slow; float32 unless bf16 is on.",
        group="memory", default_help="on where there is no GPU", effect='device_map={"": "cpu"}',
    )  # fmt: skip
    gpu_memory: tuple[float, ...] = option(
        "numbers", (), "GPU memory", "How much of each GPU the model may take, in the GPUs' order.",
        group="memory", unit="GiB", low=0, basic=True, applies=_gpu, strict=True,
        default_help="what is free", effect="max_memory",
    )  # fmt: skip
    auto_devices: bool = option(
        "flag", False, "Automatic devices",
        "Let Loadstone choose how much of each GPU and of RAM to take, leaving room for the context: with 4-bit and "
        "8-bit too, layers that the GPUs have no room for lie in RAM, in 16 bit.",
        group="memory", basic=True, applies=_gpu, effect="max_memory",
    )  # fmt: skip
    cpu_memory: float = option(
        "number", 0.0, "RAM", "How much RAM the model may take; what does not fit needs disk.",
        group="memory", unit="GiB", low=0, basic=True, applies=_takes_ram,
        default_help="what is free", effect='max_memory["cpu"]',
    )  # fmt: skip
    disk: bool = option(
        "flag", False, "Offload to disk", "Keep the layers that fit nowhere else on disk. Very slow, but it runs.",
        group="memory", basic=True, applies=_leaves_ram, effect="offload_folder",
    )  # fmt: skip
    disk_cache_dir: str = option(
        "text", "", "Offload folder", "The folder for layers that are offloaded to disk.",
        group="memory", default_help="models/.cache/offload", applies=_offloads, in_form=False,
        local_only=True, effect="offload_folder",
    )  # fmt: skip
    quant_type: str = option(
        "choice", "nf4", "4-bit type", "nf4 suits trained weights; fp4 is the older type.",
        group="4-bit", flag="--quant_type", choices=("nf4", "fp4"), applies=_in_4bit,
        effect="bnb_4bit_quant_type",
    )  # fmt: skip
    compute_dtype: str = option(
        "choice", "auto", "4-bit computing type",
        "The type in which 4-bit layers compute. auto: bfloat16 where the device has it, else "
        "float16 on a GPU and float32 on a processor.",
        group="4-bit", flag="--compute_dtype", choices=("auto", "bfloat16", "float16", "float32"),
        applies=_in_4bit, effect="bnb_4bit_compute_dtype",
    )  # fmt: skip
    use_double_quant: bool = option(
        "flag", False, "Double quantization", "Quantize the 4-bit scales too: about 0.4 bits a weight less.",
        group="4-bit", flag="--use_double_quant", applies=_in_4bit, effect="bnb_4bit_use_double_quant",
    )  # fmt: skip
    ctx_size: int = option(
        "integer", 0, "Context", "How many tokens of conversation the model keeps in view.",
        group="context", unit="tokens", low=0, step=256, basic=True,
        default_help=f"the model's limit, at most {DEFAULT_CONTEXT_TOKENS:,}",
        effect="prompts are cut to it; memory for it is planned",
    )  # fmt: skip
    max_batch: int = option(
        "integer", 16, "Answers at once", "How many answers may be in the making at once; further ones wait in line.",
        group="context", low=1, high=256, step=1, effect="how many answers decode together",
    )  # fmt: skip
    batch_tokens: int = option(
        "integer", 0, "Tokens at once",
        "How many tokens the answers in the making may hold together, their prompts included.",
        group="context", unit="tokens", low=0, step=256, default_help="as many as the context has",
        effect="answers that would hold more wait in line; memory for it is planned",
    )  # fmt: skip
    alpha_value: float = option(
        "number", 1.0, "alpha_value",
        "Stretch the context by NTK scaling: 1.75 for 1.5 times the model's limit, 2.5 for twice. 1 is off.",
        group="rope", flag="--alpha_value", low=1, step=0.05, applies=_rope, strict=True,
        effect="RoPE theta × alpha^(d/(d−2))",
    )  # fmt: skip
    rope_freq_base: float = option(
        "number", 0.0, "rope_freq_base", "Use this RoPE base (theta) instead of the model's. 0 is off.",
        group="rope", flag="--rope_freq_base", low=0, step=1000, applies=_rope, strict=True,
        effect="RoPE theta",
    )  # fmt: skip
    compress_pos_emb: float = option(
        "number", 1.0, "compress_pos_emb",
        "Linear position compression, for models tuned with it: set the factor the model card names. 1 is off.",
        group="rope", flag="--compress_pos_emb", low=1, step=0.5, applies=_linear_rope, strict=True,
        effect="linear RoPE scaling by the factor",
    )  # fmt: skip
    lora: tuple[str, ...] = option(
        "adapters", (), "LoRAs", "LoRAs to apply after loading: names under loras/, each with a weight if it is not 1.",
        group="adapters", effect="the adapters that are active",
    )  # fmt: skip
    trust_remote_code: bool = option(
        "flag", False, "Allow custom code",
        "Run the Python files that the model's folder brings. Only for sources you trust.",
        group="advanced", applies=_custom_code, effect="trust_remote_code=True",
    )  # fmt: skip
    use_fast: bool = option(
        "flag", True, "Fast tokenizer", "Use the tokenizers library; off takes the SentencePiece or Python tokenizer.",
        group="advanced", flag="--use_fast", applies=_two_tokenizers, effect="the tokenizer's class",
    )  # fmt: skip
    disable_exllama: bool = option(
        "flag", False, "Disable ExLlama",
        "Take a GPTQ kernel that is not ExLlama's and that can be trained.",
        group="advanced", flag="--disable_exllama", applies=_gptq, effect='GPTQConfig(backend="auto_trainable")',
    )  # fmt: skip
    attn_implementation: str = option(
        "choice", "auto", "Attention", "Which attention code computes. auto takes the model's own choice.",
        group="advanced", choices=("auto", "sdpa", "eager", "flash_attention_2"), effect="attn_implementation",
    )  # fmt: skip


LOAD_OPTIONS = specs(LoadOptions)

EXCLUSIVE: tuple[tuple[str, str, str], ...] = (
    ("load_in_4bit", "load_in_8bit", "The weights can be quantized only once."),
    ("alpha_value", "compress_pos_emb", "Both stretch the context; together they would do it twice."),
    ("alpha_value", "rope_freq_base", "alpha_value computes the RoPE base that rope_freq_base sets."),
    ("cpu", "gpu_memory", "With cpu no GPU is touched."),
)


def changed(options: LoadOptions) -> dict[str, Any]:
    """The values that differ from the table's defaults, by name."""
    return {name: value for name, spec in LOAD_OPTIONS.items() if (value := getattr(options, name)) != spec.default}


def check(options: LoadOptions, circumstances: Circumstances) -> tuple[str, ...]:
    """Check the options together, against the model and the machine.

    Returns notes on options that are set but have no effect here. Raises OptionConflict where two exclude
    each other, or where an option was asked for that this model or machine cannot follow.
    """
    given = changed(options)
    for one, other, why in EXCLUSIVE:
        if one in given and other in given:
            one_flag, other_flag = LOAD_OPTIONS[one].flag, LOAD_OPTIONS[other].flag
            raise OptionConflict(
                f"{one_flag} and {other_flag} exclude each other. {why}",
                f"Turn {one_flag} or {other_flag} off.",
                fix={other: LOAD_OPTIONS[other].default},
            )
    notes = []
    for name in given:
        spec = LOAD_OPTIONS[name]
        if reason := spec.applies(circumstances):
            if spec.strict:
                where = "on this machine" if spec.applies is _gpu else "for this model"
                raise OptionConflict(
                    f"{spec.flag} cannot be used here. {reason}",
                    f"Leave {spec.flag} out {where}.",
                    fix={name: spec.default},
                )
            notes.append(f"{spec.flag} has no effect here. {reason}")
    _check_gpu_memory(options, circumstances)
    return (*notes, *_context_notes(options, circumstances), *_tokenizer_notes(options, circumstances))


def _check_gpu_memory(options: LoadOptions, c: Circumstances) -> None:
    if len(options.gpu_memory) > c.gpu_count:
        raise OptionError(
            f"--gpu-memory names {len(options.gpu_memory)} GPUs; this machine has {c.gpu_count}: "
            f"{', '.join(c.gpu_names) or 'none'}.",
            "Give one number a GPU, in their order.",
        )
    if options.gpu_memory and not any(options.gpu_memory):
        raise OptionError("--gpu-memory leaves every GPU out.", "Use --cpu to load without a GPU.")


def _context_notes(options: LoadOptions, c: Circumstances) -> tuple[str, ...]:
    limit = stretched_context(options, c.context_tokens)
    if not limit or options.ctx_size <= limit or options.rope_freq_base:  # how far that one reaches, nobody knows
        return ()
    beyond = f"A context of {options.ctx_size:,} tokens is beyond the model's {limit:,}: answers"
    if not c.has_rope:
        return (f"{beyond} may get worse there.",)
    return (f"{beyond} fall apart there.{' alpha_value stretches the limit.' if may_stretch(options) else ''}",)


def may_stretch(options: LoadOptions) -> bool:
    """Whether alpha_value, or more of it, goes with the other options."""
    rivals = {name for one, other, _ in EXCLUSIVE if "alpha_value" in (one, other) for name in (one, other)}
    return not (rivals - {"alpha_value"}) & changed(options).keys()


def _tokenizer_notes(options: LoadOptions, c: Circumstances) -> tuple[str, ...]:
    if options.use_fast or c.has_fast_tokenizer or not c.has_slow_tokenizer:
        return ()
    return (
        "With use_fast off the model's SentencePiece file is used as it is. It is converted all the same, once, to see "
        "that both number their pieces alike.",
    )


def stretched_context(options: LoadOptions, context_tokens: int) -> int:
    """The model's limit in tokens after the RoPE options; 0 where it is not known.

    alpha_value's growth is the documented rule 1.75 → 1.5 ×, 2.5 → 2 ×, by straight lines between and beyond.
    """
    if options.compress_pos_emb > 1:
        return int(context_tokens * options.compress_pos_emb)
    if options.alpha_value <= 1:
        return context_tokens
    points = ((1.0, 1.0), (1.75, 1.5), (2.5, 2.0))
    (x0, y0), (x1, y1) = points[:2] if options.alpha_value <= points[1][0] else points[1:]
    stretched = context_tokens * (y0 + (options.alpha_value - x0) * (y1 - y0) / (x1 - x0))
    return int(round(stretched, 6))  # what is a whole number but for floating point is that one


def alpha_for(context_ratio: float) -> float:
    """The alpha_value for ``context_ratio`` times the model's limit: the rule above, the other way round.

    Rounded up to two places: with less the context would be beyond the limit still.
    """
    hundredths = (1 + (context_ratio - 1) * 1.5) * 100
    return math.ceil(round(hundredths, 6)) / 100 if context_ratio > 1 else 1.0


def context_tokens(options: LoadOptions, model_limit: int) -> int:
    """The context in tokens that a load with these options gets."""
    if options.ctx_size:
        return options.ctx_size
    usual = min(model_limit or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)
    return stretched_context(options, usual)


def allowed_gpus(options: LoadOptions, count: int) -> list[int]:
    """The GPUs, of so many, that the options let the model touch, by position: gpu_memory leaves out those that it
    gives 0, or does not come to."""
    if options.cpu:
        return []
    shares = options.gpu_memory or (1.0,) * count
    return [position for position, share in zip(range(count), shares, strict=False) if share > 0]


def kept_tokens(options: LoadOptions, ctx_tokens: int, window: int = 0) -> int:
    """For how many tokens a layer keeps keys and values with this context: for one answer, or many together.

    ``window``: how many tokens back the layer sees; 0: all.
    """
    if not window:
        return max(ctx_tokens, options.batch_tokens)
    return max(min(ctx_tokens, window), min(options.batch_tokens, options.max_batch * window))
