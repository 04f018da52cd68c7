"""Predicted bytes against real models: the sum over parameters, buffers and scales of what transformers loaded."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from transformers import BitsAndBytesConfig

from modules import packages
from modules.devices import Gpu, Machine, cpu_bf16
from modules.library import Library
from modules.options import LoadOptions
from modules.planner import Checkpoint, Plan, plan, read_checkpoint
from modules.planner.checkpoint import from_facts
from modules.planner.formats import Precision
from modules.planner.layout import layout_of
from modules.planner.memory import DEFAULT, kv_cache, working_bytes
from modules.protocol import READ_AT_ONCE_EAGER
from modules.worker import report
from tests import checkpoints, planner_checkpoints

GIB = 2**30
CPU = Machine((), 64 * GIB, 64 * GIB, 500 * GIB, cpu_bf16())
ONE_GPU = Machine((Gpu(0, "simulated", "0", 24 * GIB, 24 * GIB),), 64 * GIB, 64 * GIB, 500 * GIB)
# On a GPU these checkpoints, bfloat16, stay so; a checkpoint in float32 becomes float16 there: see `stored`.
FORMATS: Mapping[str, tuple[LoadOptions, Machine, str]] = {
    "float32": (LoadOptions(), CPU, "bfloat16"),
    "bfloat16": (LoadOptions(bf16=True), CPU, "bfloat16"),
    "float16": (LoadOptions(), ONE_GPU, "float32"),
    "int8": (LoadOptions(load_in_8bit=True), CPU, "bfloat16"),
    "int8 with float16": (LoadOptions(load_in_8bit=True), ONE_GPU, "float32"),
    "nf4": (LoadOptions(load_in_4bit=True), CPU, "bfloat16"),
    "nf4, double": (LoadOptions(load_in_4bit=True, use_double_quant=True), CPU, "bfloat16"),
    "fp4 with float16": (LoadOptions(load_in_4bit=True, quant_type="fp4"), ONE_GPU, "float32"),
}
needs_gptqmodel = pytest.mark.skipif(bool(packages.missing("gptq")), reason="the optional package gptqmodel is missing")


def read(folder: Path, stored: str = "") -> Checkpoint:
    made = read_checkpoint(folder)
    return Checkpoint(**{**vars(made), "stored_dtype": stored or made.stored_dtype})


def loaded(folder: Path, planned: Plan, options: LoadOptions, **more: Any) -> Any:
    """The model as transformers loads it in the plan's precision."""
    if options.load_in_8bit:
        more["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif options.load_in_4bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quant_type,
            bnb_4bit_use_double_quant=options.use_double_quant,
        )
    more.setdefault("device_map", {"": "cpu"})
    dtype = getattr(torch, planned.precision.dtype)
    return planner_checkpoints.auto_class(folder).from_pretrained(folder, dtype=dtype, **more).eval()


