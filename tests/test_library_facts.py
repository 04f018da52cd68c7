"""What the library says of models: real checkpoints first, then configurations as they are found in the wild."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.errors import BrokenCheckpoint, LoadstoneError, ModelNotFound, NotAModel, UnsafeCheckpoint
from modules.library import CodeFile, Library, ModelFacts
from modules.library import config as reading
from tests import checkpoints

INDEX = "model.safetensors.index.json"


def facts(path: Path) -> ModelFacts:
    library = Library([])
    return library.facts(library.find(str(path), allow_paths=True))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: checkpoints.copied(source, tmp_path / "model")


def test_the_demo_model(demo_model: Path) -> None:
    found = facts(demo_model)
    assert found.summary() == "LlamaForCausalLM · 135 M · bf16 · 269 MB · 8k context"
    assert (found.model_type, found.task, found.dtype, found.quantization) == ("llama", "causal", "bfloat16", "")
    assert found.parameters == 134_515_008
    assert (found.layers, found.kv_heads, found.head_dim) == (30, 3, 64)
    assert (found.has_rope, found.rope_theta, found.rope_scaling) == (True, 100_000.0, "")
    assert (found.has_fast_tokenizer, found.has_slow_tokenizer, found.has_chat_template) == (True, False, True)
    assert found.tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert found.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert found.code_files == ()


def test_the_same_model_as_gguf(demo_model: Path) -> None:
    found, plain = facts(checkpoints.gguf_file()), facts(demo_model)
    assert found.summary() == "llama · 135 M · Q4_1 · 98 MB · 8k context"
    assert (found.quantization, found.quantization_detail) == ("gguf", "Q4_1")
    for name in ("model_type", "task", "parameters", "context_tokens", "layers", "kv_heads", "head_dim", "has_rope",
                 "rope_theta", "rope_scaling", "has_chat_template"):  # fmt: skip
        assert getattr(found, name) == getattr(plain, name), name


@pytest.mark.parametrize(
    ("build", "method", "detail"),
    [
        (checkpoints.gptq, "gptq", "4-bit GPTQ"),
        (checkpoints.awq, "awq", "4-bit AWQ"),
        (lambda: checkpoints.bitsandbytes(4), "bitsandbytes", "4-bit nf4"),
        (lambda: checkpoints.bitsandbytes(8), "bitsandbytes", "8-bit"),
    ],
)
def test_quantized_checkpoints(build: Callable[[], Path], method: str, detail: str) -> None:
    found = facts(build())
    assert (found.quantization, found.quantization_detail) == (method, detail)
    assert found.parameters == facts(checkpoints.llama()).parameters  # packed weights are counted singly
    assert found.size_bytes < facts(checkpoints.llama()).size_bytes


def test_shards_and_pickles_hold_the_same_model() -> None:
    plain, sharded, pickle = (facts(f()) for f in (checkpoints.llama, checkpoints.sharded, checkpoints.pytorch))
    assert sharded.parameters == plain.parameters
    assert sharded.tensors == plain.tensors
    assert (pickle.model.file_format, pickle.parameters, pickle.dtype) == ("pytorch", None, "bfloat16")
    assert pickle.size_bytes > 0


def test_models_of_other_kinds() -> None:
    gpt2, t5, gemma = (facts(f()) for f in (checkpoints.gpt2, checkpoints.t5, checkpoints.gemma3))
    assert (gpt2.has_rope, gpt2.rope_theta, gpt2.context_tokens) == (False, 0.0, 128)
    assert (gpt2.positions, t5.positions, gemma.positions) == (128, 0, 0)
    assert (t5.task, t5.has_rope, t5.has_slow_tokenizer) == ("seq2seq", False, True)
    assert (gemma.has_rope, gemma.rope_theta, gemma.rope_scaling) == (True, 1_000_000.0, "linear")


@pytest.mark.parametrize(
    ("kind", "limit", "positions"),
    [("opt", 2048, 2048), ("roberta", 514, 512), ("bloom", 2048, 0), ("mpt", 2048, 0), ("gpt2", 0, 0)],
)
def test_how_many_positions_there_are(copy: Callable[[Path], Path], kind: str, limit: int, positions: int) -> None:
    folder = copy(checkpoints.gpt2())
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "n_ctx": limit}))
    assert facts(folder).positions == positions


def test_circumstances(demo_model: Path) -> None:
    found = facts(demo_model).circumstances(("A GPU",), {"load_in_4bit": True})
    assert found.model_chosen
    assert found.gpu_names == ("A GPU",)
    assert found.on("load_in_4bit")
    assert found.context_tokens == 8192
    assert found.has_rope
    assert not found.has_custom_code


def name_code(folder: Path, reference: str, name: str = "config.json") -> None:
    """Let one of the folder's configurations name a class of Python code."""
    file = folder / name
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | {"auto_map": {"AutoConfig": reference}}))


