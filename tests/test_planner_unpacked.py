"""Packed weights that are unpacked, since nothing here multiplies them packed, as the plan counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from transformers import Mxfp4Config

from modules import devices
from modules.devices import Gpu
from modules.options import LoadOptions
from modules.planner import plan, read_checkpoint
from modules.worker import quantization, report, transformers_loader, verification
from modules.worker.placement import DeviceFacts
from tests import checkpoints, planner_checkpoints
from tests.test_devices import TWO_GPUS
from tests.test_planner_bytes import CPU, GIB, held_bytes


def test_a_gpu_tells_what_it_can_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    TWO_GPUS.install(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", [(9, 0), (8, 6)].__getitem__)
    assert [gpu.capability for gpu in devices.measure(Path.cwd()).gpus] == [(8, 6), (9, 0)]


def test_a_driver_that_does_not_tell_it_hides_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    TWO_GPUS.install(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", silent)
    assert [gpu.capability for gpu in devices.measure(Path.cwd()).gpus] == [(0, 0), (0, 0)]


# --- against what transformers loads ---


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_fp8_on_a_processor_is_planned_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    folder = planner_checkpoints.fp8(name)
    planned = plan(read_checkpoint(folder), LoadOptions(), CPU, ctx_tokens=128)
    model, notes = loaded(folder, tmp_path, quantization="fp8")
    assert planned.exact
    assert [planned.precision.dtype] == list(report.dtypes(model)) == ["bfloat16"]
    assert planned.weights_bytes == held_bytes(model)
    assert any("FP8 and unpacked to bfloat16" in note for note in planned.notes)
    assert any("FP8 weights were unpacked to bfloat16" in note for note in notes)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_mxfp4_on_a_processor_is_planned_as_it_is_loaded() -> None:
    folder = planner_checkpoints.mxfp4()
    planned = plan(read_checkpoint(folder), LoadOptions(bf16=True), CPU, ctx_tokens=128)
    assert planned.exact
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    model = planner_checkpoints.auto_class(folder).from_pretrained(folder, device_map={"": "cpu"}, **options)
    assert planned.weights_bytes == held_bytes(model)


def loaded(folder: Path, work: Path, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The model and the notes of a load, but for the tokenizer, which these folders lack."""
    order = checkpoints.order_for(folder, work, **options)
    device = transformers_loader.device_facts(order)
    arguments = transformers_loader.load_kwargs(order, device, transformers_loader.model_facts(order))
    model = transformers_loader.load_weights(order, arguments, "", lambda _: None)
    return model, verification.verify(model, order, device, arguments.kwargs)


# --- on GPUs that are described ---


@pytest.mark.parametrize("options", [{}, {"cpu": True}], ids=str)
@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (10, 0), (0, 0)], ids=str)
def test_fp8_is_unpacked_on_every_gpu(capability: tuple[int, int], options: dict[str, Any]) -> None:
    """The kernels that multiply it packed come from a hub, which a model's process does not reach."""
    checkpoint = read_checkpoint(planner_checkpoints.fp8("llama"))
    machine = replace(CPU, gpus=(Gpu(0, "x", "0", 24 * GIB, 24 * GIB, (), capability),))
    planned = plan(checkpoint, LoadOptions(**options), machine, ctx_tokens=128)
    plain = read_checkpoint(planner_checkpoints.checkpoint("llama"))
    assert (
        planned.weights_bytes == plan(plain, LoadOptions(bf16=True, **options), machine, ctx_tokens=128).weights_bytes
    )
    assert planned.exact
    assert any("unpacked to bfloat16" in note for note in planned.notes)
    order = checkpoints.order_for(Path("m"), Path("w"), quantization="fp8", **options)
    device = DeviceFacts((GIB,)).usable(order.options)
    config = quantization.quantization_config(order, dict(checkpoint.config["quantization_config"]), device, False)
    assert config is not None
    assert config.dequantize


def test_mxfp4_needs_no_package_since_it_is_unpacked() -> None:
    stored = {"quant_method": "mxfp4"}
    order = checkpoints.order_for(Path("m"), Path("w"), quantization="mxfp4")
    quantization.check_available(order, stored)
    config = quantization.quantization_config(order, stored, DeviceFacts((GIB,)), False)
    assert config is not None
    assert config.dequantize
