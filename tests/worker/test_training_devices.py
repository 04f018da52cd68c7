"""Where a training runs: on the GPUs that the plan gave its model, and on no other."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.protocol import LoadOrder, Progress
from modules.training.messages import Trained, TrainOrder
from modules.worker.training.visible import with_own_gpus
from tests import checkpoints, trainings
from tests.worker.test_training_process import run


def order(device_map: dict[str, str], **options: Any) -> LoadOrder:
    return checkpoints.order_for(Path("model"), Path("work"), device_map=device_map, **options)


@pytest.mark.parametrize(
    ("shown", "placed", "sees", "numbered"),
    [
        (None, {"": "0"}, "0", {"": "0"}),
        (None, {"": "1"}, "1", {"": "0"}),
        (None, {"a": "3", "b": "1", "c": "3"}, "1,3", {"a": "1", "b": "0", "c": "1"}),
        ("GPU-x, 5,2", {"a": "0", "b": "2"}, "GPU-x,2", {"a": "0", "b": "1"}),
        ("7,5", {"": "1"}, "5", {"": "0"}),
        (None, {"": "cpu"}, "", {"": "cpu"}),
        ("7", {"": "cpu"}, "", {"": "cpu"}),
        ("7", {}, "7", {}),
    ],
    ids=str,
)
def test_the_gpus_of_the_plan_are_all_that_is_seen(
    shown: str | None, placed: dict[str, str], sees: str, numbered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert with_own_gpus(order(placed)).device_map == numbered
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


def test_a_training_on_the_cpu_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with_own_gpus(order({}, cpu=True))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_process_hides_the_others_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would train, it says instead what it sees and which order it follows."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-first,GPU-second")
    code = """
import os
from modules.protocol import Progress
from modules.worker import train
import modules.worker.training.run as run
run.train = lambda order, *_: Progress(f"{os.environ['CUDA_VISIBLE_DEVICES']} {order.load.device_map}")
raise SystemExit(train.main())
"""
    assert run(on_the_second(tmp_path), command=("-c", code))[-1] == Progress("GPU-second {'': '0'}")


def on_the_second(work: Path, **how: Any) -> TrainOrder:
    """To train a small model that lies on GPU 1."""
    plain = trainings.order(checkpoints.llama(), trainings.pairs(work), work, how, max_steps=3)
    options = replace(plain.load.options, cpu=False)
    return replace(plain, load=replace(plain.load, options=options, device_map={"": "1"}))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here")
@pytest.mark.parametrize("how", [{}, {"load_in_4bit": True}], ids=str)
def test_a_model_on_the_second_gpu_is_trained_there(how: dict[str, Any], tmp_path: Path) -> None:
    before = _held()
    held: list[int] = []
    made = run(on_the_second(tmp_path, **how), 2, lambda _: held.extend(_held()))[-1]
    assert isinstance(made, Trained)
    assert held[0] - before[0] < 50 < held[1] - before[1]


def _held() -> list[int]:
    """MiB that are held of each GPU."""
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(line) for line in told.stdout.split()]