class TestCode:
    def test_every_python_file_counts(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.custom_code())
        (folder / "inner").mkdir()
        (folder / "inner" / "more.py").write_text("x = 1\n")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "hidden.py").write_text("x = 1\n")
        found = {file.name: file.sha256 for file in facts(folder).code_files}
        own = next(path for path in folder.glob("*.py"))
        assert found == {
            own.name: hashlib.sha256(own.read_bytes()).hexdigest(),
            "inner/more.py": hashlib.sha256(b"x = 1\n").hexdigest(),
        }
        assert facts(folder).circumstances((), {}).has_custom_code
        assert "brings Python code" in facts(folder).summary()

    def test_python_files_that_no_configuration_names_do_not_count(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "convert.py").write_text("x = 1\n")
        assert facts(folder).code_files == ()

    def test_the_tokenizer_may_name_code(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "tok.py").write_text("x = 1\n")
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Own", null]}}')
        assert [file.name for file in facts(folder).code_files] == ["tok.py"]

    def test_code_of_another_repository_has_no_hash(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "org/name--configuration.Own"}
        (folder / "config.json").write_text(json.dumps(config))
        assert facts(folder).code_files == (CodeFile("org/name--configuration.Own", ""),)

    def test_a_tokenizer_may_name_it_in_a_list(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "tokenizer_config.json").write_text('{"auto_map": ["org/name--tok.Own", null]}')
        assert facts(folder).code_files == (CodeFile("org/name--tok.Own", ""),)

    def test_code_that_is_not_there_is_done_without(self, copy: Callable[[Path], Path]) -> None:
        """Quantized copies often keep the auto_map of the original, and not its files."""
        folder = copy(checkpoints.llama())
        name_code(folder, "modeling_gone.Own")
        assert facts(folder).code_files == ()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "config.4.0.0.json"])
    @pytest.mark.parametrize("reference", ["code/modeling.Own", "/outside/modeling.Own", "../modeling.Own"])
    def test_code_that_would_not_be_shown_is_refused(
        self, copy: Callable[[Path], Path], name: str, reference: str
    ) -> None:
        folder = copy(checkpoints.custom_code())
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "modeling.py").write_text("x = 1\n")
        (folder / "code").symlink_to(".hidden")
        assert [file.name for file in facts(folder).code_files] == ["modeling_own.py"]
        name_code(folder, reference, name)
        with pytest.raises(UnsafeCheckpoint, match=f"{name} takes Python code .* {reference[:-4]}"):
            facts(folder)

    def test_a_way_to_generate_that_would_not_be_shown_is_refused(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.custom_code())
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "generate.py").write_text("x = 1\n")
        (folder / "custom_generate").symlink_to(".hidden")
        with pytest.raises(UnsafeCheckpoint, match=r"custom_generate/generate\.py"):
            facts(folder)
        (folder / "custom_generate").unlink()
        (folder / ".hidden").rename(folder / "custom_generate")
        assert {file.name for file in facts(folder).code_files} == {"modeling_own.py", "custom_generate/generate.py"}

    def test_a_file_swapped_for_one_of_the_same_size_and_time_is_seen(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.custom_code())
        library = Library([folder.parent])
        own = next(path for path in folder.glob("*.py"))
        before, stat = library.facts("model").code_files, own.stat()
        own.write_bytes(own.read_bytes().replace(b"a", b"b", 1))
        os.utime(own, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert own.stat().st_size == stat.st_size
        assert library.facts("model").code_files != before


class TestCache:
    def test_facts_are_read_once(self, copy: Callable[[Path], Path]) -> None:
        library = Library([copy(checkpoints.llama()).parent])
        assert library.facts("model") is library.facts(library.find("model"))

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_and_again_when_a_file_changed(self, copy: Callable[[Path], Path], file: str) -> None:
        folder = copy(checkpoints.llama())
        library = Library([folder.parent])
        before = library.facts("model")
        (folder / file).touch()
        assert library.facts("model") is not before

    def test_a_link_to_nowhere_does_not_matter(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "README.md").symlink_to(folder / "nowhere")
        library = Library([folder.parent])
        assert library.facts("model") is library.facts("model")

    def test_the_same_files_under_another_name(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        library = Library([folder.parent])
        found = library.facts("model")
        other = dataclasses.replace(found.model, name="other")
        assert library.facts(other) == dataclasses.replace(found, model=other)


class TestDamage:
    def test_config_that_is_not_json_names_the_line(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "config.json").write_text('{\n "a": 1,\n oops\n}')
        with pytest.raises(BrokenCheckpoint, match=r"config\.json in model is not JSON.*line 3"):
            facts(folder)

    def test_config_that_is_nested_too_deep(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
        with pytest.raises(BrokenCheckpoint):
            facts(folder)

    def test_weights_cut_short(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        os.truncate(folder / "model.safetensors", 500_000)
        with pytest.raises(BrokenCheckpoint, match="cut short: 500,000 bytes of"):
            facts(folder)

    def test_a_missing_shard(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.sharded())
        shard = sorted(folder.glob("model-*.safetensors"))[0]
        shard.unlink()
        assert Library([folder.parent]).models() == []
        with pytest.raises(BrokenCheckpoint, match=f"missing: {shard.name}"):
            facts(folder)

    def test_an_empty_file(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        os.truncate(folder / "model.safetensors", 0)
        with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors in model is empty"):
            facts(folder)

    def test_an_index_that_leads_out_is_offered_and_refused(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.sharded())
        data = json.loads((folder / INDEX).read_text())
        data["weight_map"] = dict.fromkeys(data["weight_map"], "../../x")
        (folder / INDEX).write_text(json.dumps(data))
        with pytest.raises(UnsafeCheckpoint, match=r"\.\./\.\./x"):
            Library([folder.parent]).facts("model")

    def test_a_folder_that_is_gone(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        library = Library([folder.parent])
        model = library.find("model")
        shutil.rmtree(folder)
        with pytest.raises(ModelNotFound, match="model is not there any more"):
            library.facts(model)

    def test_a_gguf_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 10)
        with pytest.raises(BrokenCheckpoint):
            Library([tmp_path]).facts("x.gguf")

    def test_weights_without_config(self, copy: Callable[[Path], Path]) -> None:
        folder = copy(checkpoints.llama())
        (folder / "config.json").unlink()
        with pytest.raises(NotAModel, match=r"has no config\.json"):
            facts(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
GEMMA = {
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, (5e5, "")),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, (5e5, "llama3")),
        ({"rope_parameters": GEMMA}, (1e6, "linear")),
        ({"rope_theta": 1e6, "rope_scaling": None}, (1e6, "")),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, (5e5, "llama3")),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, (1e4, "yarn")),
        ({"rotary_emb_base": 25000, "rotary_pct": 0.25}, (25000.0, "")),
        ({"model_type": "llama"}, (1e4, "")),
        ({"model_type": "falcon", "alibi": True}, None),
        ({"model_type": "gpt2", "n_positions": 1024}, None),
        ({"model_type": ["odd"]}, None),
        ({"rope_theta": "odd", "rope_scaling": 3, "rope_parameters": [1]}, (1e4, "")),
    ],
)
def test_rope_as_old_and_new_configurations_say_it(config: dict[str, Any], expected: object) -> None:
    assert reading.rope(config) == expected


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 2048}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 131072}, "max_position_embeddings": 512}, 131072),
        ({"max_position_embeddings": "4096", "seq_length": 8}, 8),
        ({"max_position_embeddings": -1}, 0),
        ({}, 0),
    ],
)
def test_context(config: dict[str, Any], tokens: int) -> None:
    assert reading.context_tokens(reading.text_part(config)) == tokens


