"""Kinds of adapters and architectures, on small models: each computes what peft alone does, and comes off whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from modules.errors import AdapterError
from modules.protocol import AdapterChoice
from modules.worker.adapters import adapters, files
from tests import checkpoints, loras
from tests.worker.adapted import Adapted, load, logits

Checkpoint = Callable[[], Path]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[Checkpoint, dict[str, Any]]] = {
    "lora": (checkpoints.llama, {"target_modules": ALL_LINEAR}),
    "rslora": (checkpoints.llama, {"use_rslora": True, "lora_alpha": 3}),
    "dora": (checkpoints.llama, {"use_dora": True}),
    "ranks-by-module": (checkpoints.llama, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "one-layer": (checkpoints.llama, {"layers_to_transform": [1]}),
    "dropout": (checkpoints.llama, {"lora_dropout": 0.5}),
    "embedding-and-head": (checkpoints.llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole-modules": (checkpoints.llama, {"modules_to_save": ["lm_head"]}),
    "loha": (checkpoints.llama, {"kind": "LoHaConfig"}),
    "lokr": (checkpoints.llama, {"kind": "LoKrConfig"}),
    "gpt2-conv1d": (checkpoints.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": (checkpoints.t5, {"task": "seq2seq", "target_modules": ["q", "v", "wo"]}),
}


def loaded(checkpoint: Checkpoint, work: Path, **facts: Any) -> Adapted:
    return load(checkpoint(), work, **facts)


def by_peft(one: Adapted, checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
    """What peft's own model of the same checkpoint computes."""
    auto_class = AutoModelForCausalLM if one.task == "causal" else AutoModelForSeq2SeqLM
    base = auto_class.from_pretrained(checkpoint(), dtype=one.model.dtype)
    return logits(PeftModel.from_pretrained(base, folder), one.ids, one.task)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_computes_what_peft_does_and_comes_off_whole(name: str, tmp_path: Path) -> None:
    checkpoint, config = KINDS[name]
    task = config.get("task", "causal")
    one = loaded(checkpoint, tmp_path, task=task, bf16=True)
    base = one.logits()
    folder = loras.untrained(tmp_path / name, checkpoint(), **config)
    report = one.adapters.apply((loras.choice(folder),))
    assert report.moved_nats is not None
    assert report.moved_nats > 0
    assert torch.equal(one.logits(), by_peft(one, checkpoint, folder))
    assert not torch.equal(one.logits(), base)
    one.adapters.apply(())
    assert torch.equal(one.logits(), base)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_quantized_models_take_loras_too(bits: int, tmp_path: Path) -> None:
    path = checkpoints.bitsandbytes(bits)
    one = load(path, tmp_path, quantization="bitsandbytes")
    base = one.logits()
    one.adapters.apply((loras.choice(loras.untrained(tmp_path / "lora", checkpoints.llama())),))
    assert not torch.equal(one.logits(), base)
    one.adapters.apply(())
    assert torch.equal(one.logits(), base)


def test_a_dora_is_refused_where_4_bit_weights_cannot_be_read(tmp_path: Path) -> None:
    one = load(checkpoints.llama(), tmp_path, load_in_4bit=True)
    one.logits()
    layer = one.model.model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU keeps 4-bit weights as they are")
    folder = loras.untrained(tmp_path / "dora", checkpoints.llama(), use_dora=True)
    with one.unchanged(), pytest.raises(AdapterError, match="DoRA"):
        one.adapters.apply((loras.choice(folder),))


