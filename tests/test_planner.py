"""What a plan says to people and programs: caps, refusals, ways to fit, spare context; on simulated GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules.devices import Gpu, Machine
from modules.library import Library
from modules.options import LoadOptions
from modules.planner import DEFAULT, Calibration, Checkpoint, Plan, from_facts, plan, read_checkpoint
from modules.planner.offload import offload_of
from modules.planner.placement import Placement
from modules.planner.solving import Question, solve
from tests import checkpoints, planner_checkpoints
from tests.conftest import ROOT

GIB = 2**30
LLAMA_70B_PARAMETERS = 70_553_706_496
DEEPSEEK_V3_PARAMETERS = 671_026_419_200


def machine(*gpus_gib: float, ram: float = 64, disk: float = 2000) -> Machine:
    gpus = tuple(Gpu(i, f"simulated {i}", str(i), int(g * GIB), int(g * GIB)) for i, g in enumerate(gpus_gib))
    return Machine(gpus, int(ram * GIB), int(ram * GIB), int(disk * GIB))


def places(planned: Plan) -> dict[str, int]:
    """How many entries of the device map each device has."""
    keys: Sequence[str] = list(planned.device_map.values())
    return {key: keys.count(key) for key in dict.fromkeys(keys)}


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(planner_checkpoints.llama_70b(tmp_path_factory.mktemp("headers") / "llama-70b"))


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(planner_checkpoints.deepseek_v3(tmp_path_factory.mktemp("headers") / "deepseek-v3"))


def test_the_json_has_the_documented_keys_and_nothing_else(llama_70b: Checkpoint) -> None:
    data = json.loads(json.dumps(plan(llama_70b, LoadOptions(), machine(24), ctx_tokens=8192).to_dict()))
    assert list(data) == [
        "model", "fits", "weights_bytes", "peak_bytes", "missing_bytes", "device_map", "devices", "suggestions",
    ]  # fmt: skip
    assert set(data["devices"][0]) == {
        "name", "cap_bytes", "weights_bytes", "kv_cache_bytes", "working_bytes", "fixed_bytes", "total_bytes",
    }  # fmt: skip
    assert data["suggestions"]
    assert all(set(item) == {"text", "options"} for item in data["suggestions"])


def test_a_large_model_is_counted_from_headers(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(), machine(80, 80), ctx_tokens=8192)
    assert planned.fits
    assert planned.weights_bytes == 2 * LLAMA_70B_PARAMETERS + 2 * 64 * 4
    assert sum(device.kv_cache_bytes for device in planned.devices) == 8192 * 2 * 80 * 8 * 128 * 2
    assert list(places(planned)) == ["0", "1"]


def test_a_mixture_of_hundreds_of_experts_is_counted_from_headers(deepseek_v3: Checkpoint) -> None:
    planned = plan(deepseek_v3, LoadOptions(), machine(*[80] * 12, ram=256), ctx_tokens=4096)
    assert not planned.fits
    correction_float32 = 58 * 256 * 2  # bytes more than in 16 bit
    assert planned.weights_bytes == 2 * DEEPSEEK_V3_PARAMETERS + correction_float32 + 2 * 32 * 4
    latent = 4096 * 61 * (512 + 64) * 2
    assert sum(device.kv_cache_bytes for device in planned.devices) == latent
    in_four = plan(deepseek_v3, LoadOptions(load_in_4bit=True), machine(*[80] * 12, ram=256), ctx_tokens=4096)
    assert in_four.weights_bytes > 0.95 * planned.weights_bytes
    assert any("experts stay in 16 bit" in note for note in in_four.notes)


def test_unequal_gpus_fill_by_what_the_options_give_them(llama_70b: Checkpoint) -> None:
    options = LoadOptions(load_in_4bit=True, gpu_memory=(20, 0, 40))
    planned = plan(llama_70b, options, machine(24, 24, 48), ctx_tokens=4096)
    assert planned.fits
    assert [device.name for device in planned.devices] == ["GPU 0", "GPU 2", "RAM"]
    assert [device.cap_bytes for device in planned.devices[:2]] == [20 * GIB, 40 * GIB]
    assert all(device.total_bytes <= device.cap_bytes for device in planned.devices)
    assert places(planned).keys() == {"0", "2"}
    assert planned.device_map["model.embed_tokens"] == "0"
    assert planned.device_map["lm_head"] == "2"


def test_a_gpu_that_the_list_does_not_reach_is_left_out(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(load_in_4bit=True, gpu_memory=(60,)), machine(64, 64), ctx_tokens=4096)
    assert planned.device_map == {"": "0"}


def test_layers_go_in_order(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(), machine(48, 48, 80), ctx_tokens=4096)
    numbers = [int(planned.device_map[f"model.layers.{index}"]) for index in range(80)]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1, 2}


def test_what_does_not_fit_on_the_gpu_goes_to_ram_and_its_cache_stays(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(), machine(24, ram=160), ctx_tokens=4096)
    gpu, ram = planned.devices
    assert planned.fits
    assert ram.weights_bytes > 100 * GIB
    assert ram.kv_cache_bytes == 0
    assert gpu.kv_cache_bytes == 4096 * 2 * 80 * 8 * 128 * 2
    layer = 2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192)
    assert gpu.working_bytes >= layer  # room for the layer that visits
    assert gpu.total_bytes <= gpu.cap_bytes


def test_what_lies_in_ram_beside_a_gpu_is_said_with_its_cost_and_what_would_spare_it(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(), machine(48, ram=160), ctx_tokens=4096)
    count = sum(1 for module, key in planned.device_map.items() if key == "cpu" and ".layers." in module)
    seconds = planned.devices[1].weights_bytes / DEFAULT.ram_to_gpu_bytes_per_s
    assert planned.fits
    assert planned.offloaded == f"{count} of 80 layers in RAM: each token takes {seconds:.1f} s longer, or more"
    [note] = [note for note in planned.notes if f"{count} of 80 layers in RAM" in note]
    assert f"{seconds:.1f} s longer" in note
    [way] = planned.suggestions
    assert way.options == {"load_in_4bit": True, "load_in_8bit": False, "bf16": False}
    assert "all on the GPU" in way.text


def test_embeddings_alone_in_ram_are_said_too() -> None:
    checkpoint = read_checkpoint(planner_checkpoints.checkpoint("llama"))
    answer = solve(Question(checkpoint, LoadOptions(), machine(1), 16, DEFAULT))
    on_gpu = answer.placement.devices
    away = offload_of(replace(answer, placement=Placement((*on_gpu[:-1], "cpu"))), DEFAULT)
    assert (away.kept, away.longer) == ("a part of the model in RAM", "1 ms")


def test_already_quantized_weights_in_ram_are_told_of_without_4_bit() -> None:
    checkpoint = read_checkpoint(checkpoints.gptq())
    needed = plan(checkpoint, LoadOptions(), machine(1), ctx_tokens=16).devices[0].total_bytes
    planned = plan(checkpoint, LoadOptions(), machine((needed - 1) / GIB, ram=4), ctx_tokens=16)
    assert "in RAM" in planned.offloaded
    assert planned.suggestions == ()


def test_spare_context_does_not_push_layers_off_the_gpu(llama_70b: Checkpoint) -> None:
    setting = machine(140, ram=256)
    planned = plan(llama_70b, LoadOptions(), setting, ctx_tokens=512)
    assert planned.offloaded == ""
    longest = 512 + planned.spare_context_tokens
    assert plan(llama_70b, LoadOptions(), setting, ctx_tokens=longest).offloaded == ""
    assert plan(llama_70b, LoadOptions(), setting, ctx_tokens=longest + 256).offloaded


def test_quantized_weights_spill_only_where_it_was_asked_for_and_in_16_bit(llama_70b: Checkpoint) -> None:
    four = LoadOptions(load_in_4bit=True)
    assert not plan(llama_70b, four, machine(24, ram=256), ctx_tokens=4096).fits
    planned = plan(llama_70b, LoadOptions(load_in_4bit=True, cpu_memory=200), machine(24, ram=256), ctx_tokens=4096)
    assert planned.fits
    gpu, ram = planned.devices
    assert gpu.classes.quantized
    assert ram.classes.quantized == 0
    assert any("stay in 16 bit" in note for note in planned.notes)


def test_what_is_missing_is_the_least_that_would_do(llama_70b: Checkpoint) -> None:
    setting = machine(24, ram=256)
    refused = plan(llama_70b, LoadOptions(gpu_memory=(0.1,)), setting, ctx_tokens=4096)
    assert refused.missing_on == "GPU 0"
    enough = 0.1 + refused.missing_bytes / GIB
    assert enough < 12  # of 24, and of 130 for all of it
    assert plan(llama_70b, LoadOptions(gpu_memory=(enough + 0.001,)), setting, ctx_tokens=4096).fits
    less = LoadOptions(gpu_memory=(enough - 2.5,))  # out of order, 1.7 less would do
    assert not plan(llama_70b, less, setting, ctx_tokens=4096).fits


def test_layers_of_many_sizes_are_planned_in_time(llama_70b: Checkpoint) -> None:
    """What the search for a split out of order would go on with for minutes."""
    tensors = {}
    for name, info in llama_70b.tensors.items():
        parts = name.split(".")
        width = 2048 * (1 + int(parts[2]) % 9) if ".mlp." in name else 0
        shape = tuple(width if number == 28672 else number for number in info.shape)
        tensors[name] = replace(info, shape=shape)
    many = replace(llama_70b, tensors=tensors)
    begun = time.perf_counter()
    for ram in range(8, 72, 8):
        for gpus in ((24,), (24, 16, 12)):
            plan(many, LoadOptions(), machine(*gpus, ram=ram), ctx_tokens=8192)
    assert time.perf_counter() - begun < 16


def test_letting_loadstone_choose_lets_quantized_layers_lie_in_ram(llama_70b: Checkpoint) -> None:
    refused = plan(llama_70b, LoadOptions(load_in_4bit=True), machine(24, ram=256), ctx_tokens=4096)
    (way,) = [one for one in refused.suggestions if one.options == {"auto_devices": True}]
    planned = plan(llama_70b, LoadOptions(load_in_4bit=True, **way.options), machine(24, ram=256), ctx_tokens=4096)
    assert planned.fits
    assert planned.offloaded.split(":")[0] in way.text
    assert planned.away_bytes == planned.devices[1].weights_bytes > 0
    capped = LoadOptions(load_in_4bit=True, auto_devices=True, cpu_memory=16, gpu_memory=(20,))
    assert not plan(llama_70b, capped, machine(24, ram=256), ctx_tokens=4096).fits  # it never takes more than is set


def test_the_disk_takes_the_rest_where_it_may(llama_70b: Checkpoint) -> None:
    refused = plan(llama_70b, LoadOptions(cpu_memory=32), machine(24), ctx_tokens=4096)
    assert not refused.fits
    planned = plan(llama_70b, LoadOptions(cpu_memory=32, disk=True), machine(24), ctx_tokens=4096)
    assert planned.fits
    assert list(places(planned)) == ["0", "cpu", "disk"]
    assert planned.peak_bytes == sum(device.total_bytes for device in planned.devices if device.name != "disk")
    ram = planned.devices[1]
    assert ram.total_bytes - ram.fixed_bytes <= 32 * GIB


@pytest.mark.parametrize("kind", ["pickles", "merged experts"])
def test_a_disk_that_is_written_to_is_bounded_by_what_is_free(tmp_path: Path, kind: str) -> None:
    folder = checkpoints.pytorch()
    pickles = from_facts(Library([folder.parent]).facts(folder.name))
    experts = read_checkpoint(planner_checkpoints.checkpoint("qwen3-moe"))
    checkpoint = pickles if kind == "pickles" else experts

    def planned(disk_bytes: int, **options: Any) -> Plan:
        return _mostly_on_disk(checkpoint, disk_bytes, **options)

    assert not planned(0).fits
    written = planned(GIB).devices[-1]
    assert (written.name, written.cap_bytes) == ("disk", GIB)
    assert planned(written.weights_bytes).fits
    assert planned(0, disk_cache_dir=str(tmp_path)).fits  # another disk, of which nothing is known here


def test_layers_of_safetensors_are_read_where_they_are() -> None:
    assert _mostly_on_disk(read_checkpoint(planner_checkpoints.checkpoint("llama")), 0).fits


def _mostly_on_disk(checkpoint: Checkpoint, disk_bytes: int, **options: Any) -> Plan:
    """The plan on a machine without a GPU whose RAM holds nearly all weights."""
    small = Calibration(ram_fixed_bytes=0, hidden_copies=0, inner_copies=0, logits_copies=0, tensors_in_flight=0)
    whole = plan(checkpoint, LoadOptions(), machine(ram=1), ctx_tokens=16, calibration=small).weights_bytes
    tight = machine(ram=whole * 0.9 / GIB, disk=disk_bytes / GIB)
    return plan(checkpoint, LoadOptions(disk=True, **options), tight, ctx_tokens=16, calibration=small)


def test_a_refusal_names_the_bytes_that_would_do(llama_70b: Checkpoint) -> None:
    refused = plan(llama_70b, LoadOptions(load_in_4bit=True), machine(24), ctx_tokens=4096)
    assert (refused.fits, refused.missing_on) == (False, "GPU 0")
    enough = (24 * GIB + refused.missing_bytes) / GIB
    assert plan(llama_70b, LoadOptions(load_in_4bit=True), machine(enough), ctx_tokens=4096).fits
    less = (24 * GIB + refused.missing_bytes - 1) / GIB
    assert not plan(llama_70b, LoadOptions(load_in_4bit=True), machine(less), ctx_tokens=4096).fits


def test_without_a_gpu_all_lies_in_ram(llama_70b: Checkpoint) -> None:
    planned = plan(llama_70b, LoadOptions(bf16=True), machine(ram=180), ctx_tokens=4096)
    assert planned.fits
    assert planned.device_map == {"": "cpu"}
    assert plan(llama_70b, LoadOptions(bf16=True, cpu=True), machine(24, ram=180), ctx_tokens=4096).device_map == {
        "": "cpu"
    }


def test_ways_to_fit_do_fit_and_say_their_price(llama_70b: Checkpoint) -> None:
    setting = machine(48, ram=256)
    refused = plan(llama_70b, LoadOptions(gpu_memory=(40,), cpu_memory=20), setting, ctx_tokens=8192)
    assert 1 <= len(refused.suggestions) <= 4
    for suggestion in refused.suggestions:
        options = LoadOptions(**{"gpu_memory": (40,), "cpu_memory": 20, **suggestion.options})
        tokens = suggestion.options.get("ctx_size", 8192)
        assert plan(llama_70b, options, setting, ctx_tokens=tokens).fits, suggestion
        assert len(suggestion.text) > 30


def test_each_way_says_what_it_keeps_beside_the_gpu_and_those_that_keep_nothing_there_come_first(
    llama_70b: Checkpoint,
) -> None:
    cases = [
        (machine(24, ram=64), LoadOptions(), 8192),
        (machine(24, ram=160), LoadOptions(cpu_memory=40), 8192),
        (machine(24, 24, ram=64), LoadOptions(auto_devices=True), 8192),
        (machine(48, ram=12), LoadOptions(), 131072),
        (machine(24, 48, ram=4), LoadOptions(gpu_memory=(0, 20)), 8192),
        (machine(ram=64), LoadOptions(bf16=True), 8192),
    ]
    for setting, options, tokens in cases:
        refused = plan(llama_70b, options, setting, ctx_tokens=tokens)
        away = []
        for way in refused.suggestions:
            chosen = replace(options, **way.options)
            made = plan(llama_70b, chosen, setting, ctx_tokens=way.options.get("ctx_size", tokens))
            assert made.fits
            assert made.offloaded.split(":")[0] in way.text
            assert bool(made.offloaded) == ("layers" in way.text) == bool(made.away_bytes)
            away += [made.away_bytes] if not chosen.cpu else []  # which stands where its time puts it
        assert refused.suggestions
        assert sorted(away, key=bool) == away


def test_what_the_user_set_is_given_up_first_where_it_is_what_takes_the_memory(llama_70b: Checkpoint) -> None:
    def first(setting: Machine, **options: Any) -> dict[str, Any]:
        refused = plan(llama_70b, LoadOptions(**options), setting, ctx_tokens=8192)
        return dict(refused.suggestions[0].options)

    assert first(machine(160, ram=4), batch_tokens=131072) == {"batch_tokens": 0}
    assert first(machine(150, ram=4), attn_implementation="eager") == {"attn_implementation": "auto"}
    # A GPU that is left out stays so while the others will do, and is offered by its name where they will not.
    assert first(machine(80, 160, ram=4), gpu_memory=(0, 20)) == {"gpu_memory": (0.0, 160.0)}
    refused = plan(llama_70b, LoadOptions(gpu_memory=(0, 20)), machine(80, 80, ram=4), ctx_tokens=8192)
    assert any("GPU 0 too" in way.text and way.options == {"gpu_memory": ()} for way in refused.suggestions)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((0, 0), "bfloat16")])
def test_gpus_without_bfloat16_are_planned_as_they_load(capability: tuple[int, int], dtype: str) -> None:
    """What T5 keeps in float32 beside float16, it does not beside bfloat16."""
    checkpoint = replace(read_checkpoint(planner_checkpoints.checkpoint("t5")), stored_dtype="bfloat16")
    gpu = Gpu(0, "simulated", "0", 24 * GIB, 24 * GIB, (), capability)
    planned = plan(checkpoint, LoadOptions(), replace(machine(), gpus=(gpu,)), ctx_tokens=64)
    assert planned.precision.dtype == dtype
    kept = planned.weights_bytes - plan(checkpoint, LoadOptions(), machine(24), ctx_tokens=64).weights_bytes
    assert (kept > 0) == (dtype == "float16")


def test_a_gpu_that_is_left_out_does_not_decide_the_type() -> None:
    checkpoint = replace(read_checkpoint(planner_checkpoints.checkpoint("llama")), stored_dtype="bfloat16")
    old, new = (Gpu(at, "x", str(at), 24 * GIB, 24 * GIB, (), able) for at, able in enumerate(((7, 5), (8, 6))))
    both = replace(machine(), gpus=(old, new))
    assert plan(checkpoint, LoadOptions(), both, ctx_tokens=64).precision.dtype == "float16"
    assert plan(checkpoint, LoadOptions(gpu_memory=(0, 20)), both, ctx_tokens=64).precision.dtype == "bfloat16"


@pytest.mark.parametrize(("file_format", "disk"), [("gguf", False), ("safetensors", True)])
def test_layers_of_a_gguf_file_are_not_planned_on_disk(llama_70b: Checkpoint, file_format: str, disk: bool) -> None:
    quantization = "gguf" if file_format == "gguf" else ""
    packed = replace(llama_70b, file_format=file_format, quantization=quantization)
    assert plan(packed, LoadOptions(disk=True), machine(ram=64), ctx_tokens=8192).fits is disk


def test_a_whole_prompt_is_planned_where_it_is_read_in_one_piece(llama_70b: Checkpoint) -> None:
    def working(attention: str) -> int:
        options = LoadOptions(attn_implementation=attention)
        return plan(llama_70b, options, machine(80, 80, 80), ctx_tokens=32768).devices[0].working_bytes

    assert working("flash_attention_2") > 3 * working("sdpa") / 2


def test_the_cpu_takes_in_4_bit_what_it_cannot_take_whole(llama_70b: Checkpoint) -> None:
    refused = plan(llama_70b, LoadOptions(), machine(24, ram=64), ctx_tokens=8192)
    assert "in 4-bit" in refused.suggestions[0].text
    assert refused.suggestions[0].options["cpu"]
    assert refused.suggestions[0].options["load_in_4bit"]
    quantized = plan(llama_70b, LoadOptions(load_in_4bit=True), machine(ram=16), ctx_tokens=8192)
    (way,) = quantized.suggestions
    assert way.options == {"load_in_4bit": False, "load_in_8bit": False, "bf16": True, "disk": True}


def test_the_first_word_is_what_costs_least() -> None:
    """In order: take what is free, bfloat16, a shorter context, 8-bit, 4-bit, layers elsewhere."""
    checkpoint = read_checkpoint(planner_checkpoints.checkpoint("llama"))
    small = Calibration(
        ram_fixed_bytes=0,
        bitsandbytes_ram_bytes=0,
        hidden_copies=0,
        inner_copies=0,
        logits_copies=0,
        tensors_in_flight=0,
    )
    weights = plan(checkpoint, LoadOptions(bf16=True), machine(ram=1), ctx_tokens=64).weights_bytes
    tight = machine(ram=weights * 1.2 / GIB)
    refused = plan(checkpoint, LoadOptions(), tight, ctx_tokens=64, calibration=small)
    assert refused.suggestions[0].options == {"bf16": True}
    assert "load_in_8bit" in refused.suggestions[1].options


def test_a_shorter_context_is_offered_with_its_length(llama_70b: Checkpoint) -> None:
    setting = machine(80, 80, ram=1.5)
    refused = plan(llama_70b, LoadOptions(), setting, ctx_tokens=131072)
    first = refused.suggestions[0].options
    assert set(first) == {"ctx_size"}
    tokens = first["ctx_size"]
    assert 2048 <= tokens < 131072
    assert plan(llama_70b, LoadOptions(), setting, ctx_tokens=tokens).fits
    assert not plan(llama_70b, LoadOptions(), setting, ctx_tokens=tokens + 256).fits


def test_an_already_quantized_checkpoint_is_not_told_to_quantize() -> None:
    checkpoint = read_checkpoint(checkpoints.bitsandbytes(4))
    refused = plan(checkpoint, LoadOptions(), machine(0.1, ram=4), ctx_tokens=256)
    assert not refused.fits
    assert not any({"load_in_4bit", "load_in_8bit", "bf16"} & set(item.options) for item in refused.suggestions)


def test_spare_context_fits_and_more_does_not(llama_70b: Checkpoint) -> None:
    options = LoadOptions(load_in_4bit=True)
    planned = plan(llama_70b, options, machine(48), ctx_tokens=4096)
    longest = 4096 + planned.spare_context_tokens
    assert 4096 < longest < 131072
    assert plan(llama_70b, options, machine(48), ctx_tokens=longest).fits
    assert not plan(llama_70b, options, machine(48), ctx_tokens=longest + 256).fits
    plenty = plan(llama_70b, options, machine(140), ctx_tokens=4096)
    assert 4096 + plenty.spare_context_tokens == 131072  # the model's own limit


def test_sliding_layers_keep_their_window_alone() -> None:
    checkpoint = read_checkpoint(planner_checkpoints.checkpoint("gemma3"))
    caches = [
        plan(checkpoint, LoadOptions(bf16=True), machine(), ctx_tokens=tokens).devices[0].kv_cache_bytes
        for tokens in (32, 1032, 2032)
    ]
    full_layer = 2 * 2 * 16 * 2
    assert caches[0] == 32 * 7 * full_layer
    assert caches[2] - caches[1] == caches[1] - caches[0] == 1000 * full_layer  # one layer of seven sees everything


def test_measured_numbers_are_data(llama_70b: Checkpoint) -> None:
    usual = plan(llama_70b, LoadOptions(), machine(80, 80), ctx_tokens=4096)
    measured = Calibration(gpu_fixed_bytes=DEFAULT.gpu_fixed_bytes + 2**20, ram_beside_gpu_bytes=1)
    other = plan(llama_70b, LoadOptions(), machine(80, 80), ctx_tokens=4096, calibration=measured)
    assert other.devices[0].fixed_bytes == usual.devices[0].fixed_bytes + 2**20
    assert other.devices[-1].fixed_bytes == 1


def test_pickled_weights_are_estimated_and_said_to_be(tmp_path: Path) -> None:
    folder = checkpoints.pytorch()
    planned = plan(Library([folder.parent]).facts(folder.name), LoadOptions(bf16=True), machine(), ctx_tokens=128)
    real = plan(read_checkpoint(checkpoints.llama()), LoadOptions(bf16=True), machine(), ctx_tokens=128)
    assert not planned.exact
    assert any("estimated" in note for note in planned.notes)
    assert abs(planned.weights_bytes - real.weights_bytes) < 0.03 * real.weights_bytes


def test_the_same_facts_are_read_once(demo_model: Path) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    assert from_facts(facts) is from_facts(facts)


def test_planning_imports_no_ml_package() -> None:
    code = (
        "import sys, modules.planner; "
        "print([m for m in ('torch', 'transformers', 'accelerate', 'bitsandbytes', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_does_not_touch_its_inputs(llama_70b: Checkpoint) -> None:
    before: Any = json.dumps(dict(llama_70b.config), sort_keys=True)
    first = plan(llama_70b, LoadOptions(), machine(24), ctx_tokens=8192)
    assert plan(llama_70b, LoadOptions(), machine(24), ctx_tokens=8192) == first
    assert json.dumps(dict(llama_70b.config), sort_keys=True) == before


def test_memory_for_many_answers_at_once_is_planned(llama_70b: Checkpoint) -> None:
    def planned(**options: Any) -> Plan:
        return plan(llama_70b, LoadOptions(**options), machine(80, 80), ctx_tokens=8192)

    def cache(one: Plan) -> int:
        return sum(device.kv_cache_bytes for device in one.devices)

    assert cache(planned(batch_tokens=32768)) == 4 * cache(planned())
    assert cache(planned(batch_tokens=4096)) == cache(planned())  # one answer has the whole context
    working = [max(device.working_bytes for device in planned(max_batch=count).devices) for count in (1, 256)]
    assert working[0] <= working[1]


def test_a_gpu_that_may_hold_nothing_is_as_none(llama_70b: Checkpoint) -> None:
    none = plan(llama_70b, LoadOptions(cpu=True), machine(24, ram=512), ctx_tokens=4096)
    given_nothing = plan(llama_70b, LoadOptions(gpu_memory=(0.0,)), machine(24, ram=512), ctx_tokens=4096)
    assert given_nothing.device_map == {"": "cpu"}
    assert given_nothing.precision == none.precision
    assert given_nothing.peak_bytes == none.peak_bytes
