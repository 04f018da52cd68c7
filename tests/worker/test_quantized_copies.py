"""Quantized copies on real models: a later load equals the first, and when there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modules import copies
from modules.errors import BrokenCheckpoint, OutOfMemory
from modules.protocol import Progress
from modules.worker import quantized_copies, report
from modules.worker.transformers_loader import LoadedModel
from tests import checkpoints
from tests.worker.quantized import (
    MADE,
    NF4,
    READ,
    asked,
    everything,
    kept,
    load,
    noted,
    quant_states,
    tensors,
)
from tests.worker.test_transformers_loader import greedy

RECIPES: Mapping[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 with double quantization": NF4 | {"use_double_quant": True},
    "fp4": NF4 | {"quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclasses.dataclass
class Seen:
    """What is compared of one load."""

    report: Any
    tensors: dict[str, torch.Tensor]
    states: dict[str, tuple[Any, ...]]
    tokens: list[int]
    stages: list[str]
    generation: dict[str, Any]


def seen(path: Path, work: Path, tokens: int = 24, **facts: Any) -> Seen:
    heard: list[Progress] = []
    loaded = load(path, work, heard, **facts)
    before = tensors(loaded)
    return Seen(
        loaded.report,
        before,
        quant_states(loaded),
        greedy(loaded, tokens),
        list(dict.fromkeys(progress.stage for progress in heard)),
        loaded.model.generation_config.to_dict(),
    )


def assert_equal(first: Seen, second: Seen) -> None:
    for field in ("architecture", "parameters", "footprint_bytes", "dtype", "layer_classes", "attn_implementation"):
        assert getattr(first.report, field) == getattr(second.report, field), field
    assert first.report.context_limit == second.report.context_limit
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    assert first.states == second.states
    assert first.tokens == second.tokens
    assert first.generation == second.generation


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_second_load_equals_the_first(demo_model: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    first, second = seen(demo_model, tmp_path, **recipe), seen(demo_model, tmp_path, **recipe)
    assert_equal(first, second)
    assert any(MADE in note for note in first.report.notes)
    assert any(READ in note for note in second.report.notes)
    assert first.stages[-3:] == ["quantizing the weights", "checking what was loaded", "keeping the quantized copy"]
    assert second.stages[-3:] == [
        "checking the quantized copy", "loading the quantized copy", "checking what was loaded",
    ]  # fmt: skip
    assert everything(tmp_path) == [copy.key for copy in kept(tmp_path)]
    assert second.report.kwargs["pretrained_model_name_or_path"] == str(kept(tmp_path)[0].path)


@pytest.mark.parametrize("recipe", [NF4, {"load_in_8bit": True}], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (checkpoints.sharded, {}),
        (checkpoints.pytorch, {"file_format": "pytorch"}),
        (checkpoints.gpt2, {}),
        (checkpoints.gemma3, {}),
    ],
    ids=["sharded", "pytorch", "gpt2", "gemma3"],
)
def test_other_formats_and_architectures_come_back_equal(
    make: Callable[[], Path], facts: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    first, second = (seen(make(), tmp_path, **facts, **recipe) for _ in range(2))
    assert_equal(first, second)
    assert any(READ in note for note in second.report.notes)


def test_an_encoder_decoder_comes_back_equal(tmp_path: Path) -> None:
    first, second = (load(checkpoints.t5(), tmp_path, task="seq2seq", **NF4) for _ in range(2))
    assert noted(second, READ)
    assert first.report.layer_classes == second.report.layer_classes
    assert report.dtypes(first.model) == report.dtypes(second.model)  # some stay float32
    ones, others = tensors(first), tensors(second)
    assert all(torch.equal(value, others[name]) for name, value in ones.items())


def test_fused_experts_come_back_equal(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "moe")
    (folder / "model.safetensors").unlink()
    config = Qwen3MoeConfig(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=checkpoints.VOCABULARY, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    checkpoints.new_model(AutoModelForCausalLM, config).save_pretrained(folder)
    first, second = (seen(folder, tmp_path, **NF4) for _ in range(2))
    assert_equal(first, second)
    assert any(READ in note for note in second.report.notes)
    assert any("stay unquantized" in note for note in second.report.notes)


def test_settings_that_do_not_change_the_weights_share_a_copy(demo_model: Path, tmp_path: Path) -> None:
    load(demo_model, tmp_path, alpha_value=2.5, attn_implementation="eager", ctx_tokens=512, **NF4)
    stretched: dict[str, Any] = {"compress_pos_emb": 2.0, "compute_dtype": "float32", "ctx_tokens": 4096}
    copied = load(demo_model, tmp_path, **stretched, **NF4)
    assert noted(copied, READ)
    assert len(kept(tmp_path)) == 1
    fresh = load(demo_model, tmp_path, quantized_cache=False, **stretched, **NF4)
    assert copied.report.context_limit == fresh.report.context_limit == 2 * 8192
    assert copied.model.config.rope_parameters == fresh.model.config.rope_parameters
    assert copied.report.attn_implementation == fresh.report.attn_implementation == "sdpa"
    layer = copied.model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float32
    assert greedy(copied) == greedy(fresh)


def test_what_changes_the_weights_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        assert noted(load(checkpoints.llama(), tmp_path, **recipe), MADE)
    assert sorted(copy.what for copy in kept(tmp_path)) == ["8-bit", "fp4", "nf4", "nf4, double quantization"]
    assert {copy.model for copy in kept(tmp_path)} == {checkpoints.llama().name}


def key(device: str = "cpu", dtype: torch.dtype | None = None, **options: Any) -> str:
    order, kwargs = asked(Path("w"), **options)
    return copies.key_of(quantized_copies.identity(order, kwargs | ({"dtype": dtype} if dtype else {}), device))


def test_the_dtype_of_the_rest_and_the_kind_of_device_count() -> None:
    assert len({key(), key(dtype=torch.float16), key("gpu"), key(load_in_4bit=False, load_in_8bit=True)}) == 4
    assert key() == key(compute_dtype="float16") == key(ctx_size=512) == key(rope_freq_base=50_000.0)


def test_generation_settings_are_those_of_the_source_even_where_they_cannot_be_saved(tmp_path: Path) -> None:
    """As Llama 2's are: a temperature, and no sampling."""
    source = checkpoints.copied(checkpoints.llama(), tmp_path / "source")
    settings = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(settings))
    first, second = seen(source, tmp_path, **NF4), seen(source, tmp_path, **NF4)
    assert any(READ in note for note in second.report.notes)
    assert_equal(first, second)
    assert second.generation["temperature"] == 0.9


