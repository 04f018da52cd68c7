"""What a person types."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import ROOT, Server
from tests.e2e.test_load_from_the_browser import NAME
from tests.machine import QUICK_FLAGS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "server.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_prompt_prints_the_answer_alone_on_stdout(home: Path) -> None:
    done = run("--home", str(home), "--no-hf-cache", "--model", NAME, "--load-in-4bit", "--temperature", "0",
               "--prompt", "What is the capital of France?", "--max-new-tokens", "20")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" not in done.stdout
    assert "tokens/s" in done.stderr


def test_raw_prompt_continues_the_text(home: Path) -> None:
    done = run("--home", str(home), "--model", NAME, *QUICK_FLAGS, "--temperature", "0", "--raw-prompt",
               "--prompt", "One, two, three, four,", "--max-new-tokens", "6")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "five" in done.stdout


def test_help_is_quick_and_lists_every_spelling() -> None:
    begun = time.monotonic()
    done = run("--help")
    assert done.returncode == 0
    assert "--load-in-4bit" in done.stdout
    assert "--alpha_value" in done.stdout
    assert time.monotonic() - begun < 5  # that it needs neither Gradio nor torch; the benchmark has the figure


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lod-in-4bit"], "--load-in-4bit"),
        (["--alpha_value", "0.5"], "at least 1"),
        (["--quant_type", "nf3"], "nf4"),
        (["--prompt", "hello"], "--model"),
        (["--model", "no-such-model", "--prompt", "hello"], "no-such-model"),
        (["--model", NAME, "--load-in-4bit", "--load-in-8bit", "--prompt", "x"], "exclude each other"),
        (["--model", NAME, "--gpu-memory", "10", "6", "--prompt", "x"], "GPU"),
        (["--model", NAME, "--cpu", "--gpu-memory", "10", "--prompt", "x"], "exclude each other"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_status_2(home: Path, arguments: list[str], words: str) -> None:
    done = run("--home", str(home), "--no-hf-cache", *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [("load_in_4bits: true\n", "load_in_4bit"), ("ctx_size: large\n", "ctx"), ("a: [\n", "settings.yaml")],
)
def test_a_bad_settings_file_is_named(home: Path, text: str, words: str) -> None:
    (home / "settings.yaml").write_text(text)
    done = run("--home", str(home), "--model", NAME, "--prompt", "x")
    assert done.returncode == 2
    assert words in done.stderr
    assert "settings.yaml" in done.stderr


def test_a_port_in_use_is_said(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--home", str(home), "--listen-port", str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "--listen-port" in done.stderr


def test_check_tells_what_works(home: Path) -> None:
    done = run("--home", str(home), "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitsandbytes 4-bit works" in done.stdout
    assert "torch" in done.stdout


def test_a_model_that_cannot_load_still_opens_the_page(
    launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    server = launch("--no-warm-worker", "--model", "no-such-model")
    expect(open_page(server).locator("#card")).to_contain_text("no-such-model")


def test_a_model_named_by_its_path_is_one_of_the_models(launch: Callable[..., Server], demo_model: Path) -> None:
    server = launch("--no-warm-worker", "--model", str(demo_model), "--bf16")
    name = f"{NAME} ({demo_model.parent.name})"  # models/ has one of the same name
    assert server.wait_state("ready")["model_name"] == name
    assert server.call("/v1/internal/model/list")[1] == {"model_names": [NAME, name]}
    status, info = server.load(name, ctx_size=1024)
    assert (status, info["options"]["bf16"], info["context_tokens"]) == (200, True, 1024)


def test_settings_yaml_gives_defaults_and_flags_win(home: Path) -> None:
    (home / "settings.yaml").write_text("load_in_8bit: true\nmax_new_tokens: 3\ntemperature: 0\n")
    done = run("--home", str(home), "--no-hf-cache", "--model", NAME, "--load-in-4bit", "--prompt", "Hello")
    assert done.returncode == 0, done.stderr
    assert "3 tokens" in done.stderr
