"""Settings of text-generation-webui, taken over for models that have none here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.options import LOAD_OPTIONS
from modules.settings import Settings, resolve

NAME = "SmolLM2-135M-Instruct"


OLD = """
SmolLM2-135M-Instruct$:
  loader: Transformers
  load_in_4bit: true
  gpu_memory_0: 10240
  gpu_memory_1: 512
  gpu_memory_10: 1024
  gpu_memory_2: 0
  cpu_memory: 24576
  alpha_value: 2.5
  rope_freq_base: 0
  compress_pos_emb: 1
  max_seq_len: 4096
  compute_dtype: bfloat16
  quant_type: fp4
  use_double_quant: true
  no_use_fast: true
  use_flash_attention_2: true
  disable_exllama: false
  trust_remote_code: true
  wbits: None
  n_gpu_layers: 35
  instruction_template: ChatML
.*smol.*:
  disk: true
org_name$:
  cpu: true
  bf16: true
  quant_type: nf4
  compute_dtype: float16
  n_ctx: 2048
  truncation_length: 2048
plain$:
  load_in_8bit: false
  cpu_memory: 12
"[bad$":
  bf16: true
odd$: 3
"""


@pytest.fixture
def store(tmp_path: Path) -> Settings:
    (tmp_path / "config-user.yaml").write_text(OLD, encoding="utf-8")
    return Settings(tmp_path / "settings.yaml", tmp_path)


def test_what_is_understood(store: Settings) -> None:
    plan = store.importable([NAME, "org/name", "plain", "[bad", "odd", "unknown"])
    assert plan.values == {
        NAME: {
            "load_in_4bit": True, "gpu_memory": (10.0, 0.5, 0.0, 1.0), "cpu_memory": 24.0, "alpha_value": 2.5,
            "ctx_size": 4096, "compute_dtype": "bfloat16", "quant_type": "fp4", "use_double_quant": True,
            "use_fast": False, "attn_implementation": "flash_attention_2", "disk": True,
        },
        "org/name": {"cpu": True, "bf16": True, "ctx_size": 2048},
        "plain": {"cpu_memory": 12.0},
        "[bad": {"bf16": True},
    }  # fmt: skip


def test_what_is_not_understood_is_named(store: Settings) -> None:
    assert set(store.importable([NAME]).left_out) == {
        f"{NAME}: trust_remote_code", f"{NAME}: n_gpu_layers", f"{NAME}: instruction_template",
    }  # fmt: skip


def test_importing_saves_and_overwrites_nothing(store: Settings) -> None:
    plan = store.importable([NAME, "org/name"])
    mine = store.save("org/name", {"alpha_value": 1.75})
    store.import_legacy(plan)
    assert store.saved(NAME) == (plan.values[NAME], "")
    assert store.saved("org/name") == ({"alpha_value": 1.75}, "")
    assert mine.exists()
    assert store.importable([NAME, "org/name"]).values == {}


def test_no_file(tmp_path: Path) -> None:
    plan = Settings(tmp_path / "settings.yaml", tmp_path).importable([NAME])
    assert (plan.values, plan.left_out) == ({}, ())


@pytest.mark.parametrize("text", ["a: [", "\x00", "[" * 5000])
def test_a_broken_file_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "config-user.yaml").write_text(text, encoding="utf-8")
    plan = Settings(tmp_path / "settings.yaml", tmp_path).importable([NAME])
    assert plan.values == {}
    assert plan.left_out == ("config-user.yaml cannot be read.",)


@given(
    entry=st.dictionaries(
        st.sampled_from([*LOAD_OPTIONS, "gpu_memory_0", "gpu_memory_x", "n_ctx", "no_use_fast", "wbits"])
        | st.integers(),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=4)
        | st.lists(st.integers(), max_size=2),
        max_size=5,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entry_gives_valid_settings(tmp_path: Path, entry: dict[Any, Any]) -> None:
    (tmp_path / "config-user.yaml").write_text(yaml.safe_dump({f"{NAME}$": entry}), encoding="utf-8")
    store = Settings(tmp_path / "settings.yaml", tmp_path)
    store.forget(NAME)
    plan = store.importable([NAME])
    store.import_legacy(plan)
    assert store.saved(NAME) == (plan.values.get(NAME, {}), "")
    resolve([("saved", store.saved(NAME)[0])])
