"""What libraries raise, made to be raised for real where that is possible, as errors that say what to change."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from modules import packages
from modules.errors import (
    BrokenCheckpoint,
    CustomCodeRefused,
    DiskFull,
    LoadFailed,
    LoadstoneError,
    MissingPackage,
    OutOfMemory,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from modules.protocol import Progress
from modules.worker import failures, transformers_loader
from modules.worker.failures import translate
from tests import checkpoints
from tests.conftest import ROOT


def order(**facts: Any) -> Any:
    return checkpoints.order_for(Path("a-model"), Path("work"), **facts)


def load(path: Path, work: Path, **facts: Any) -> transformers_loader.LoadedModel:
    def silent(_: Progress) -> None:
        """Keep nothing."""

    return transformers_loader.load(checkpoints.order_for(path, work, **facts), silent)


def edited(folder: Path, **changes: Any) -> Path:
    """A copy of the Llama with changes to its config.json."""
    checkpoints.copied(checkpoints.llama(), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_ram_that_torch_cannot_have() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    error = translate(caught.value, order())
    assert isinstance(error, OutOfMemory)
    assert "1073741824.00 GiB" in error.message
    assert error.fix == {"load_in_4bit": True, "load_in_8bit": False}
    assert "Traceback" in error.details


def test_no_4bit_is_offered_to_what_is_quantized() -> None:
    for facts in ({"load_in_4bit": True}, {"quantization": "gptq"}):
        error = translate(MemoryError(), order(**facts))
        assert isinstance(error, OutOfMemory)
        assert error.fix == {}


def test_a_gpu_that_is_full() -> None:
    error = translate(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"), order())
    assert isinstance(error, OutOfMemory)
    assert "2.50 GiB" in error.message


@pytest.mark.parametrize(
    "raised",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_a_gpu_without_room_for_what_no_allocator_hands_out(raised: Exception) -> None:
    error = translate(raised, order())
    assert isinstance(error, OutOfMemory)
    assert "A GPU's memory ran out" in error.message
    assert error.fix == {"load_in_4bit": True, "load_in_8bit": False}


def test_another_error_of_a_gpu_is_not_taken_for_a_full_one() -> None:
    error = translate(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), order())
    assert not isinstance(error, OutOfMemory)


@pytest.mark.parametrize(
    ("raised", "loaded", "ends"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True, True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("shapes cannot be multiplied"), True, False),
    ],
    ids=str,
)
def test_a_process_that_cannot_use_its_gpu_any_more_ends(
    raised: Exception, loaded: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(failures, "_TOLD_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    translate(raised, order(), loaded=loaded)
    assert ended.wait(5 if ends else 0.2) is ends


@pytest.mark.parametrize(
    "raised",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    ],
    ids=str,
)
def test_a_gpu_that_torch_cannot_use_can_be_done_without(raised: Exception) -> None:
    error = translate(raised, order())
    assert "cannot use the GPU" in error.message
    assert error.fix == {"cpu": True}
    assert translate(raised, order(cpu=True)).fix == {}


def test_a_process_with_too_little_ram_says_so(demo_model: Path, tmp_path: Path) -> None:
    """A real load in a real process whose address space ends before the weights do."""
    code = f"""
import os
import resource
from pathlib import Path
from modules.errors import OutOfMemory
from modules.worker import failures, transformers_loader
from tests import checkpoints
import torch
torch.zeros(8) @ torch.zeros(8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), used + (300 << 20)))
try:
    transformers_loader.load(checkpoints.order_for(Path({str(demo_model)!r}), Path({str(tmp_path)!r})), lambda _: None)
except OutOfMemory as error:
    print("OUT OF MEMORY", error.fix)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert "OUT OF MEMORY {'load_in_4bit': True" in done.stdout, done.stdout + done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_package_that_is_missing() -> None:
    with pytest.raises(ImportError) as caught:
        importlib.import_module("a_package_that_nobody_has.inner")
    error = translate(caught.value, order())
    assert isinstance(error, MissingPackage)
    assert error.hint == f"Run: {packages.install_line('a_package_that_nobody_has')}"


def test_a_package_that_custom_code_needs(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.custom_code(), tmp_path / "model")
    code = (folder / "modeling_own.py").read_text()
    (folder / "modeling_own.py").write_text("import a_package_that_nobody_has\n" + code)
    with pytest.raises(MissingPackage, match="a_package_that_nobody_has"):
        load(folder, tmp_path, custom_code_allowed=True)


def test_damaged_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10" + b"\0" * 7 + b"not a header at all")
    with pytest.raises(SafetensorError) as caught:
        safe_open(file, framework="pt")
    assert isinstance(translate(caught.value, order()), BrokenCheckpoint)


def test_a_disk_that_is_full() -> None:
    with pytest.raises(OSError, match="No space left") as caught:  # noqa: SIM117
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(translate(caught.value, order()), DiskFull)


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'from_the_future'"):
        load(edited(tmp_path / "model", model_type="from_the_future"), tmp_path)


def test_a_model_that_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no language model"):
        load(edited(tmp_path / "model", model_type="vit", architectures=["ViTModel"]), tmp_path)


def test_weights_of_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="other shapes"):
        load(edited(tmp_path / "model", intermediate_size=512), tmp_path)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and go on."""
    with pytest.raises(BrokenCheckpoint, match=r"lack 9 of 30 tensors .*model\.layers\.2\."):
        load(edited(tmp_path / "model", num_hidden_layers=3), tmp_path)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = checkpoints.malicious(tmp_path / "model", marker)
    with pytest.raises(UnsafeCheckpoint, match=r"would run code when opened: io\.open"):
        load(folder, tmp_path, file_format="pytorch")
    assert not marker.exists()


def test_custom_code_that_nobody_allowed(tmp_path: Path) -> None:
    with pytest.raises(CustomCodeRefused, match=r"modeling_own\.py"):
        load(checkpoints.custom_code(), tmp_path)


def test_the_reason_may_lie_under_another_exception() -> None:
    def fail() -> None:
        try:
            raise MemoryError
        except MemoryError as reason:
            raise RuntimeError("loading failed") from reason

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert isinstance(translate(caught.value, order()), OutOfMemory)


def test_what_nobody_knows_keeps_its_words_and_traceback() -> None:
    error = translate(KeyError("lost"), order())
    assert isinstance(error, LoadFailed)
    assert error.message == "a-model: KeyError: 'lost'"
    assert "KeyError" in error.details


def test_our_own_errors_come_back_as_they_are() -> None:
    ours: LoadstoneError = DiskFull("full")
    assert translate(ours, order()) is ours
