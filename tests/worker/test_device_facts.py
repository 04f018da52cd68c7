"""What a load asks the GPUs. They are not here: torch.cuda is told of two, the first of which has no room left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.worker import transformers_loader
from modules.worker.placement import GIB, DeviceFacts
from tests import checkpoints
from tests.conftest import ROOT


class Asked(list[int]):
    """The GPUs that were asked for their memory, by their numbers: each then holds a context."""

    def free(self, gpu: int) -> tuple[int, int]:
        self.append(gpu)
        return 20 * GIB, 24 * GIB


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Two GPUs."""
    found = Asked()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 6), (7, 5)].__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", found.free)
    return found


def facts(**order: Any) -> DeviceFacts:
    return transformers_loader.device_facts(checkpoints.order_for(Path("model"), Path("work"), **order))


@pytest.mark.parametrize(
    ("order", "gpus"),
    [
        ({"cpu": True}, 0),
        ({"device_map": {"": "cpu"}}, 0),
        ({"device_map": {"": "1"}}, 2),
        ({"device_map": {"model.embed_tokens": "1", "model.layers.0": "cpu"}}, 2),
        ({"gpu_memory": (0.0, 20.0)}, 2),
    ],
    ids=str,
)
def test_a_gpu_whose_share_is_known_is_not_asked(order: dict[str, Any], gpus: int, asked: Asked) -> None:
    assert facts(**order).gpus == gpus
    assert not asked


def test_the_least_capable_gpu_counts_of_those_that_are_allowed(asked: Asked) -> None:
    assert not facts(device_map={"": "0"}).bf16
    assert facts(device_map={"": "0"}, gpu_memory=(20.0, 0.0)).bf16
    assert facts(device_map={"": "0"}, gpu_memory=(20.0,)).bf16
    assert not facts(gpu_memory=(0.0, 20.0)).bf16
    assert facts(cpu=True).bf16


def test_an_order_without_a_plan_asks_each(asked: Asked) -> None:
    assert facts().gpu_free_bytes == (20 * GIB, 20 * GIB)
    assert asked == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_facts_for_a_plan_make_no_context() -> None:
    """In a process of its own, as this one may hold a context already."""
    code = """
from pathlib import Path
import torch
from modules.worker import transformers_loader
from tests import checkpoints
order = checkpoints.order_for(Path("model"), Path("work"), device_map={"": "0"})
assert transformers_loader.device_facts(order).gpus
assert not any(torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(torch.cuda.device_count()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