def test_weights_are_linear_in_what_the_lora_adds(tmp_path: Path) -> None:
    """On the output layer, since whatever stands above a LoRA bends what it adds."""
    one = load(checkpoints.llama(), tmp_path)
    base = one.logits()
    one_lora = loras.untrained(tmp_path / "one", checkpoints.llama(), target_modules=["lm_head"], r=4)
    another = loras.untrained(tmp_path / "another", checkpoints.llama(), target_modules=["lm_head"], r=8, seed=1)

    def added(*weights: float) -> torch.Tensor:
        choices = tuple(map(loras.choice, (one_lora, another), weights))
        one.adapters.apply(choices)
        return one.logits() - base

    first, second = added(1, 0), added(0, 1)
    assert first.abs().max() > 0.01
    for weight in (-2.0, -0.3, 0.5, 2.0):
        torch.testing.assert_close(added(weight, 0), weight * first, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(added(0.7, -1.5), 0.7 * first - 1.5 * second, atol=2e-5, rtol=1e-3)


def test_what_cannot_be_scaled_or_mixed_is_refused(tmp_path: Path) -> None:
    one = load(checkpoints.llama(), tmp_path)
    base = checkpoints.llama()
    whole, other = (
        loras.choice(loras.untrained(tmp_path / name, base, modules_to_save=["lm_head"], seed=seed))
        for seed, name in enumerate(("whole", "other"))
    )
    loha = loras.choice(loras.untrained(tmp_path / "loha", base, "LoHaConfig"))
    plain = loras.choice(loras.untrained(tmp_path / "plain", base))
    one.adapters.apply((plain,))
    for choices, words in (
        ((loras.choice(tmp_path / "whole", 0.5),), "no weight can scale"),
        ((whole, other), "both replace lm_head"),
        ((plain, loha), "cannot act together"),
        ((plain, plain), "twice"),
        ((loras.choice(tmp_path / "plain", 2.5),), "2.5"),
    ):
        with one.unchanged(), pytest.raises(AdapterError, match=words):
            one.adapters.apply(choices)
    one.adapters.apply((plain, whole))
    one.adapters.apply((loha,))
    assert one.adapters.active == (loha,)


def test_a_lora_with_tokens_of_its_own_leaves_others_alone(tmp_path: Path) -> None:
    one, base = load(checkpoints.llama(), tmp_path), checkpoints.llama()
    plain = loras.choice(loras.untrained(tmp_path / "plain", base))
    third = loras.choice(loras.untrained(tmp_path / "third", base, seed=3))
    folder = loras.untrained(tmp_path / "tokens", base, seed=1, trainable_token_indices=[5, 17, 3])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: (-tensor if "token" in name else tensor) for name, tensor in tensors.items()}, file)
    tokens = loras.choice(folder)
    one.adapters.apply((plain,))
    alone = one.logits()
    one.adapters.apply((tokens,))
    assert torch.equal(one.logits(), by_peft(one, checkpoints.llama, folder))
    one.adapters.apply((plain,))
    assert torch.equal(one.logits(), alone)
    one.adapters.apply((plain, third, tokens))
    assert not torch.equal(one.logits(), alone)
    with one.unchanged(), one.adapters.using((plain, third)):
        assert one.text()
    with one.unchanged(), pytest.raises(AdapterError, match="embed_tokens, which no weight can scale"):
        one.adapters.apply((loras.choice(folder, 0.5), plain))
    other = loras.choice(loras.untrained(tmp_path / "other", base, seed=2, trainable_token_indices=[9]))
    with one.unchanged(), pytest.raises(AdapterError, match="both replace embed_tokens"):
        one.adapters.apply((tokens, other))
    one.adapters.apply((plain,))
    assert torch.equal(one.logits(), alone)


def test_idle_loras_go_one_with_tokens_of_its_own_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, base = load(checkpoints.llama(), tmp_path), checkpoints.llama()
    plain, third = (loras.choice(loras.untrained(tmp_path / f"{seed}", base, seed=seed)) for seed in (0, 1))
    tokens = loras.choice(loras.untrained(tmp_path / "tokens", base, seed=2, trainable_token_indices=[5, 17]))
    one.adapters.apply((plain, third, tokens))
    expected = one.logits()
    monkeypatch.setattr(adapters, "KEPT_BYTES", 0)
    one.adapters.apply((plain, third))
    one.adapters.apply((plain, third, tokens))
    assert torch.equal(one.logits(), expected)


def test_a_lora_too_large_to_be_kept_is_read_once_for_an_answer_in_many_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, base = load(checkpoints.llama(), tmp_path), checkpoints.llama()
    large, other = (loras.choice(loras.untrained(tmp_path / f"{seed}", base, seed=seed)) for seed in (0, 1))
    reads: list[str] = []

    def read(choice: AdapterChoice) -> files.AdapterFiles:
        reads.append(choice.name)
        return files_read(choice)

    files_read = files.read
    monkeypatch.setattr(files, "read", read)
    monkeypatch.setattr(adapters, "KEPT_BYTES", 0)
    for _ in range(3):  # others have their turns in between
        for choices in ((large,), (), None):
            with one.adapters.using(choices):
                one.logits()
    assert reads == ["0"]
    for choices in ((other,), (large,)):  # no two of them are kept
        with one.adapters.using(choices):
            one.logits()
    assert reads == ["0", "1", "0"]
    one.adapters.apply(())  # whoever takes the LoRAs off gets the memory back
    with one.adapters.using((large,)):
        one.logits()
    assert reads == ["0", "1", "0", "0"]


def test_a_lora_that_does_nothing_is_told_of(tmp_path: Path) -> None:
    one = load(checkpoints.llama(), tmp_path)
    folder = loras.untrained(tmp_path / "new", checkpoints.llama(), init_lora_weights=True)
    report = one.adapters.apply((loras.choice(folder),))
    assert report.moved_nats == 0
    assert "No effect: with new" in report.notes[0]
