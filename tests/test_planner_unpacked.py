"""Packed weights that transformers unpacks where the device cannot multiply them, as the plan counts them."""

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


@pytest.mark.parametrize(
    ("capabilities", "options", "unpacked"),
    [
        ([(8, 6)], {}, True),
        ([(8, 9)], {}, False),
        ([(10, 0)], {}, False),
        ([(9, 0), (8, 6)], {}, True),
        ([(9, 0)], {"cpu": True}, True),
        ([(0, 0)], {}, True),
    ],
    ids=str,
)
def test_fp8_stays_packed_where_every_gpu_multiplies_it(
    capabilities: list[tuple[int, int]], options: dict[str, Any], unpacked: bool
) -> None:
    checkpoint = read_checkpoint(planner_checkpoints.fp8("llama"))
    gpus = tuple(Gpu(at, "x", str(at), 24 * GIB, 24 * GIB, (), one) for at, one in enumerate(capabilities))
    planned = plan(checkpoint, LoadOptions(**options), replace(CPU, gpus=gpus), ctx_tokens=128)
    plain = plan(read_checkpoint(planner_checkpoints.checkpoint("llama")), LoadOptions(bf16=True, **options),
                 replace(CPU, gpus=gpus), ctx_tokens=128)  # fmt: skip
    assert (planned.weights_bytes == plain.weights_bytes) is unpacked
    assert planned.exact is unpacked
    assert planned.precision == plain.precision
    assert any("8.9" in note for note in planned.notes) is unpacked
    order = checkpoints.order_for(Path("m"), Path("w"), quantization="fp8", **options)
    device = DeviceFacts((GIB,) * len(gpus), capability=min(capabilities)).usable(order.options)
    assert quantization.unpacked(order, device) is unpacked
    config = quantization.quantization_config(order, dict(checkpoint.config["quantization_config"]), device, False)
    assert (config is not None and config.dequantize) is unpacked


def test_mxfp4_is_packed_on_older_gpus_too() -> None:
    checkpoint = read_checkpoint(planner_checkpoints.mxfp4())
    sizes = []
    for capability in ((7, 0), (8, 0)):
        gpu = Gpu(0, "x", "0", 24 * GIB, 24 * GIB, (), capability)
        sizes.append(plan(checkpoint, LoadOptions(), replace(CPU, gpus=(gpu,)), ctx_tokens=128).weights_bytes)
    assert sizes[0] > sizes[1]
