"""Float16 models in training: gradients that float16 cannot hold are not lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modules.training.messages import TrainStep
from modules.worker.training import adapter, loop
from modules.worker.training.control import Control
from modules.worker.training.dataset import Counts, Lesson
from modules.worker.training.encoding import Encoded
from tests import trainings
from tests.checkpoints import llama, llama_config, new_model

LESSON = Lesson([[Encoded(at, [5, 6, 7, 8 + at], [False, True, True, True])] for at in range(8)], [], Counts())


def small(dtype: torch.dtype) -> Any:
    """A model of one layer with random weights."""
    return new_model(AutoModelForCausalLM, llama_config(num_hidden_layers=1)).to(dtype)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_have_bfloat16_from_ampere_on(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert adapter.has_bfloat16(torch.device("cuda", 1)) is has
    assert adapter.has_bfloat16(torch.device("cpu"))


def test_a_float16_model_is_trained_in_bfloat16_where_the_device_has_it() -> None:
    model = small(torch.float16)
    layer = model.model.layers[0].mlp.up_proj
    layer.compute_dtype = torch.float16  # as a 4-bit layer of bitsandbytes has one
    adapter.prepare(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert layer.compute_dtype == torch.bfloat16
    assert not adapter.loses_gradients(model)


@pytest.mark.parametrize(
    ("dtype", "scaled"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)], ids=str
)
def test_elsewhere_the_loss_is_scaled_for_float16(
    dtype: torch.dtype, scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "has_bfloat16", lambda device: False)
    order = trainings.order(llama(), trainings.pairs(tmp_path), tmp_path)
    wrapped = adapter.wrap(small(dtype), order.options, "base")
    assert {parameter.dtype for name, parameter in wrapped.named_parameters() if "lora" not in name} == {dtype}
    assert {tensor.dtype for tensor in adapter.trained(wrapped).values()} == {torch.float32}, "as scaling needs"
    assert loop.Loop(wrapped, order, LESSON, 0, Control(), lambda _: None).args.fp16 is scaled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_float16_model_learns_on_a_gpu(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bfloat16 in the GPU."""
    monkeypatch.setattr(adapter, "has_bfloat16", lambda device: bf16)
    order = trainings.order(llama(), trainings.pairs(tmp_path), tmp_path, max_steps=12, learning_rate=1e-2)
    order = replace(order, load=replace(order.load, options=replace(order.load.options, cpu=False)))
    wrapped = adapter.wrap(small(torch.float16).to("cuda"), order.options, "base")
    told: list[Any] = []
    made = loop.Loop(wrapped, order, LESSON, 0, Control(), told.append)
    made.run()
    assert (made.accelerator.scaler is None) is bf16
    losses = [one.loss for one in told if isinstance(one, TrainStep)]
    assert losses[-1] < losses[0]
