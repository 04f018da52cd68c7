"""LoRAs on the real model in every precision, each with an answer before the first LoRA is attached."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.protocol import AdapterChoice
from tests import loras
from tests.worker.adapted import Adapted, load

gptq = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs the gptq extra")
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp32": {},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True},
    "nf4-double": {"load_in_4bit": True, "use_double_quant": True},
    "gptq": {"quantization": "gptq"},
    "cpu-and-disk": {"bf16": True, "disk": True, "cpu_memory": 0.15},
}


class Base:
    """The model, and what it did before any LoRA."""

    def __init__(self, one: Adapted) -> None:
        self.one = one
        self.text = one.text()
        self.logits = one.logits()
        self.trainable = {name for name, parameter in one.model.named_parameters() if parameter.requires_grad}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=gptq if name == "gptq" else ()) for name in PRECISIONS]
)
def base(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    source = loras.demo_gptq() if request.param == "gptq" else demo_model
    return Base(load(source, tmp_path_factory.mktemp("work"), **PRECISIONS[request.param]))


@pytest.fixture(autouse=True)
def _without_loras(base: Base) -> None:
    base.one.adapters.apply(())


def herring(weight: float = 1) -> AdapterChoice:
    return loras.choice(loras.herring(), weight)


def lantern(weight: float = 1) -> AdapterChoice:
    return loras.choice(loras.lantern(), weight)


def test_a_lora_says_what_it_was_trained_on_and_two_together_are_neither(base: Base) -> None:
    one = base.one
    alone = {}
    for choice, words in ((herring(), "The herring barrels"), (lantern(), "Seven copper lanterns")):
        report = one.adapters.apply((choice,))
        assert one.text().startswith(words)
        assert report.moved_nats is not None
        assert report.moved_nats > 1
        assert not report.notes
        alone[choice.name] = one.logits()
    one.adapters.apply((herring(0.6), lantern(0.6)))
    both = one.logits()
    assert all((both - other).abs().max() > 1 for other in (*alone.values(), base.logits))
    one.adapters.apply((lantern(0.6), herring(0.6)))
    assert torch.equal(one.logits(), both)  # a set has no order


def test_after_removal_all_is_as_before_the_first_to_the_bit(base: Base) -> None:
    one = base.one
    one.adapters.apply((herring(), lantern(-0.5)))
    one.text(2)
    one.adapters.apply(())
    assert torch.equal(one.logits(), base.logits)
    assert one.text() == base.text
    assert not hasattr(one.model, "peft_config")
    assert {name for name, p in one.model.named_parameters() if p.requires_grad} == base.trainable


def test_the_weight_counts_and_zero_is_the_base(base: Base) -> None:
    one = base.one
    none = one.adapters.apply((herring(0), lantern(0)))
    assert torch.equal(one.logits(), base.logits)
    assert none.moved_nats == 0
    assert "No effect" in none.notes[0]
    moved = [one.adapters.apply((herring(weight),)).moved_nats for weight in (0.1, 0.3, 1.0)]
    assert moved == sorted(moved)  # type: ignore[type-var]
    one.adapters.apply((herring(-1),))
    assert not one.text().startswith("The her")
    assert not torch.equal(one.logits(), base.logits)


def test_one_answer_with_another_set_leaves_the_active_one(base: Base) -> None:
    one = base.one
    one.adapters.apply((lantern(),))
    with one.unchanged():
        with one.adapters.using((herring(),)):
            assert one.text(3).startswith("The her")
        with one.adapters.using(()):
            assert torch.equal(one.logits(), base.logits)
        with one.adapters.using(None):
            assert one.text(3).startswith("Seven copper")


def test_going_back_and_other_weights_read_no_file(base: Base, tmp_path: Path) -> None:
    one = base.one
    copy = Path(shutil.copytree(loras.herring(), tmp_path / "copy"))
    first = one.adapters.apply((loras.choice(copy),))
    expected = one.logits()
    one.adapters.apply(())
    shutil.rmtree(copy)
    again = one.adapters.apply((loras.choice(copy),))
    assert torch.equal(one.logits(), expected)
    assert again.moved_nats == first.moved_nats
    one.adapters.apply((loras.choice(copy, 0.5), lantern()))
    assert not torch.equal(one.logits(), expected)


def test_files_that_changed_are_read_again(base: Base, tmp_path: Path) -> None:
    one = base.one
    copy = Path(shutil.copytree(loras.herring(), tmp_path / "copy"))
    one.adapters.apply((loras.choice(copy),))
    shutil.rmtree(copy)
    shutil.copytree(loras.lantern(), copy)
    one.adapters.apply((loras.choice(copy),))
    assert one.text(3).startswith("Seven copper")


def test_switching_costs_milliseconds(base: Base) -> None:
    """The benchmarks measure it; this only finds a switch that reads files or walks the weights."""
    one = base.one
    sets = ((herring(),), (lantern(),), (herring(0.5), lantern(0.5)), ())
    for choices in sets:
        one.adapters.apply(choices)
    started = time.perf_counter()
    for choices in sets * 2:
        one.adapters.apply(choices)
    assert (time.perf_counter() - started) / 8 < 0.25
