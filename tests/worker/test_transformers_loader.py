"""Loading real models: every format, and every option's effect as it shows on the model that is there."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modules import packages
from modules.checkpoint import code_hashes
from modules.errors import (
    BrokenCheckpoint,
    CustomCodeRefused,
    MissingPackage,
    NotAModel,
    OptionError,
    OutOfMemory,
    WrongResult,
)
from modules.protocol import Progress
from modules.worker import report, transformers_loader
from modules.worker.placement import GIB, DeviceFacts
from modules.worker.transformers_loader import LoadedModel, ModelFacts, load_kwargs
from modules.worker.verification import verify
from tests import checkpoints
from tests.conftest import ROOT

PROMPT = "The capital of France is"
GPU = DeviceFacts((24 * GIB,), bf16=True, ram_free_bytes=64 * GIB)
OLD_GPU = DeviceFacts((16 * GIB,), bf16=False, ram_free_bytes=64 * GIB)
NO_GPU = DeviceFacts(ram_free_bytes=8 * GIB)


def load(path: Path, work: Path, heard: list[Progress] | None = None, **facts: Any) -> LoadedModel:
    stages: list[Progress] = [] if heard is None else heard
    return transformers_loader.load(checkpoints.order_for(path, work, **facts), stages.append)


def greedy(loaded: LoadedModel, tokens: int = 12) -> list[int]:
    """The likeliest continuation of the prompt, as ids."""
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    made = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return [int(number) for number in made[0]]


@pytest.fixture(scope="module")
def plain(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The demo model in bfloat16, nothing else asked for."""
    return load(demo_model, tmp_path_factory.mktemp("work"), bf16=True)


def test_the_demo_model_answers(plain: LoadedModel) -> None:
    assert "Paris" in plain.tokenizer.decode(greedy(plain))
    assert not plain.model.training


def test_the_report_counts_what_is_there(plain: LoadedModel) -> None:
    report = plain.report
    assert report.architecture == "LlamaForCausalLM"
    assert report.parameters == 134_515_008  # the tied embedding counts once
    assert report.footprint_bytes == 2 * 134_515_008 + 256  # and the float32 rotary buffers
    assert report.device_bytes == {"cpu": report.footprint_bytes}
    assert report.dtype == "bfloat16"
    assert report.layer_classes == {"Linear": 211}
    assert report.device_map == {"": "cpu"}
    assert report.context_limit == 8192
    assert report.tokenizer_is_fast
    assert report.has_chat_template
    assert report.load_seconds > 0
    assert report.kwargs["dtype"] == "torch.bfloat16"
    assert report.kwargs["trust_remote_code"] == "False"


def test_progress_tells_stages_and_tensors(tmp_path: Path) -> None:
    heard: list[Progress] = []
    load(checkpoints.llama(), tmp_path, heard)
    stages = list(dict.fromkeys(progress.stage for progress in heard))
    assert stages[0] == "reading the configuration"
    assert stages[-2:] == ["loading the weights", "checking what was loaded"]
    assert heard[-2] == Progress("loading the weights", 21, 21, "tensors")


def test_progress_says_when_weights_are_quantized(tmp_path: Path) -> None:
    heard: list[Progress] = []
    load(checkpoints.llama(), tmp_path, heard, load_in_4bit=True)
    assert heard[-2] == Progress("quantizing the weights", 21, 21, "tensors")


def test_the_kwargs_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="modules.worker.transformers_loader")
    load(checkpoints.llama(), tmp_path)
    assert any("from_pretrained(dtype=torch.float32)" in message for message in caplog.messages)


def test_on_a_cpu_weights_are_float32_unless_bf16(tmp_path: Path) -> None:
    assert load(checkpoints.llama(), tmp_path, cpu=True).report.dtype == "float32"
    bf16 = load(checkpoints.llama(), tmp_path, cpu=True, bf16=True)
    assert {parameter.dtype for parameter in bf16.model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in bf16.model.parameters()} == {"cpu"}


def dtype_for(device: DeviceFacts, stored: str, **options: Any) -> tuple[torch.dtype, str]:
    order = checkpoints.order_for(Path("m"), Path("w"), **options)
    dtype, notes = transformers_loader.weights_dtype(order, device.usable(order.options), stored)
    return dtype, " ".join(notes)


