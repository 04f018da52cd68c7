"""What ``server.py`` does without a page, as it is typed: what is printed where, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints, lora_files, loras
from tests.conftest import ROOT


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "server.py", "--home", str(home), "--no-hf-cache", "--no-warm-worker", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


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