def held_bytes(model: Any) -> int:
    """Parameters, buffers and what bitsandbytes keeps beside its weights, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if isinstance(getattr(parameter, "SCB", None), torch.Tensor):
            tensors.append(parameter.SCB)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
            state = state.state2
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors if t.nbytes}.values())


def placed_bytes(model: Any) -> dict[str, int]:
    """Bytes by device of a split bfloat16 model. What is on disk is a placeholder, whose dtype means nothing."""
    sizes = {"cpu": 0, "disk": 0}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        sizes["disk" if tensor.is_meta else "cpu"] += tensor.numel() * (2 if tensor.is_meta else tensor.element_size())
    return sizes


@pytest.mark.parametrize("name", planner_checkpoints.NAMES)
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_are_exact_to_the_byte(name: str, kind: str) -> None:
    folder = planner_checkpoints.checkpoint(name)
    options, machine, stored = FORMATS[kind]
    planned = plan(read(folder, stored), options, machine, ctx_tokens=128)
    model = loaded(folder, planned, options)
    assert planned.exact
    assert planned.weights_bytes == held_bytes(model) == sum(report.device_bytes(model).values())
    del model
    gc.collect()


@pytest.mark.parametrize(
    "folder", [planner_checkpoints.base_model_only, planner_checkpoints.untied_t5, checkpoints.sharded]
)
def test_older_names_and_files_count_like_new_ones(folder: Any) -> None:
    planned = plan(read(folder()), LoadOptions(bf16=True), CPU, ctx_tokens=128)
    assert planned.weights_bytes == held_bytes(loaded(folder(), planned, LoadOptions()))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_saved_takes_what_it_takes_when_it_loads(bits: int) -> None:
    folder = checkpoints.bitsandbytes(bits)
    planned = plan(read(folder), LoadOptions(), CPU, ctx_tokens=128)
    assert planned.weights_bytes == held_bytes(loaded(folder, planned, LoadOptions()))


@needs_gptqmodel
@pytest.mark.parametrize("folder", [checkpoints.gptq, checkpoints.awq])
def test_gptq_and_awq_take_what_they_take_on_disk(folder: Any) -> None:
    planned = plan(read(folder()), LoadOptions(), CPU, ctx_tokens=128)
    assert planned.weights_bytes == held_bytes(loaded(folder(), planned, LoadOptions()))


def test_the_demo_model_from_gguf_takes_what_the_same_weights_take_from_safetensors(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo.gguf").symlink_to(checkpoints.gguf_file())
    files = Library([tmp_path]).facts("demo.gguf"), Library([demo_model.parent]).facts(demo_model.name)
    packed, plain = (plan(facts, LoadOptions(bf16=True), CPU, ctx_tokens=2048) for facts in files)
    assert packed.weights_bytes == plain.weights_bytes == 269_030_272
    assert packed.devices[0].kv_cache_bytes == plain.devices[0].kv_cache_bytes == 2048 * 2 * 30 * 3 * 64 * 2
    for eager in ("auto", "eager"):
        options = LoadOptions(bf16=True, attn_implementation=eager)
        working = [plan(facts, options, CPU, ctx_tokens=2048).devices[0].working_bytes for facts in files]
        assert working[0] == working[1]


def mixture_in_gguf(folder: Path, architecture: str, text: Mapping[str, Any]) -> Checkpoint:
    """A file with the header of a mixture of experts and its largest tensors."""
    writer = gguf.GGUFWriter(str(folder / "mixture.gguf"), architecture)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_expert_count(4)
    writer.add_expert_used_count(text["num_experts_per_tok"])
    vocabulary, hidden = text["vocab_size"], text["hidden_size"]
    shapes = {"token_embd": (vocabulary, hidden), "output": (vocabulary, hidden),
              "blk.0.ffn_up_exps": (4, text["moe_intermediate_size"], hidden)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return from_facts(Library([folder]).facts("mixture.gguf"))


def computing(checkpoint: Checkpoint, tokens: int) -> int:
    return working_bytes(layout_of(checkpoint), Precision("float32"), DEFAULT, tokens, LoadOptions())


def test_a_mixture_in_gguf_computes_with_as_many_experts_as_the_same_in_safetensors(tmp_path: Path) -> None:
    plain = read(planner_checkpoints.checkpoint("qwen3-moe"))
    packed = mixture_in_gguf(tmp_path, "qwen3moe", plain.config)
    assert computing(plain, 128) == computing(packed, 128) > 0


def test_the_scores_of_what_has_eager_attention_alone_are_counted_in_gguf_too(tmp_path: Path) -> None:
    config = read(planner_checkpoints.checkpoint("qwen3-moe")).config
    other, eager = (computing(mixture_in_gguf(tmp_path, name, config), 4096) for name in ("qwen3moe", "gpt-oss"))
    assert eager - other == 4 * 3 * config["num_attention_heads"] * READ_AT_ONCE_EAGER * 4096


def test_a_mixture_in_4_bit_keeps_its_experts_and_says_so() -> None:
    checkpoint = read(planner_checkpoints.checkpoint("qwen3-moe"))
    planned = plan(checkpoint, LoadOptions(load_in_4bit=True), CPU, ctx_tokens=128)
    experts = 3 * 4 * 3 * 48 * 64 * 2  # layers × experts × matrices × their numbers, in bfloat16
    assert planned.devices[0].classes.kept > experts > planned.devices[0].classes.quantized
    assert any("experts" in note for note in planned.notes)


@pytest.mark.parametrize("name", planner_checkpoints.NAMES)
def test_the_cache_is_what_the_model_keeps_after_a_prompt(name: str) -> None:
    folder = planner_checkpoints.checkpoint(name)
    checkpoint = read(folder)
    planned = plan(checkpoint, LoadOptions(bf16=True), CPU, ctx_tokens=96)
    model = loaded(folder, planned, LoadOptions())
    tokens = torch.randint(3, 280, (1, 96))
    inputs = {"decoder_input_ids": tokens} if checkpoint.task == "seq2seq" else {}
    with torch.no_grad():
        cache = model(input_ids=tokens, **inputs, use_cache=True).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if checkpoint.task == "seq2seq" else [cache]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)
    layout = layout_of(checkpoint)
    expected = kv_cache(layout, checkpoint.task, Precision("bfloat16"))
    windows = sum(token for token, window in zip(expected.token_bytes, expected.windows, strict=True) if window)
    assert sum(device.kv_cache_bytes for device in planned.devices) == kept + windows  # the window's newest token


@pytest.mark.parametrize("name", planner_checkpoints.NAMES)
def test_a_split_over_ram_and_disk_lies_as_planned_and_computes_the_same(name: str, tmp_path: Path) -> None:
    folder = planner_checkpoints.checkpoint(name)
    checkpoint = read(folder)
    whole = plan(checkpoint, LoadOptions(bf16=True), CPU, ctx_tokens=16)
    ram = next(device for device in whole.devices if device.key == "cpu")
    options = LoadOptions(bf16=True, disk=True, cpu_memory=(ram.total_bytes - ram.fixed_bytes) / GIB)
    planned = plan(checkpoint, options, CPU, ctx_tokens=16)
    while set(planned.device_map.values()) != {"cpu", "disk"}:  # a visiting block needs room too
        options = LoadOptions(bf16=True, disk=True, cpu_memory=options.cpu_memory * 0.97)
        planned = plan(checkpoint, options, CPU, ctx_tokens=16)
        assert planned.fits
    model = loaded(folder, planned, LoadOptions(), device_map=planned.device_map, offload_folder=str(tmp_path))
    assert model.hf_device_map == planned.device_map
    by_key = {device.key: device.weights_bytes for device in planned.devices}
    assert placed_bytes(model) == by_key
    tokens = torch.arange(3, 19)[None]
    inputs = {"decoder_input_ids": tokens} if checkpoint.task == "seq2seq" else {}
    with torch.no_grad():
        split = model(input_ids=tokens, **inputs).logits
        same = loaded(folder, whole, LoadOptions())(input_ids=tokens, **inputs).logits
    assert torch.equal(split, same)


def test_every_language_model_of_transformers_follows_the_rules() -> None:
    """A look at all architectures, built without memory: which weights are linear, and the bytes of all."""
    from tests.planner_sweep import differences

    found = differences()
    assert found.compared > 180
    assert not found.unexpected, json.dumps(found.unexpected, indent=1)
