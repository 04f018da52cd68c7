"""Where layers go, as numbers: machines that are not here are given as facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modules.errors import OutOfMemory
from modules.worker.placement import GIB, DeviceFacts, Sizes, placement
from tests import checkpoints

TWO_GPUS = DeviceFacts((24 * GIB, 12 * GIB), bf16=True, ram_free_bytes=64 * GIB)
NO_GPU = DeviceFacts(ram_free_bytes=8 * GIB)


def place(device: DeviceFacts, sizes: Sizes | None = None, quantizes: bool = False, **options: Any) -> dict[str, Any]:
    order = checkpoints.order_for(Path("model"), Path("work"), **options)
    return placement(order, device.usable(order.options), sizes or Sizes(), quantizes)


def test_gpu_memory_is_gib_for_each_gpu_in_order() -> None:
    assert place(TWO_GPUS, gpu_memory=(10.0, 6.0))["max_memory"] == {
        0: 10 * GIB,
        1: 6 * GIB,
        "cpu": int(64 * GIB * 0.9),
    }


def test_a_gpu_that_is_not_named_or_has_zero_is_not_touched() -> None:
    assert set(place(TWO_GPUS, gpu_memory=(10.0,))["max_memory"]) == {0, "cpu"}
    assert set(place(TWO_GPUS, gpu_memory=(0.0, 6.0))["max_memory"]) == {1, "cpu"}


def test_cpu_memory_caps_the_ram() -> None:
    assert place(TWO_GPUS, cpu_memory=24.0)["max_memory"]["cpu"] == 24 * GIB


def test_auto_devices_leaves_room_for_the_context() -> None:
    sizes = Sizes(kv_bytes=4 * GIB)
    limits = place(TWO_GPUS, sizes, auto_devices=True)["max_memory"]
    assert limits[0] == (24 - 1 - 2) * GIB
    assert limits[1] == (12 - 1 - 2) * GIB


def test_the_folder_is_given_only_with_disk() -> None:
    assert "offload_folder" not in place(TWO_GPUS)
    assert place(TWO_GPUS, disk=True)["offload_folder"] == str(Path("work") / "offload")


def test_cpu_touches_no_gpu() -> None:
    assert place(TWO_GPUS, cpu=True) == {"device_map": {"": "cpu"}}


def test_layers_that_are_quantized_stay_on_the_gpus() -> None:
    assert set(place(TWO_GPUS, quantizes=True, load_in_4bit=True)["max_memory"]) == {0, 1}


def test_layers_that_are_quantized_may_leave_the_gpus_when_asked() -> None:
    limits = place(TWO_GPUS, quantizes=True, load_in_4bit=True, cpu_memory=20.0)["max_memory"]
    assert limits["cpu"] == 20 * GIB
    assert "cpu" in place(TWO_GPUS, quantizes=True, load_in_4bit=True, auto_devices=True)["max_memory"]


def test_quantizing_on_a_cpu_takes_the_map_under_which_it_happens() -> None:
    assert place(NO_GPU, quantizes=True, load_in_4bit=True, disk=True) == {"device_map": {"": "cpu"}}


def test_what_cannot_fit_is_refused_before_loading_with_the_remedy() -> None:
    with pytest.raises(OutOfMemory, match=r"take 3\.00 GiB; 2\.00 GiB are allowed") as caught:
        place(NO_GPU, Sizes(weight_bytes=3 * GIB), cpu_memory=2.0)
    assert caught.value.fix == {"disk": True}
    assert place(NO_GPU, Sizes(weight_bytes=3 * GIB), cpu_memory=2.0, disk=True)["max_memory"] == {"cpu": 2 * GIB}