@pytest.mark.parametrize(
    ("stored", "legacy", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {}, ("gptq", "4-bit GPTQ", 4)),
        ({"quant_method": "awq", "bits": 4}, {}, ("awq", "4-bit AWQ", 4)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, ("bitsandbytes", "8-bit", 8)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {}, ("bitsandbytes", "4-bit nf4", 4)),
        ({"quant_method": "fp8"}, {}, ("fp8", "FP8", 0)),
        ({"quant_method": "compressed-tensors"}, {}, ("compressed-tensors", "compressed-tensors", 0)),
        (None, {"bits": 4, "group_size": 128, "desc_act": False}, ("gptq", "4-bit GPTQ", 4)),
        (None, {"w_bit": 4, "q_group_size": 128}, ("awq", "4-bit AWQ", 4)),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, {}, ("mlx", "4-bit MLX", 4)),
        ({"quant_method": "exl2", "bits": 4.5}, {}, ("exl2", "EXL2", 0)),
        ({"odd": 1}, {}, ("unknown", "unknown", 0)),
        (None, {}, ("", "", 0)),
        ("odd", {}, ("", "", 0)),
    ],
)
def test_quantization(stored: object, legacy: dict[str, Any], expected: tuple[str, str, int]) -> None:
    assert reading.quantization({"quantization_config": stored}, legacy) == expected


