"""What ``server.py`` does without a page, as it is typed: what is printed where, and the exit status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modules import devices
from modules.training import runs
from modules.units import format_bytes
from tests import checkpoints, lora_files, loras, planner_checkpoints, trainings
from tests.conftest import ROOT, wait_until

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(home: Path, *words: str) -> list[str]:
    return [sys.executable, "server.py", "--home", str(home), "--no-hf-cache", "--no-warm-worker", *words]


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = command(home, *words)
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("command", [["--prompt", "hi"], ["--plan"]])
def test_a_quantization_that_no_loader_takes_is_refused(tmp_path: Path, command: list[str]) -> None:
    done = run(tmp_path, "--model", str(planner_checkpoints.quantized_by("exl2", tmp_path / "packed")), *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "packed is quantized as EXL2, which no loader here takes." in done.stderr
    assert "exllamav2" in done.stderr


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


def test_a_plan_says_the_most_that_is_held_and_when(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", str(demo_model), "--plan", "--ctx-size", "256", "--load-in-4bit")
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("at most")]
    assert line.endswith(" while it is loaded")
    full = run(tmp_path, "--model", str(demo_model), "--plan", "--batch-tokens", "131072")
    assert " with a full context" in full.stdout


def test_a_plan_says_what_is_free(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", str(demo_model), "--plan")
    [line] = re.findall(r"^RAM +(\S+ \S+) of (\S+ \S+) free$", done.stdout, re.MULTILINE)
    assert line[1] == format_bytes(devices.measure(tmp_path).ram_total_bytes)
    assert re.search(r"^disk +\S+ \S+ free$", done.stdout, re.MULTILINE)


def test_a_prompt_tells_on_stderr_what_had_no_effect(tmp_path: Path, demo_model: Path) -> None:
    done = run(tmp_path, "--model", str(demo_model), "--bf16", "--disable_exllama", "--temperature", "0",
               "--max-new-tokens", "12", "--prompt", "What is the capital of France?")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "note:" not in done.stdout
    assert "note: --disable_exllama has no effect here." in done.stderr


def test_a_prompt_says_what_was_cut_and_shows_progress_on_a_terminal_alone(tmp_path: Path) -> None:
    words = command(tmp_path, "--model", str(checkpoints.gpt2()), "--max-new-tokens", "4", "--prompt", "word " * 300)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = b""
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        with suppress(OSError):  # the end, on Linux
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert b"gpt2-1: " in shown
    assert b"note: of the front, " in shown
    quiet = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=True)
    assert "gpt2-1: " not in quiet.stderr


def damaged(home: Path) -> Path:
    """A model that only the worker finds to lack tensors."""
    folder = checkpoints.copied(checkpoints.gpt2(), home / "damaged")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "h.1" not in name}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def test_the_details_of_an_error_are_for_verbose(tmp_path: Path) -> None:
    words = ("--model", str(damaged(tmp_path)), "--prompt", "hi")
    brief, full = run(tmp_path, *words), run(tmp_path, *words, "--verbose")
    assert (brief.returncode, full.returncode) == (2, 2)
    assert brief.stderr.splitlines()[-1] == "--verbose shows the details."
    assert "newly initialized" not in brief.stderr
    assert "newly initialized" in full.stderr


@pytest.mark.parametrize(("make", "said"), [(damaged, "was not loaded: The files of damaged lack"), (None, "is ready")])
def test_a_server_says_how_the_load_of_its_model_ended(
    tmp_path: Path, make: Callable[[Path], Path] | None, said: str
) -> None:
    folder = make(tmp_path) if make else checkpoints.gpt2()
    log = tmp_path / "log"
    words = command(tmp_path, "--model", str(folder), "--listen-port", "0")
    with log.open("w") as stderr:
        server = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until(lambda: f"{folder.name} {said}" in log.read_text(), 120)
    finally:
        server.terminate()
        server.wait()


def test_a_settings_file_that_is_named_and_not_there_ends_the_start(tmp_path: Path, demo_model: Path) -> None:
    words = ["--model", str(demo_model), "--plan"]
    missing = tmp_path / "secure.yaml"
    done = run(tmp_path, *words, "--settings", str(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--settings names {missing}, which is not there." in done.stderr
    assert run(tmp_path, *words).returncode == 0  # the usual one may be missing
    missing.write_text("ctx_size: 1024\n")
    assert run(tmp_path, *words, "--settings", str(missing)).returncode == 0


def test_folders_that_are_not_there_are_told_and_nothing_else_changes(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "settings.yaml").write_text(f"lora_dir: {tmp_path / 'my drive'}\n")
    done = run(tmp_path, "--model", str(demo_model), "--plan", "--model-dir", str(tmp_path / "gone"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"--model-dir names {tmp_path / 'gone'}, which is no folder here now." in done.stderr
    assert f"--lora-dir names {tmp_path / 'my drive'}, which is no folder here now." in done.stderr
    assert done.stderr.count("which is no folder") == 2


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
