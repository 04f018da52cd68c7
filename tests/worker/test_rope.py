"""The RoPE options: the formulas on parameters, and the frequencies of real models after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import OptionConflict, WrongResult
from modules.options import LoadOptions
from modules.protocol import Progress
from modules.worker import rope, transformers_loader, verification
from tests import checkpoints


def silent(_: Progress) -> None:
    """A progress listener that keeps nothing."""


def frequencies(theta: float, d: int, factor: float = 1.0) -> torch.Tensor:
    """1/(theta^(2i/d)·factor), written down once more so that the test does not ask the code under test."""
    return 1.0 / (theta ** (torch.arange(0, d, 2).float() / d)) / factor


def loaded(path: Path, work: Path, **options: Any) -> Any:
    return transformers_loader.load(checkpoints.order_for(path, work, **options), silent)


def test_alpha_scales_theta_by_the_ntk_formula(demo_model: Path, tmp_path: Path) -> None:
    result = loaded(demo_model, tmp_path, alpha_value=2.5, bf16=True)
    theta = 100_000.0 * 2.5 ** (64 / 62)
    torch.testing.assert_close(result.model.model.rotary_emb.inv_freq, frequencies(theta, 64))
    assert result.report.context_limit == 2 * 8192


def test_rope_freq_base_is_theta(tmp_path: Path) -> None:
    result = loaded(checkpoints.llama(), tmp_path, rope_freq_base=500_000.0)
    torch.testing.assert_close(result.model.model.rotary_emb.inv_freq, frequencies(500_000.0, 32))


def test_compression_divides_the_frequencies(tmp_path: Path) -> None:
    result = loaded(checkpoints.llama(), tmp_path, compress_pos_emb=4.0)
    torch.testing.assert_close(result.model.model.rotary_emb.inv_freq, frequencies(10_000.0, 32, factor=4.0))
    assert result.report.context_limit == 4 * 256
    assert result.model.config.max_position_embeddings == 4 * 256


def test_compression_and_base_work_together(tmp_path: Path) -> None:
    result = loaded(checkpoints.llama(), tmp_path, compress_pos_emb=2.0, rope_freq_base=20_000.0)
    torch.testing.assert_close(result.model.model.rotary_emb.inv_freq, frequencies(20_000.0, 32, factor=2.0))


def test_without_the_options_nothing_changes(tmp_path: Path) -> None:
    result = loaded(checkpoints.llama(), tmp_path)
    torch.testing.assert_close(result.model.model.rotary_emb.inv_freq, frequencies(10_000.0, 32))
    assert result.report.context_limit == 256


def test_only_full_attention_layers_are_stretched(tmp_path: Path) -> None:
    rotary = loaded(checkpoints.gemma3(), tmp_path, alpha_value=2.0).model.model.rotary_emb
    theta = 1_000_000.0 * 2.0 ** (32 / 30)
    torch.testing.assert_close(rotary.full_attention_inv_freq, frequencies(theta, 32, factor=8.0))
    torch.testing.assert_close(rotary.sliding_attention_inv_freq, frequencies(10_000.0, 32))


def test_compression_multiplies_a_linear_scaling_of_the_models_own(tmp_path: Path) -> None:
    rotary = loaded(checkpoints.gemma3(), tmp_path, compress_pos_emb=2.0).model.model.rotary_emb
    torch.testing.assert_close(rotary.full_attention_inv_freq, frequencies(1_000_000.0, 32, factor=16.0))
    torch.testing.assert_close(rotary.sliding_attention_inv_freq, frequencies(10_000.0, 32))


@pytest.mark.parametrize("option", [{"alpha_value": 2.0}, {"rope_freq_base": 1e6}, {"compress_pos_emb": 2.0}])
def test_a_model_without_rope_refuses(tmp_path: Path, option: dict[str, float]) -> None:
    with pytest.raises(OptionConflict, match="gpt2 has no rotary position embedding"):
        loaded(checkpoints.gpt2(), tmp_path, **option)


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "longrope", "dynamic"])
def test_compression_refuses_to_destroy_a_scaling(rope_type: str) -> None:
    own = {"rope_type": rope_type, "rope_theta": 500_000.0, "factor": 8.0}
    with pytest.raises(OptionConflict, match=rope_type):
        rope.changed_parameters(own, LoadOptions(compress_pos_emb=2.0), head_dim=lambda _: 64)


def test_alpha_keeps_a_scaling_of_the_models_own() -> None:
    own = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0}
    changed = rope.changed_parameters(own, LoadOptions(alpha_value=2.0), head_dim=lambda _: 64)
    assert changed == own | {"rope_theta": pytest.approx(500_000.0 * 2 ** (64 / 62))}


def test_a_partly_rotated_head_counts_its_rotated_dimensions() -> None:
    own = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    changed = rope.changed_parameters(own, LoadOptions(alpha_value=2.0), head_dim=lambda _: 64)
    assert changed["rope_theta"] == pytest.approx(10_000.0 * 2 ** (16 / 14))
    assert rope.inverse_frequencies(changed, 64) == pytest.approx(frequencies(changed["rope_theta"], 16).tolist())


def test_the_given_configuration_is_left_alone() -> None:
    config = checkpoints.llama_config()
    changed = rope.stretched_config(config, LoadOptions(alpha_value=4.0))
    assert changed.rope_parameters["rope_theta"] > 40_000
    assert config.rope_parameters["rope_theta"] == 10_000
    assert rope.stretched_config(config, LoadOptions()) is config


def test_frequencies_that_do_not_follow_are_noticed(tmp_path: Path) -> None:
    result = loaded(checkpoints.llama(), tmp_path, alpha_value=2.0)
    result.model.model.rotary_emb.inv_freq.mul_(1.01)
    facts = transformers_loader.model_facts(result.order)
    device = transformers_loader.device_facts(result.order)
    kwargs = transformers_loader.load_kwargs(result.order, device, facts).kwargs
    with pytest.raises(WrongResult, match="rotary frequencies"):
        verification.verify(result.model, result.order, device, kwargs)