def test_what_older_mlx_says_in_a_place_of_its_own() -> None:
    assert reading.quantization({"quantization": {"group_size": 64, "bits": 4}}, {}) == ("mlx", "4-bit MLX", 4)
    assert reading.quantization({"quantization": "none"}, {}) == ("", "", 0)


def test_attention_sizes() -> None:
    assert reading.attention({"n_layer": 12, "n_head": 12, "n_embd": 768}) == (12, 12, 64)
    assert reading.attention({"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
                              "hidden_size": 64, "head_dim": 16}) == (2, 2, 16)  # fmt: skip
    assert reading.attention({"num_attention_heads": 71, "multi_query": True, "hidden_size": 4544}) == (0, 1, 64)
    assert reading.attention({}) == (0, 0, 0)


SAID = st.sampled_from(
    ["rope_parameters", "rope_theta", "rope_scaling", "text_config", "quantization_config", "auto_map", "architectures",
     "max_position_embeddings", "hidden_size", "num_attention_heads", "dtype", "torch_dtype", "model_type", "alibi",
     "quant_method", "bits", "rope_type", "full_attention", "is_encoder_decoder", "transformers_weights"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SAID, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(SAID, JSON, max_size=8))
def test_whatever_a_config_holds(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(checkpoints.llama() / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with suppress(LoadstoneError):  # and nothing else
        assert facts(folder).summary()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200), file=st.sampled_from(["config.json", "model.safetensors", "tokenizer_config.json"])
)
def test_whatever_bytes_a_file_holds(tmp_path: Path, data: bytes, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoints.llama() / name, folder / name)
    (folder / file).write_bytes(data)
    with suppress(LoadstoneError):  # and nothing else
        assert facts(folder).summary()
