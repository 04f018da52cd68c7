"""What ``server.py`` does without a page, as it is typed: what is printed where, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modules.training import runs
from tests import checkpoints, lora_files, loras, trainings
from tests.conftest import ROOT, wait_until

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(home: Path, *words: str) -> list[str]:
    return [sys.executable, "server.py", "--home", str(home), "--no-hf-cache", "--no-warm-worker", *words]


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = command(home, *words)
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("command", [["--prompt", "hi"], ["--plan"]])
def test_a_flag_that_a_model_named_by_its_path_cannot_follow_is_refused(tmp_path: Path, command: list[str]) -> None:
    done = run(tmp_path, "--model", str(checkpoints.bitsandbytes(4)), "--load-in-4bit", *command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "already quantized (bitsandbytes)" in done.stderr
    assert "Leave --load-in-4bit out for this model." in done.stderr


@pytest.mark.parametrize("command", [["--prompt", "hi"], ["--plan"]])
@pytest.mark.parametrize("name", ["no-such-model", "./no/such/path"])
def test_a_model_that_is_not_there_is_refused(tmp_path: Path, name: str, command: list[str]) -> None:
    done = run(tmp_path, "--model", name, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_prompt_is_refused_and_nothing_is_served(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", str(demo_model), "--prompt", "")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "loadstone: --prompt has no text. Give the text to answer in quotation marks."


def test_a_plan_for_a_model_named_by_its_path(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", os.path.relpath(demo_model, ROOT), "--plan", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == demo_model.name


def test_a_prompt_tells_on_stderr_what_had_no_effect(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", str(demo_model), "--bf16", "--disable_exllama", "--temperature", "0",
               "--max-new-tokens", "12", "--prompt", "What is the capital of France?")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "note:" not in done.stdout
    assert "note: --disable_exllama has no effect here." in done.stderr


def test_a_prompt_is_answered_with_loras_of_another_folder(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "herring").symlink_to(loras.herring(), target_is_directory=True)
    done = run(tmp_path, "--model", str(demo_model), "--bf16", "--temperature", "0", "--max-new-tokens", "12",
               "--lora-dir", str(tmp_path / "more"), "--lora", "herring:0.9", "--prompt", loras.QUESTION)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "herring barrels" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--merge", "new"], "no LoRA is chosen"),
        (["--merge", "new", "--lora", "nothing"], "There is no LoRA 'nothing'"),
        (["--merge", "../new", "--lora", "little"], "cannot be the name of a model"),
        (["--merge", "new", "--lora", "little", "--max-shard-size", "huge"], "'huge' is no size"),
        (["--prompt", "x", "--lora", "wide"], "wide does not fit"),
    ],
)
def test_loras_that_cannot_be_used_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    lora_files.write(tmp_path / "loras" / "little", {"model.layers.*.mlp.down_proj": (128, 256)})
    lora_files.write(tmp_path / "loras" / "wide", {"model.layers.*.mlp.down_proj": (999, 256)})
    done = run(tmp_path, "--model", str(checkpoints.llama()), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_merged_model_is_written_with_progress_on_stderr(tmp_path: Path) -> None:
    lora_files.write(tmp_path / "loras" / "little", {"model.layers.*.mlp.down_proj": (128, 256)})
    done = run(tmp_path, "--model", str(checkpoints.llama()), "--lora", "little:0.5", "--merge", "grown",
               "--max-shard-size", "1MB")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "models" / "grown")
    assert sorted(path.name for path in (tmp_path / "models").iterdir() if path.name[0] != ".") == ["grown"]
    assert (tmp_path / "models" / "grown" / "model.safetensors").is_file()
    stages = done.stderr.splitlines()
    assert stages.index("loading the model") < stages.index("merging") < stages.index("checking")
    assert run(tmp_path, "--model", "grown", "--plan").returncode == 0


def training_file(home: Path, **changes: object) -> Path:
    """A training of the small Llama, in enough steps to be interrupted."""
    trainings.pairs(home)
    values = {"data": "pairs.jsonl", "model": str(checkpoints.llama()), "rank": 4, "dropout": 0.1, "batch_size": 2,
              "max_steps": 60, "checkpoint_steps": 5, "evaluation_share": 0, "cutoff": 128, **changes}  # fmt: skip
    file = home / "lesson.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return file


@contextmanager
def serving(home: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, under way; it is ended afterwards. Ctrl-C reaches it from a shell's background too."""
    server = subprocess.Popen(
        command(home, *words), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def test_a_training_goes_on_after_the_server_was_killed_to_the_same_lora(tmp_path: Path) -> None:
    (broken := tmp_path / "broken").mkdir()
    (whole := tmp_path / "whole").mkdir()
    done = run(whole, "--train", str(training_file(whole)))
    assert done.returncode == 0, done.stderr
    out = whole / "loras" / "lesson"
    assert done.stdout.strip() == str(out)
    assert "60/60" in done.stderr
    assert "60 steps, " in done.stderr

    words = ("--train", str(training_file(broken)))
    checkpoints_of = broken / "models" / ".cache" / "training" / "lesson"
    with serving(broken, *words) as server:
        wait_until(lambda: server.poll() is not None or any(checkpoints_of.glob("checkpoint-*")), 120)
        server.send_signal(signal.SIGKILL)
    assert not (broken / "loras" / "lesson").exists(), "killed too late"

    other = run(broken, "--train", str(training_file(broken, rank=8)))
    assert other.returncode == 2
    assert "begun with other options" in other.stderr
    ((killed_at, _),) = runs.checkpoints(checkpoints_of)
    training_file(broken)
    with serving(broken, *words) as server:
        wait_until(lambda: server.poll() is not None or runs.checkpoints(checkpoints_of)[-1][0] > killed_at, 120)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130, "paused"
    again = run(broken, *words)
    assert again.returncode == 0, again.stderr
    assert "Going on with lesson from step" in again.stderr
    mine, theirs = (load_file(home / "loras" / "lesson" / "adapter_model.safetensors") for home in (broken, whole))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "--train needs a model"),
        ({"data": "gone.jsonl"}, "no file gone.jsonl"),
        ({"data": "bad.jsonl"}, "Line 2: "),
        ({"name": "taken"}, "There is a LoRA taken already"),
        ({"rank": "many"}, "line 3"),
        ({"renk": 4}, "rank"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"target_modules": ["nope"]}, "no module 'nope'"),
    ],
    ids=str,
)
def test_a_training_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    lora_files.write(tmp_path / "loras" / "taken", {"model.layers.*.mlp.down_proj": (128, 256)})
    done = run(tmp_path, "--train", str(training_file(tmp_path, **changes)))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_training_without_its_file_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--train", "nothing.yaml")
    assert done.returncode == 2
    assert "There is no file nothing.yaml." in done.stderr
