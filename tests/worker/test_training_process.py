"""The process that trains: killed at any step, it goes on to the very same LoRA; it ends with whoever started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import NotTrainable
from modules.protocol import Failed, decode, encode
from modules.training import runs
from modules.training.messages import Trained, TrainOrder, TrainStarted, TrainStep
from modules.worker.train import check_base
from tests import checkpoints, trainings
from tests.conftest import ROOT

COMMAND = ("-m", "modules.worker.train")
STEPS = 20
# Everything that has a state: a dropout that draws numbers, epochs that shuffle, a rate that moves, evaluations.
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS, "checkpoint_steps": 3, "dropout": 0.2, "accumulation": 2, "batch_size": 2,
    "evaluation_share": 0.2, "schedule": "cosine", "warmup": 0.2, "learning_rate": 5e-3,
}  # fmt: skip


@contextmanager
def started(order: TrainOrder, command: tuple[str, ...] = COMMAND) -> Iterator[subprocess.Popen[bytes]]:
    """The process, given its order; its stdin stays open."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(encode(order))
    process.stdin.flush()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run(
    order: TrainOrder, at_step: int = 0, act: Callable[[subprocess.Popen[bytes]], None] | None = None,
    command: tuple[str, ...] = COMMAND,
) -> list[Any]:  # fmt: skip
    """What the process says to its end; ``act`` is done once step ``at_step`` has been made."""
    said = []
    with started(order, command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(decode(line))
            if act is not None and isinstance(said[-1], TrainStep) and said[-1].step == at_step:
                act(process)
                act = None
        process.wait(60)
    return said


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def close_stdin(process: subprocess.Popen[bytes]) -> None:
    """What happens where the server is killed."""
    assert process.stdin is not None
    process.stdin.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainOrder:
    """A training of the small Llama in float32 that nobody disturbed."""
    work = tmp_path_factory.mktemp("unbroken")
    order = trainings.order(checkpoints.llama(), trainings.pairs(work), work, **OPTIONS)
    assert isinstance(run(order)[-1], Trained)
    return order


def test_a_training_that_is_killed_again_and_again_makes_the_same_lora(unbroken: TrainOrder, tmp_path: Path) -> None:
    order = trainings.elsewhere(unbroken, tmp_path)
    first = run(order, 5, kill)
    assert not isinstance(first[-1], Trained | Failed)
    assert not Path(order.out).exists()
    ((last, _),) = runs.checkpoints(Path(order.folder))
    assert last >= 3  # the signal may come some steps late

    second = run(order, last + 5, close_stdin)
    begun = next(one for one in second if isinstance(one, TrainStarted))
    assert (begun.step, begun.total_steps) == (last, STEPS)
    steps = [one.step for one in second if isinstance(one, TrainStep)]
    assert steps[: last + 1] == list(range(1, last + 2)), "the curve of the steps before is told again"

    made = run(order)[-1]
    assert isinstance(made, Trained)
    assert made.steps == STEPS

    mine, theirs = trainings.weights(order), trainings.weights(unbroken)
    assert mine.keys() == theirs.keys()
    assert all(tensor.dtype == torch.float32 for tensor in mine.values())
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(tensor.abs().max() > 0 for name, tensor in mine.items() if "lora_B" in name)


def test_a_half_written_checkpoint_is_none(unbroken: TrainOrder, tmp_path: Path) -> None:
    order = trainings.elsewhere(unbroken, tmp_path)
    half = Path(order.folder) / ".writing" / "checkpoint-9"
    half.mkdir(parents=True)
    (half / runs.STATE).write_text('{"global_step": 9')
    (half / "adapter_model.safetensors").write_bytes(b"half")
    said = run(order, 4, kill)
    begun = next(one for one in said if isinstance(one, TrainStarted))
    assert begun.step == 0
    assert not half.exists()


def test_two_processes_do_not_train_the_same(unbroken: TrainOrder, tmp_path: Path) -> None:
    from filelock import FileLock

    order = trainings.elsewhere(unbroken, tmp_path)
    Path(order.folder).mkdir(parents=True)
    code = "import modules.worker.train as t; t._LOCK_S = 0.2; raise SystemExit(t.main())"
    with FileLock(Path(order.folder) / runs.LOCK):
        said = run(order, command=("-c", code))
    assert isinstance(said[-1], Failed)
    assert said[-1].error.kind == "busy"


def test_a_training_goes_on_with_the_base_model_that_it_began_with_alone(tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(checkpoints.llama(), model)
    order = trainings.order(model, trainings.pairs(tmp_path), tmp_path, **OPTIONS)
    weights, folder = model / "model.safetensors", Path(order.folder)
    folder.mkdir()
    check_base(order)
    changed, first = weights.stat().st_mtime_ns + 10**9, weights.stat().st_mtime_ns
    os.utime(weights, ns=(changed, changed))
    check_base(order)  # there is no checkpoint yet: it begins anew
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / runs.STATE).write_text("{}")
    check_base(order)
    os.utime(weights, ns=(first, first))
    with pytest.raises(NotTrainable, match=r"base has changed since .* lesson began: model\.safetensors\.") as error:
        check_base(order)
    assert "start it anew" in error.value.hint
    said = run(order)
    assert isinstance(said[-1], Failed)
    assert said[-1].error.kind == "not_trainable"
    os.utime(weights, ns=(changed, changed))
    check_base(order)


def test_a_base_model_in_one_file_is_known_again(tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF")
    order = trainings.order(file, trainings.pairs(tmp_path), tmp_path, {"file_format": "gguf"}, **OPTIONS)
    (Path(order.folder) / "checkpoint-3").mkdir(parents=True)
    (Path(order.folder) / "checkpoint-3" / runs.STATE).write_text("{}")
    check_base(order)
    check_base(order)
    file.write_bytes(b"GGUF and more")
    with pytest.raises(NotTrainable, match=r"base\.gguf"):
        check_base(order)


def test_nonsense_is_answered_with_usage() -> None:
    done = subprocess.run([sys.executable, *COMMAND], input=b"{}\n", cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