# --- when none is written ---


def test_without_the_option_nothing_is_written(tmp_path: Path) -> None:
    load(checkpoints.llama(), tmp_path, quantized_cache=False, **NF4)
    assert everything(tmp_path) == []


def test_without_the_option_a_copy_is_not_read(tmp_path: Path) -> None:
    load(checkpoints.llama(), tmp_path, **NF4)
    before = everything(tmp_path)
    heard: list[Progress] = []
    loaded = load(checkpoints.llama(), tmp_path, heard, quantized_cache=False, **NF4)
    assert "quantizing the weights" in [progress.stage for progress in heard]
    assert not noted(loaded, "quantized copy")
    assert everything(tmp_path) == before


def test_loads_that_do_not_quantize_keep_nothing(tmp_path: Path) -> None:
    assert not noted(load(checkpoints.llama(), tmp_path, bf16=True), "quantized copy")
    stored = load(checkpoints.bitsandbytes(4), tmp_path, quantization="bitsandbytes")
    assert not noted(stored, "quantized copy")
    assert everything(tmp_path) == []


def test_a_model_with_code_of_its_own_is_quantized_at_each_load(tmp_path: Path) -> None:
    for _ in range(2):
        loaded = load(checkpoints.custom_code(), tmp_path, custom_code_allowed=True, **NF4)
        assert not noted(loaded, "quantized copy")
        assert noted(loaded, "quantized at each load: one that runs code of its own")
        assert not loaded.report.from_copy
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"device_map": {"": "cpu"}}, "cpu"),
        ({"device_map": {"": 0}}, "gpu"),
        ({"device_map": {"model.layers.0": 1, "lm_head": 1}}, "gpu"),
        ({"device_map": {"model.layers.0": 0, "lm_head": 1}}, "gpu"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, None),
        ({"device_map": {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "disk"}}, None),
        ({"device_map": {"": "disk"}}, None),
        ({"device_map": "auto", "max_memory": {0: 1}}, "gpu"),
        ({"device_map": "auto", "max_memory": {0: 1, "cpu": 1}}, None),
        ({"device_map": "auto", "max_memory": {0: 1, 1: 1}}, "gpu"),
        ({"device_map": "auto", "max_memory": {0: 1, 1: 1, "cpu": 1}}, None),
        ({"device_map": "auto", "max_memory": {}}, None),
    ],
)
def test_a_model_on_one_kind_of_device_has_a_copy_and_another_a_note(
    where: dict[str, Any], expected: str | None
) -> None:
    order, kwargs = asked(Path("w"))
    place = quantized_copies.place_of(order, {**kwargs, **where})
    assert (place.identity["recipe"]["device"] if place else None) == expected
    if place is None:
        made = quantized_copies.load(order, {**kwargs, **where}, lambda *_: (None, ("checked",)), lambda _: None)
        assert made.notes[0] == "checked"
        assert "quantized at each load: what is quantized depends on which layers lie in RAM" in made.notes[1]
        assert not made.from_copy