def test_a_machine_without_a_gpu_says_what_it_does() -> None:
    assert dtype_for(NO_GPU, "bfloat16")[0] == torch.float32
    assert "float32; bf16 halves the memory" in dtype_for(NO_GPU, "bfloat16")[1]
    assert dtype_for(NO_GPU, "bfloat16", cpu=True) == (torch.float32, "")
    assert dtype_for(NO_GPU, "bfloat16", cpu=True, bf16=True) == (torch.bfloat16, "")


def test_a_processor_without_bfloat16_says_how_slow_it_is() -> None:
    old = DeviceFacts(cpu_bf16=False, ram_free_bytes=8 * GIB)
    assert "many times slower on this processor" in dtype_for(old, "bfloat16")[1]
    for cpu in (False, True):
        dtype, note = dtype_for(old, "bfloat16", cpu=cpu, bf16=True)
        assert (dtype, "no instructions for bfloat16" in note) == (torch.bfloat16, True)
        assert dtype_for(old, "bfloat16", cpu=cpu, load_in_4bit=True)[0] == torch.float32
    assert dtype_for(GPU, "bfloat16", cpu=True) == (torch.float32, "")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 is told apart")
def test_what_the_processor_has_is_what_torch_finds() -> None:
    order = checkpoints.order_for(Path("model"), Path("work"))
    assert transformers_loader.device_facts(order).cpu_bf16 is ("AVX512" in torch.backends.cpu.get_cpu_capability())


def test_on_a_gpu_weights_are_float16_unless_the_checkpoint_is_bfloat16() -> None:
    assert dtype_for(GPU, "float32") == (torch.float16, "")
    assert dtype_for(GPU, "float16") == (torch.float16, "")
    assert dtype_for(OLD_GPU, "bfloat16") == (torch.float16, "")
    dtype, note = dtype_for(GPU, "bfloat16")
    assert dtype == torch.bfloat16
    assert "kept as bfloat16" in note
    assert dtype_for(GPU, "float32", bf16=True) == (torch.bfloat16, "")
    assert dtype_for(GPU, "bfloat16", cpu=True)[0] == torch.float32


def test_the_kwargs_are_a_pure_function_of_order_and_facts() -> None:
    order = checkpoints.order_for(Path("m"), Path("w"), load_in_4bit=True, attn_implementation="eager")
    facts = ModelFacts(checkpoints.llama_config(), "bfloat16", elements=10**9)
    first, second = (load_kwargs(order, GPU, facts) for _ in range(2))
    assert first.as_text() == second.as_text()
    assert first.kwargs["attn_implementation"] == "eager"
    assert first.kwargs["dtype"] == torch.bfloat16
    assert first.kwargs["quantization_config"].load_in_4bit
    assert first.kwargs["local_files_only"] is True
    assert first.kwargs["trust_remote_code"] is False
    assert set(first.kwargs["max_memory"]) == {0}


def test_that_cpu_memory_does_nothing_is_said_only_where_no_plan_keeps_to_it() -> None:
    facts = ModelFacts(checkpoints.llama_config(), "bfloat16", elements=10**9)
    order = checkpoints.order_for(Path("m"), Path("w"), load_in_4bit=True, cpu_memory=4.0)
    planned = dataclasses.replace(order, device_map={"": "cpu"})
    unplanned, kept = (load_kwargs(one, DeviceFacts(), facts).notes for one in (order, planned))
    assert set(unplanned) - set(kept) == {note for note in unplanned if "cpu-memory has no effect" in note} != set()


def test_the_context_counts_in_what_auto_devices_leaves_free(demo_model: Path) -> None:
    order = checkpoints.order_for(demo_model, Path("w"), auto_devices=True, ctx_tokens=8192)
    facts = transformers_loader.model_facts(order)
    assert facts.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert facts.elements == 134_515_008
    assert facts.stored_dtype == "bfloat16"
    left = GPU.gpu_free_bytes[0] - load_kwargs(order, GPU, facts).kwargs["max_memory"][0]
    assert left == GIB + 8192 * facts.kv_bytes_per_token


def test_layers_on_disk_answer_like_the_unsplit_model(demo_model: Path, tmp_path: Path, plain: LoadedModel) -> None:
    split = load(demo_model, tmp_path, bf16=True, disk=True, cpu_memory=0.2)
    assert set(split.report.device_map.values()) == {"cpu", "disk"}
    assert split.report.device_bytes["disk"] > 20e6
    assert split.report.device_bytes["cpu"] <= 0.2 * GIB
    assert split.report.footprint_bytes == plain.report.footprint_bytes
    assert greedy(split) == greedy(plain)


