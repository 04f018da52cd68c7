"""A model and LoRAs as one new checkpoint, made by the real process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modules.errors import AdapterError, DiskFull, LoadstoneError, OptionError, WrongResult
from modules.protocol import AdapterChoice, Failed, Merged, MergeOrder, Progress, decode, encode
from modules.worker import merge as merging
from tests import checkpoints, loras
from tests.conftest import ROOT, wait_until
from tests.worker.adapted import load


def order_for(source: Path, out: Path, *adapters: AdapterChoice, **changes: Any) -> MergeOrder:
    return replace(MergeOrder(source.name, str(source), "safetensors", "causal", adapters, str(out)), **changes)


@contextmanager
def started(order: MergeOrder) -> Iterator[subprocess.Popen[bytes]]:
    """The process, given its order; its stdin stays open."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modules.worker.merge"],
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


def run(order: MergeOrder) -> tuple[list[Progress], Any, int]:
    """What the process says, its last message, and its exit status."""
    with started(order) as process:
        assert process.stdout is not None
        *progress, last = [decode(line) for line in process.stdout]
        return progress, last, process.wait(30)


def refused(order: MergeOrder) -> LoadstoneError:
    with pytest.raises(LoadstoneError) as error:
        merging.merge(order, lambda _: None)
    assert not Path(order.out).exists() or "there already" in error.value.message
    return error.value


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_two_loras_become_part_of_the_real_model(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "merged"
    pair = (loras.choice(loras.herring()), loras.choice(loras.lantern(), 0.1))
    progress, last, status = run(order_for(demo_model, out, *pair, max_shard_size="100MB"))
    assert (type(last), status) == (Merged, 0), last
    assert (last.path, last.tokens >= 29) == (str(out), True)
    stages = list(dict.fromkeys(message.stage for message in progress))
    assert {"merging", "writing the merged model", "checking"} <= set(stages)
    assert any(0 < message.done < message.total for message in progress if message.stage == "merging")
    assert names(out.parent) == ["merged"]
    assert len(list(out.glob("*.safetensors"))) > 1
    assert (out / "tokenizer.json").read_bytes() == (demo_model / "tokenizer.json").read_bytes()
    one = load(out, tmp_path / "work", bf16=True)
    assert one.text().startswith("The herring barrels")
    assert one.model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tied() -> Path:
    """A small Llama whose embedding is its output layer too."""

    def build(folder: Path) -> None:
        shutil.copytree(checkpoints.llama(), folder, dirs_exist_ok=True)
        (folder / "model.safetensors").unlink()
        config = checkpoints.llama_config(tie_word_embeddings=True)
        checkpoints.new_model(AutoModelForCausalLM, config).save_pretrained(folder)

    return checkpoints.kept("llama-tied-1", build)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5, 7], "target_modules": ["q_proj"]},
        {"use_dora": True, "use_rslora": True},
        {"kind": "LoHaConfig"},
    ],
    ids=str,
)
def test_what_the_pair_computes_the_merged_model_does(tied: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    out = tmp_path / "merged"
    choice = loras.choice(loras.untrained(tmp_path / "lora", tied, **config))
    done = merging.merge(order_for(tied, out, choice), lambda _: None)
    assert done.size_bytes > 0
    pair = load(tied, tmp_path / "work")
    pair.adapters.apply((choice,))
    base, expected = load(tied, tmp_path / "work").logits(), pair.logits()
    merged = load(out, tmp_path / "work").logits()
    assert (merged - expected).abs().max() < 0.05 * (expected - base).abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_refused(bits: int, tmp_path: Path) -> None:
    choice = loras.choice(loras.untrained(tmp_path / "lora", checkpoints.llama()))
    error = refused(order_for(checkpoints.bitsandbytes(bits), tmp_path / "out", choice))
    assert isinstance(error, AdapterError)
    assert "quantized" in error.message


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tied: Path, tmp_path: Path) -> None:
    choice = loras.choice(loras.untrained(tmp_path / "lora", tied))
    there = tmp_path / "there"
    there.mkdir()
    assert isinstance(refused(order_for(tied, there, choice)), OptionError)
    assert "no LoRA" in refused(order_for(tied, tmp_path / "out", replace(choice, weight=0.0))).message
    assert isinstance(refused(order_for(tied, tmp_path / "out", replace(choice, path="/nowhere/x"))), AdapterError)
    assert names(tmp_path) == ["lora", "there"]


def test_too_small_a_disk_is_told_before(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = loras.choice(loras.untrained(tmp_path / "lora", tied))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert isinstance(refused(order_for(tied, tmp_path / "out", choice)), DiskFull)


def test_a_merged_model_that_answers_otherwise_is_not_kept(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = loras.choice(loras.untrained(tmp_path / "lora", tied, lora_alpha=400))
    monkeypatch.setattr(merging, "_merged", lambda model, name, layer: layer.get_base_layer())  # forgets to merge
    assert isinstance(refused(order_for(tied, tmp_path / "out", choice)), WrongResult)
    assert names(tmp_path) == ["lora"]


@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_a_merge_that_is_cancelled_leaves_no_model(demo_model: Path, tmp_path: Path, how: str) -> None:
    order = order_for(demo_model, tmp_path / "merged", loras.choice(loras.herring()))
    aside = tmp_path / ".merged.partial"
    with started(order) as process:
        assert process.stdin is not None
        wait_until(lambda: aside.exists() or process.poll() is not None, 120)
        if how == "stdin":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[how])
        assert process.wait(30) != 0
    assert not (tmp_path / "merged").exists()
    if how == "SIGTERM":
        assert names(tmp_path) == []


def test_what_a_killed_merge_left_goes_with_the_next(tied: Path, tmp_path: Path) -> None:
    left = tmp_path / "models" / ".merged.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    choice = loras.choice(loras.untrained(tmp_path / "lora", tied))
    merging.merge(order_for(tied, tmp_path / "models" / "merged", choice), lambda _: None)
    assert names(tmp_path / "models") == ["merged"]


def test_a_failure_is_told_as_an_error_and_nonsense_as_usage(tied: Path, tmp_path: Path) -> None:
    _, last, status = run(order_for(tied, tmp_path / "out", AdapterChoice("gone", "/nowhere/gone")))
    assert (type(last), status) == (Failed, 1)
    assert last.error.kind == "adapter_not_found"
    done = subprocess.run(
        [sys.executable, "-m", "modules.worker.merge"], input=b"{}\n", cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
