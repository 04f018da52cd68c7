"""Packed weights that transformers unpacks where the device cannot multiply them, as the plan counts them."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from modules import devices
from tests.test_devices import TWO_GPUS


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