def test_a_layer_that_lies_elsewhere_than_planned_is_an_error(tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    split = load(checkpoints.llama(), tmp_path, disk=True, device_map=places)
    assert report.misplaced(split.model, places) == []
    split.model.model.norm.to("meta")
    assert report.misplaced(split.model, places) == ["model.norm.weight"]
    moved = dataclasses.replace(split.order, device_map={**places, "model.norm": "disk", "model.layers.0": "disk"})
    facts = transformers_loader.device_facts(moved)
    with pytest.raises(WrongResult, match=r"^9 of the weights .* where the plan has them: model\.layers\.0\."):
        verify(split.model, moved, facts, {"dtype": "torch.float32"})


def test_layers_of_a_bin_file_go_to_a_folder_of_this_load(tmp_path: Path) -> None:
    whole = load(checkpoints.pytorch(), tmp_path, file_format="pytorch")
    split = load(checkpoints.pytorch(), tmp_path, file_format="pytorch", disk=True, cpu_memory=0.0012)
    assert "disk" in split.report.device_map.values()
    folder = Path(split.order.offload_dir)
    assert folder.parent == tmp_path / "offload"
    assert list(folder.glob("*.dat")) or list(folder.iterdir())
    assert greedy(split) == greedy(whole)


def test_the_folder_goes_when_the_process_ends_and_a_dead_ones_folder_with_it(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left_over = tmp_path / f"load-{dead.pid}-abc"
    left_over.mkdir()
    code = (
        "from pathlib import Path; from modules.worker.transformers_loader import own_folder; "
        f"made = own_folder(Path({str(tmp_path)!r})); assert Path(made).is_dir(); print(made)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_option_error(tmp_path: Path) -> None:
    (tmp_path / "offload").write_text("a file where the folder should be")
    with pytest.raises(OptionError, match="cannot be written"):
        load(checkpoints.llama(), tmp_path, disk=True)


def test_without_disk_what_does_not_fit_is_refused_before_loading(demo_model: Path, tmp_path: Path) -> None:
    heard: list[Progress] = []
    with pytest.raises(OutOfMemory, match="GiB are allowed on this machine") as caught:
        load(demo_model, tmp_path, heard, cpu_memory=0.2)
    assert caught.value.fix == {"disk": True}
    assert "loading the weights" not in [progress.stage for progress in heard]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_one_asked_for(tmp_path: Path, attention: str) -> None:
    result = load(checkpoints.llama(), tmp_path, attn_implementation=attention)
    assert result.model.config._attn_implementation == attention
    assert result.report.attn_implementation == attention


def test_an_attention_whose_package_is_missing_names_it(tmp_path: Path) -> None:
    assert packages.missing("flash_attention_2"), "this test needs flash-attn not to be installed"
    with pytest.raises(MissingPackage, match="flash-attn") as caught:
        load(checkpoints.llama(), tmp_path, attn_implementation="flash_attention_2")
    assert caught.value.hint == f"Run: {packages.install_line('flash-attn')}"


@pytest.mark.parametrize("name", ["sharded", "pytorch"])
def test_the_same_weights_in_other_files_answer_the_same(tmp_path: Path, name: str) -> None:
    file_format = "pytorch" if name == "pytorch" else "safetensors"
    other = load(getattr(checkpoints, name)(), tmp_path, file_format=file_format)
    assert greedy(other) == greedy(load(checkpoints.llama(), tmp_path))


def test_a_gguf_file_is_unpacked_and_answers(tmp_path: Path) -> None:
    heard: list[Progress] = []
    result = load(checkpoints.gguf_file(), tmp_path, heard, file_format="gguf", quantization="gguf", bf16=True)
    unpacked = [one for one in heard if one.stage == "unpacking the weights"]
    assert unpacked[0].total == 0  # nothing is known yet
    assert unpacked[-1].done == unpacked[-1].total == 272
    assert any(0 < one.done < one.total for one in unpacked)
    assert heard[heard.index(unpacked[-1]) + 1].stage == "loading the weights"
    assert result.report.layer_classes == {"Linear": 211}
    assert result.report.dtype == "bfloat16"
    assert result.report.context_limit == 8192
    assert result.report.has_chat_template
    assert "Paris" in result.tokenizer.decode(greedy(result))


def test_a_seq2seq_model_loads_as_one(tmp_path: Path) -> None:
    result = load(checkpoints.t5(), tmp_path, task="seq2seq")
    assert result.report.architecture == "T5ForConditionalGeneration"
    assert greedy(result, tokens=3)[0] == 0  # the decoder's start


def test_custom_code_runs_when_allowed(tmp_path: Path) -> None:
    result = load(checkpoints.custom_code(), tmp_path, custom_code_allowed=True)
    assert result.report.architecture == "OwnForCausalLM"
    assert greedy(result) == greedy(load(checkpoints.llama(), tmp_path))


def test_only_the_very_code_that_was_allowed_runs(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.custom_code(), tmp_path / "model")
    allowed = code_hashes(folder)
    assert load(folder, tmp_path, custom_code_allowed=True, code_hashes=allowed).report.architecture == "OwnForCausalLM"
    marker = tmp_path / "ran"
    for name in ("modeling_own.py", "inner/another.py"):  # changed, added
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
        with pytest.raises(CustomCodeRefused, match="not the ones that were allowed"):
            load(folder, tmp_path, custom_code_allowed=True, code_hashes=allowed)
        (folder / name).unlink()
    assert not marker.exists()


def test_the_notes_of_the_order_come_first(tmp_path: Path) -> None:
    notes = ("One option has no effect here.", "Another was left out.")
    assert load(checkpoints.llama(), tmp_path, notes=notes).report.notes[:2] == notes


def test_code_of_another_repository_is_never_run(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.custom_code(), tmp_path / "model")
    text = (folder / "config.json").read_text().replace("modeling_own.Own", "somebody/else--modeling_own.Own")
    (folder / "config.json").write_text(text)
    with pytest.raises(CustomCodeRefused, match="somebody/else--modeling_own"):
        load(folder, tmp_path, custom_code_allowed=True)


def test_a_lora_is_not_loaded_as_a_model(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(NotAModel, match="is a LoRA"):
        load(folder, tmp_path)


def test_files_are_checked_before_they_are_opened(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is cut short"):
        load(folder, tmp_path)


def test_generating_prints_no_warning(tmp_path: Path) -> None:
    """Every token a line of warnings would bury the log; run apart, because warnings are said once a process."""
    code = f"""
from pathlib import Path
from modules.worker import report, transformers_loader
from modules.worker.verification import verify
from tests import checkpoints
import sys
for path, options in ((checkpoints.gpt2(), {{}}), (checkpoints.llama(), {{"load_in_8bit": True}})):
    loaded = transformers_loader.load(checkpoints.order_for(path, Path({str(tmp_path)!r}), **options), lambda _: None)
    print("MARK", file=sys.stderr, flush=True)
    inputs = loaded.tokenizer("def main", return_tensors="pt", return_token_type_ids=False)
    for _ in range(2):
        loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    print("END", file=sys.stderr, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    said = [part.split("END")[0].strip() for part in done.stderr.split("MARK")[1:]]
    assert said == ["", ""], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    """What only a real GPU shows."""

    def test_the_whole_model_goes_there(self, demo_model: Path, tmp_path: Path) -> None:
        result = load(demo_model, tmp_path)
        assert set(result.report.device_map.values()) <= {str(index) for index in range(torch.cuda.device_count())}
        assert result.report.dtype in ("float16", "bfloat16")
        assert "Paris" in result.tokenizer.decode(greedy(result))

    def test_cpu_leaves_it_alone(self, demo_model: Path, tmp_path: Path) -> None:
        before = torch.cuda.memory_allocated()
        assert load(demo_model, tmp_path, cpu=True).report.device_map == {"": "cpu"}
        assert torch.cuda.memory_allocated() == before

    def test_gpu_memory_caps_the_weights(self, demo_model: Path, tmp_path: Path) -> None:
        report = load(demo_model, tmp_path, bf16=True, gpu_memory=(0.2,)).report
        assert 0 < report.device_bytes["cuda:0"] <= 0.2 * GIB
        assert report.device_bytes["cpu"] > 0
        assert any("some layers lie in RAM" in note for note in report.notes)

    def test_4bit_under_a_cap(self, demo_model: Path, tmp_path: Path) -> None:
        report = load(demo_model, tmp_path, load_in_4bit=True, gpu_memory=(0.5,)).report
        assert report.layer_classes == {"Linear4bit": 210, "Linear": 1}
        with pytest.raises(OutOfMemory, match="does not fit"):
            load(demo_model, tmp_path, load_in_4bit=True, gpu_memory=(0.05,))