def test_gpus_share_a_copy_however_the_layers_lie_on_them() -> None:
    order, kwargs = asked(Path("w"))
    maps = ({"": 0}, {"": 1}, {"model": 0, "lm_head": 1}, {"model": 1, "lm_head": 0})
    places = [quantized_copies.place_of(order, {**kwargs, "device_map": each}) for each in maps]
    assert len({place.folder for place in places if place}) == 1
    assert all(places)


def test_a_copy_is_read_by_a_map_of_several_entries_as_by_one(tmp_path: Path) -> None:
    """The names in a map are those of modules, and a copy's tensors have longer ones."""
    layers = {f"model.layers.{number}": "cpu" for number in range(checkpoints.llama_config().num_hidden_layers)}
    by_layers = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu",
                 "lm_head": "cpu"}  # fmt: skip
    first = seen(checkpoints.llama(), tmp_path, device_map=by_layers, **NF4)
    second, third = (seen(checkpoints.llama(), tmp_path, device_map=each, **NF4) for each in (by_layers, {"": "cpu"}))
    assert [one.report.from_copy for one in (first, second, third)] == [False, True, True]
    assert_equal(first, second)
    assert_equal(first, third)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_copy_made_on_two_gpus_is_read_there_and_on_one(
    demo_model: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    layers = {f"model.layers.{number}": "0" if number < 15 else "1" for number in range(30)}
    spread = {"model.embed_tokens": "0", "lm_head": "0", **layers, "model.norm": "1", "model.rotary_emb": "0"}
    made, there = (seen(demo_model, tmp_path, cpu=False, device_map=spread, **recipe) for _ in range(2))
    alone = seen(demo_model, tmp_path, cpu=False, device_map={"": "1"}, **recipe)
    assert [one.report.from_copy for one in (made, there, alone)] == [False, True, True]
    assert_equal(made, there)
    assert made.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(value.cpu(), alone.tensors[name].cpu()) for name, value in made.tensors.items())
    assert made.tokens == alone.tokens


def just_quantized(tmp_path: Path) -> tuple[LoadedModel, quantized_copies.Place]:
    loaded = load(checkpoints.llama(), tmp_path, quantized_cache=False, **NF4)
    order, kwargs = asked(tmp_path)
    place = quantized_copies.place_of(order, kwargs)
    assert place is not None
    return loaded, place


def test_none_is_written_where_the_disk_is_short(tmp_path: Path) -> None:
    loaded, place = just_quantized(tmp_path)
    needed = 2 * loaded.report.footprint_bytes + 2**30
    heard: list[Progress] = []
    [note] = quantized_copies.keep(loaded.model, loaded.order, place, heard.append, free_bytes=needed - 1)
    assert "No quantized copy is kept: that takes 1 GiB of free disk space" in note
    assert (heard, everything(tmp_path)) == ([], [])
    [note] = quantized_copies.keep(loaded.model, loaded.order, place, heard.append, free_bytes=needed)
    assert MADE in note
    assert heard[-1] == Progress("keeping the quantized copy", 1, 1, "files")
    assert len(kept(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_costs_a_note_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    copies.folder_of(tmp_path / "cache").write_text("a file where the folder should be")
    loaded = load(checkpoints.gpt2(), tmp_path, **NF4)
    assert noted(loaded, "No quantized copy could be kept")
    assert len(greedy(loaded)) > 5


def test_keeping_a_copy_leaves_the_models_settings_alone(tmp_path: Path) -> None:
    loaded, place = just_quantized(tmp_path)
    before = (loaded.model.config.to_dict(), loaded.model.generation_config.to_dict())
    quantized_copies.keep(loaded.model, loaded.order, place, lambda _: None)
    assert (loaded.model.config.to_dict(), loaded.model.generation_config.to_dict()) == before


def test_a_failed_check_keeps_nothing(tmp_path: Path) -> None:
    def make(kwargs: dict[str, Any], stage: str = "") -> tuple[Any, tuple[str, ...]]:
        raise BrokenCheckpoint("the check after loading failed")

    order, kwargs = asked(tmp_path)
    with pytest.raises(BrokenCheckpoint, match="the check after loading failed"):
        quantized_copies.load(order, kwargs, make, lambda _: None)
    assert everything(tmp_path) == []


def test_out_of_memory_with_a_copy_is_said_and_the_copy_stays(tmp_path: Path) -> None:
    load(checkpoints.llama(), tmp_path, **NF4)
    stages: list[str] = []

    def make(kwargs: dict[str, Any], stage: str = "") -> tuple[Any, tuple[str, ...]]:
        stages.append(stage)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    order, kwargs = asked(tmp_path)
    with pytest.raises(OutOfMemory):
        quantized_copies.load(order, kwargs, make, lambda _: None)
    assert stages == ["loading the quantized copy"]
    assert len(kept(tmp_path)) == 1
