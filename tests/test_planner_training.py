"""What a training will take, by the headers: as many parameters as peft makes, and more memory where there is more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules.devices import Gpu, Machine
from modules.library import Library, ModelFacts
from modules.options import LoadOptions, TrainingOptions
from modules.planner import from_facts, plan
from modules.planner.training import missing_targets, training_plan, training_seconds
from tests import checkpoints, loras, planner_checkpoints
from tests.services import MACHINE

CPU = LoadOptions(cpu=True)
GIB = 2**30


def facts_of(path: Path) -> ModelFacts:
    library = Library([path.parent])
    return library.facts(library.find(str(path), allow_paths=True))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"rank": 3}),
        ("llama", {"target_modules": ("q_proj", "lm_head")}),
        ("gemma3", {"dora": True}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": ("c_attn",), "dora": True}),
        ("gptq", {}),
    ],
)
def test_as_many_parameters_are_trained_as_peft_makes(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    from modules.worker import transformers_loader
    from modules.worker.training import adapter

    if model == "gptq":
        pytest.importorskip("gptqmodel")
    source = loras.demo_gptq() if model == "gptq" else getattr(checkpoints, model)()
    how = {"quantization": "gptq", "disable_exllama": True} if model == "gptq" else {}
    loaded = transformers_loader.load(checkpoints.order_for(source, tmp_path, cpu=True, **how), lambda _: None)
    training = TrainingOptions(**options)
    made = adapter.trained(adapter.wrap(loaded.model, training, "base"))
    planned = training_plan(facts_of(source), CPU, training, MACHINE, 64)
    assert planned.parameters == sum(tensor.numel() for tensor in made.values())


@pytest.mark.parametrize(
    ("change", "sign"),
    [({"rank": 64}, 1), ({"batch_size": 8}, 1), ({"cutoff": 256}, 1), ({"dora": True}, 1),
     ({"gradient_checkpointing": True}, -1), ({"target_modules": ("q_proj",)}, -1)],
)  # fmt: skip
def test_more_takes_more(change: dict[str, object], sign: int) -> None:
    facts = facts_of(checkpoints.llama())
    options = TrainingOptions(cutoff=128)
    base = training_plan(facts, CPU, options, MACHINE, 0)
    other = training_plan(facts, CPU, replace(options, **change), MACHINE, 0)  # type: ignore[arg-type]
    assert (other.total_bytes - base.total_bytes) * sign > 0
    assert base.fits


def test_short_examples_take_no_more_than_they_have() -> None:
    facts = facts_of(checkpoints.llama())
    short = training_plan(facts, CPU, TrainingOptions(cutoff=4096), MACHINE, 32)
    assert short == training_plan(facts, CPU, TrainingOptions(cutoff=32), MACHINE, 0)


def test_a_machine_that_is_too_small_is_told() -> None:
    small = replace(MACHINE, ram_free_bytes=2**28)
    made = training_plan(facts_of(checkpoints.llama()), CPU, TrainingOptions(), small, 0)
    assert not made.fits
    assert made.on == "RAM"


# --- on GPUs that are described ---


def gpus(*free_gib: float) -> Machine:
    found = tuple(Gpu(at, "simulated", str(at), int(g * GIB), int(g * GIB)) for at, g in enumerate(free_gib))
    return replace(MACHINE, gpus=found)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Of a model that needs two GPUs, in 4-bit too."""
    return facts_of(planner_checkpoints.llama_70b(tmp_path_factory.mktemp("headers") / "llama-70b"))


FOUR = LoadOptions(load_in_4bit=True)
THRIFTY = TrainingOptions(gradient_checkpointing=True, batch_size=1, cutoff=256)
HALVES = {
    "model.embed_tokens": "0", "model.rotary_emb": "0", "model.norm": "1", "lm_head": "1",
    **{f"model.layers.{at}": "0" if at < 40 else "1" for at in range(80)},
}  # fmt: skip


def test_a_model_on_two_gpus_is_judged_where_it_lies(large: ModelFacts) -> None:
    made = training_plan(large, FOUR, THRIFTY, gpus(32, 32), 0, HALVES)
    assert made.fits
    assert made.on == "GPU 1", "where the logits are"
    first = training_plan(large, FOUR, THRIFTY, gpus(20, 32), 0, HALVES)
    assert (first.fits, first.on, first.parts["logits"]) == (False, "GPU 0", 0)
    for part in ("LoRA and optimizer", "activations"):
        assert made.parts[part] == first.parts[part]
    assert made.parts["LoRA and optimizer"] == made.parameters * 16 // 2
    both = made.parts["the model"] + first.parts["the model"]
    assert both == plan(large, FOUR, gpus(80), ctx_tokens=1).weights_bytes


def test_one_gpu_that_is_too_small_is_enough_to_refuse(large: ModelFacts) -> None:
    assert not training_plan(large, FOUR, THRIFTY, gpus(32, 19), 0, HALVES).fits
    assert not training_plan(large, FOUR, THRIFTY, gpus(19, 32), 0, HALVES).fits


def test_a_model_on_the_second_gpu_does_not_need_the_first() -> None:
    facts = facts_of(checkpoints.llama())
    made = training_plan(facts, FOUR, TrainingOptions(), gpus(0.1, 24), 0, {"": "1"})
    assert (made.fits, made.on) == (True, "GPU 1")
    assert not training_plan(facts, FOUR, TrainingOptions(), gpus(0.1, 24), 0, {"": "0"}).fits


def test_what_would_lie_beside_a_gpu_cannot_be_trained(large: ModelFacts) -> None:
    spilling = replace(gpus(24), ram_free_bytes=256 * GIB)
    assert plan(large, LoadOptions(), spilling, ctx_tokens=1).fits
    assert not training_plan(large, LoadOptions(), THRIFTY, spilling, 0).fits


def test_modules_that_the_model_has_not_are_found() -> None:
    checkpoint = from_facts(facts_of(checkpoints.llama()))
    assert missing_targets(checkpoint, ("q_proj", "self_attn.k_proj", "nope", "proj")) == ("nope", "proj")


def test_the_time_goes_by_an_earlier_speed_and_else_by_the_devices() -> None:
    facts = facts_of(checkpoints.llama())
    options = TrainingOptions()
    assert training_seconds(facts, options, 1000, 0, 50) == 20
    assert training_seconds(facts, options, 1000, 0) is None
    quick, slow = (training_seconds(facts, options, 1000, flops) for flops in (2e9, 1e9))
    assert quick is not None
    assert slow == pytest.approx(2 * quick)
    thrifty = training_seconds(facts, replace(options, gradient_checkpointing=True), 1000, 2e9)
    assert thrifty is not None
    assert thrifty > quick
