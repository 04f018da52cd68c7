"""4-bit, 8-bit, GPTQ and AWQ on real models: classes, states and bytes as they are after loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch.utils import cpp_extension
from transformers.quantizers.auto import AutoHfQuantizer

from modules import packages
from modules.checkpoint import OTHER_QUANTIZATIONS, QUANTIZATIONS
from modules.devices import cpu_bf16
from modules.errors import MissingPackage, OptionConflict, UnsupportedModel, WrongResult
from modules.options import LoadOptions
from modules.protocol import LoadOrder, Progress
from modules.worker import quantization, report, transformers_loader
from modules.worker.placement import GIB, DeviceFacts
from tests import checkpoints, planner_checkpoints

CONVERTED = 106_168_320  # parameters of the demo model's 210 linear layers that bitsandbytes converts
REST_PARAMETERS = 28_346_688  # what is not converted: the tied embedding and the norms
REST = REST_PARAMETERS * (2 if cpu_bf16() else 4)
ROTARY = 2 * 32 * 4  # bytes of the two float32 buffers of inverse frequencies
GPU = DeviceFacts((24 * GIB,), bf16=True, ram_free_bytes=64 * GIB)
OLD_GPU = DeviceFacts((16 * GIB,), bf16=False, ram_free_bytes=64 * GIB)
CPU = DeviceFacts(ram_free_bytes=64 * GIB)
OLD_CPU = DeviceFacts(cpu_bf16=False, ram_free_bytes=64 * GIB)
AUTO_DTYPE = torch.bfloat16 if cpu_bf16() else torch.float32

needs_gptqmodel = pytest.mark.skipif(bool(packages.missing("gptq")), reason="the optional package gptqmodel is missing")


def load(path: Path, work: Path, **facts: Any) -> transformers_loader.LoadedModel:
    def silent(_: Progress) -> None:
        """Keep nothing."""

    return transformers_loader.load(checkpoints.order_for(path, work, **facts), silent)


def layers(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.fixture(scope="module")
def nf4(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> transformers_loader.LoadedModel:
    return load(demo_model, tmp_path_factory.mktemp("work"), load_in_4bit=True)


def test_4bit_converts_every_linear_layer(nf4: transformers_loader.LoadedModel) -> None:
    assert nf4.report.layer_classes == {"Linear4bit": 210, "Linear": 1}
    assert nf4.report.parameters == CONVERTED + REST_PARAMETERS
    for layer in layers(nf4.model, bnb.nn.Linear4bit):
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested is False
        assert layer.compute_dtype == AUTO_DTYPE


def test_4bit_takes_half_a_byte_and_a_scale_a_parameter(nf4: transformers_loader.LoadedModel) -> None:
    per_parameter = (nf4.report.footprint_bytes - REST) / CONVERTED
    assert 0.56 <= per_parameter <= 0.565  # 1/2 and one float32 for 64 parameters


def test_double_quantization_takes_less(demo_model: Path, tmp_path: Path, nf4: transformers_loader.LoadedModel) -> None:
    double = load(demo_model, tmp_path, load_in_4bit=True, use_double_quant=True)
    assert all(layer.weight.quant_state.nested for layer in layers(double.model, bnb.nn.Linear4bit))
    saved = (nf4.report.footprint_bytes - double.report.footprint_bytes) / CONVERTED
    assert 0.043 <= saved <= 0.047
    assert 0.515 <= (double.report.footprint_bytes - REST) / CONVERTED <= 0.525


@pytest.mark.parametrize(
    ("options", "quant_type", "dtype"),
    [
        ({"quant_type": "fp4"}, "fp4", AUTO_DTYPE),
        ({"compute_dtype": "float16"}, "nf4", torch.float16),
        ({"compute_dtype": "float32"}, "nf4", torch.float32),
    ],
)
def test_type_and_compute_dtype_reach_the_layers(
    tmp_path: Path, options: dict[str, str], quant_type: str, dtype: torch.dtype
) -> None:
    model = load(checkpoints.llama(), tmp_path, load_in_4bit=True, **options).model
    found = layers(model, bnb.nn.Linear4bit)
    assert len(found) == 14
    assert {(layer.weight.quant_state.quant_type, layer.compute_dtype) for layer in found} == {(quant_type, dtype)}
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(GPU, torch.bfloat16), (OLD_GPU, torch.float16), (CPU, torch.bfloat16), (OLD_CPU, torch.float32)],
)
def test_auto_compute_dtype_is_what_the_device_has(device: DeviceFacts, dtype: torch.dtype) -> None:
    options = checkpoints.order_for(Path("m"), Path("w"), load_in_4bit=True).options
    assert quantization.compute_dtype(options, device) == dtype


def test_8bit_weights_are_int8(demo_model: Path, tmp_path: Path) -> None:
    result = load(demo_model, tmp_path, load_in_8bit=True)
    found = layers(result.model, bnb.nn.Linear8bitLt)
    assert result.report.layer_classes == {"Linear8bitLt": 210, "Linear": 1}
    assert all(layer.weight.dtype == torch.int8 for layer in found)
    rows = sum(layer.out_features for layer in found)
    assert result.report.footprint_bytes == CONVERTED + 4 * rows + REST + ROTARY


def test_conv1d_layers_are_converted_too(tmp_path: Path) -> None:
    assert load(checkpoints.gpt2(), tmp_path, load_in_4bit=True).report.layer_classes == {"Linear4bit": 8, "Linear": 1}


@pytest.mark.skipif(not cpu_bf16(), reason="what is not quantized is float32 here, and bfloat16 in the checkpoint")
@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_a_saved_bitsandbytes_copy_answers_like_one_quantized_while_loading(
    tmp_path: Path, bits: int, kind: str
) -> None:
    four_bit = {"load_in_4bit": True, "use_double_quant": True, "compute_dtype": "bfloat16"}
    fresh = load(checkpoints.llama(), tmp_path, **(four_bit if bits == 4 else {"load_in_8bit": True}))
    saved = load(checkpoints.bitsandbytes(bits), tmp_path, quantization="bitsandbytes")
    assert saved.report.layer_classes == {kind: 14, "Linear": 1}
    prompt = torch.arange(3, 40)[None]
    torch.testing.assert_close(saved.model(prompt).logits, fresh.model(prompt).logits)


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_what_is_quantized_is_not_quantized_again(tmp_path: Path, option: str) -> None:
    with pytest.raises(OptionConflict, match=r"already quantized \(bitsandbytes\)") as caught:
        load(checkpoints.bitsandbytes(4), tmp_path, quantization="bitsandbytes", **{option: True})
    assert caught.value.fix == {"load_in_4bit": False, "load_in_8bit": False}


def test_a_layer_that_was_left_out_is_noticed(tmp_path: Path) -> None:
    """What bitsandbytes does silently for layers beside a GPU, done here by hand."""
    result = load(checkpoints.llama(), tmp_path, load_in_4bit=True)
    result.model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 256)
    with pytest.raises(WrongResult, match=r"1 of 14 layers are not quantized: model\.layers\.1\.mlp\.up_proj"):
        quantization.verify(result.model, result.order, transformers_loader.device_facts(result.order))


def test_another_compute_dtype_is_noticed(tmp_path: Path) -> None:
    result = load(checkpoints.llama(), tmp_path, load_in_4bit=True)
    result.model.model.layers[0].mlp.up_proj.compute_dtype = torch.float16
    with pytest.raises(WrongResult, match="float16"):
        quantization.verify(result.model, result.order, transformers_loader.device_facts(result.order))


def test_a_missing_package_is_named_with_the_line_to_run(tmp_path: Path) -> None:
    assert packages.missing("aqlm"), "this test needs a quantization package that is not installed"
    with pytest.raises(MissingPackage, match="aqlm") as caught:
        load(planner_checkpoints.quantized_by("aqlm", tmp_path / "model"), tmp_path, quantization="aqlm")
    assert caught.value.hint == f"Run: {packages.install_line('aqlm')}"


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    """transformers would leave the packed weights out with a warning, and load noise."""
    with pytest.raises(UnsupportedModel, match="'crunch'"):
        load(planner_checkpoints.quantized_by("crunch", tmp_path / "model"), tmp_path, quantization="crunch")


@pytest.mark.parametrize("quantization_", ["", "awq"])
def test_a_quantization_without_a_name_is_refused(quantization_: str) -> None:
    order = LoadOrder("old", "", "safetensors", "causal", quantization_, LoadOptions(), 256, "", "")
    with pytest.raises(UnsupportedModel, match="old"):
        quantization.check_available(order, {"group_size": 64, "bits": 4})


def test_what_is_said_to_be_read_is_what_transformers_reads() -> None:
    script = (
        "import json; from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known; "
        "print(json.dumps(list(known)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    known = {"bitsandbytes" if name.startswith("bitsandbytes_") else name for name in json.loads(done.stdout)}
    assert known == QUANTIZATIONS
    assert QUANTIZATIONS.isdisjoint(OTHER_QUANTIZATIONS)


@needs_gptqmodel
def test_gptq_layers_and_disable_exllama(tmp_path: Path) -> None:
    plain = load(checkpoints.gptq(), tmp_path, quantization="gptq")
    trainable = load(checkpoints.gptq(), tmp_path, quantization="gptq", disable_exllama=True)
    for result, backend in ((plain, "auto"), (trainable, "auto_trainable")):
        assert result.report.layer_classes["Linear"] == 1
        assert sum(result.report.layer_classes.values()) == 15
        assert result.report.parameters == load(checkpoints.llama(), tmp_path).report.parameters
        assert result.model.hf_quantizer.quantization_config.backend == backend
    kernels = [module for module in trainable.model.modules() if hasattr(module, "qweight")]
    assert len(kernels) == 14
    assert all(kernel.SUPPORTS_TRAINING for kernel in kernels)
    assert not any("exllama" in type(kernel).__name__.lower() for kernel in kernels)


@needs_gptqmodel
def test_gptq_computes_nearly_what_the_plain_model_does(tmp_path: Path) -> None:
    prompt = torch.arange(3, 40)[None]
    quantized = load(checkpoints.gptq(), tmp_path, quantization="gptq").model(prompt).logits.float()
    plain = load(checkpoints.llama(), tmp_path).model(prompt).logits
    assert torch.nn.functional.cosine_similarity(quantized, plain, dim=-1).min() > 0.98


@pytest.mark.parametrize("compiler", [True, False])
def test_layers_on_a_gpu_need_no_compiler(compiler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path) if compiler else None)
    monkeypatch.setattr(quantization, "find_spec", lambda name: name == "triton")
    backends = {"gptq": "auto_trainable", "awq": "gemm_triton"}
    for method, backend in backends.items():
        stored = {"quant_method": method, "bits": 4, "group_size": 128}
        order = checkpoints.order_for(tmp_path, tmp_path, quantization=method)
        assert quantization.quantization_config(order, stored, CPU, False) is None
        config = quantization.quantization_config(order, stored, GPU, False)
        if compiler:
            assert config is None
        else:
            assert AutoHfQuantizer.merge_quantization_configs(stored, config).backend == backend
    order = checkpoints.order_for(tmp_path, tmp_path, quantization="awq")
    other = {"quant_method": "awq", "version": "GEMV"}  # a layout that Triton has no kernel for
    assert quantization.quantization_config(order, other, GPU, False) is None


def test_packed_weights_count_once_whether_they_are_parameters_or_buffers() -> None:
    """Kernels for GPUs keep them as parameters, the others as buffers."""
    layer: Any = torch.nn.Module()
    layer.in_features, layer.out_features = 64, 32
    layer.qweight = torch.nn.Parameter(torch.zeros(8, 32, dtype=torch.int32), requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.zeros(1, 32), requires_grad=False)
    assert report.count_parameters(torch.nn.Sequential(layer, torch.nn.Linear(32, 4))) == 64 * 32 + 32 * 4 + 4


@needs_gptqmodel
def test_gptq_that_cannot_be_trained_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = load(checkpoints.gptq(), tmp_path, quantization="gptq", disable_exllama=True)
    kernel = next(type(module) for module in result.model.modules() if hasattr(module, "qweight"))
    monkeypatch.setattr(kernel, "SUPPORTS_TRAINING", False)
    with pytest.raises(WrongResult, match="disable_exllama"):
        quantization.verify(result.model, result.order, transformers_loader.device_facts(result.order))


@needs_gptqmodel
def test_awq_computes_what_its_packed_weights_stand_for(tmp_path: Path) -> None:
    result = load(checkpoints.awq(), tmp_path, quantization="awq")
    assert sum(result.report.layer_classes.values()) == 15
    assert result.report.layer_classes["Linear"] == 1
    reference = load(checkpoints.llama(), tmp_path).model
    reference.load_state_dict(load_file(checkpoints.awq() / "reference.st"))
    prompt = torch.arange(3, 40)[None]
    torch.testing.assert_close(result.model(prompt).logits.float(), reference(prompt).logits, atol=0.02, rtol=0)
