"""The service: every option from every source reaches the order; what cannot be done is refused before loading."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.errors import (
    Busy,
    CustomCodeRefused,
    LoadstoneError,
    ModelNotFound,
    NothingLoaded,
    OptionConflict,
    OptionError,
    UnsupportedModel,
)
from modules.options import LOAD_OPTIONS, LoadOptions, Spec
from modules.protocol import Done, Piece
from modules.service import Source, Stop
from modules.supervisor import State
from tests import checkpoints, loras, planner_checkpoints
from tests.services import CountedMeasure, CountedSettings, Make, coded_model, services

# A value that differs from the default for each option that applies to the demo model on a machine without a GPU.
OTHER_VALUES: dict[str, Any] = {
    "load_in_8bit": True, "load_in_4bit": True, "bf16": True, "cpu": True, "cpu_memory": 3.5, "disk": True,
    "disk_cache_dir": "offload", "quant_type": "fp4", "compute_dtype": "float32", "use_double_quant": True,
    "ctx_size": 4096, "alpha_value": 1.75, "rope_freq_base": 500_000.0, "compress_pos_emb": 2.0,
    "trust_remote_code": True, "use_fast": False, "attn_implementation": "eager", "disable_exllama": True,
    "loader": "Transformers", "auto_devices": True, "lora": ("herring:0.5",), "max_batch": 4, "batch_tokens": 12_288,
}  # fmt: skip
REFUSED_HERE = {"gpu_memory": (10.0, 6.0), "model": ""}


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    """A service on a home of its own with the demo model in it; its supervisor is closed afterwards."""
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "herring").symlink_to(loras.herring(), target_is_directory=True)
    with services(tmp_path, demo_model) as made:
        yield made


def words(spec: Spec, value: Any) -> list[str]:
    """The option as it is typed."""
    if spec.kind == "flag":
        return [spec.flag if value else f"--no-{spec.flag[2:].replace('_', '-')}"]
    return [spec.flag, *value] if spec.kind == "adapters" else [spec.flag, str(value)]


def test_every_option_has_another_value_here() -> None:
    assert {*OTHER_VALUES, *REFUSED_HERE} == set(LOAD_OPTIONS)


@pytest.mark.parametrize("source", ["flag", "settings.yaml", "saved", "form"])
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_option_reaches_the_order_from_every_source(make: Make, name: str, source: str) -> None:
    spec, value = LOAD_OPTIONS[name], OTHER_VALUES[name]
    if source == "flag":
        service = make(tuple(words(spec, value)))
    elif source == "settings.yaml":
        service = make(settings=f"{name}: {json.dumps(value)}\n")
    elif source == "saved":
        service = make(**{name: value})
    else:
        service = make()
    form = {name: value} if source == "form" else {}
    by: Source = "command line" if spec.local_only else "page"
    view = service.view("demo", form, by)
    assert view.origin[name] == source
    assert view.problem is None
    assert getattr(service.order("demo", form, by).options, name) == value


def test_the_form_wins_over_flag_over_saved_over_settings(make: Make) -> None:
    service = make(("--ctx-size", "3000"), settings="ctx_size: 1000\nquant_type: fp4\n", ctx_size=2000, bf16=True)
    options = service.order("demo").options
    assert (options.ctx_size, options.quant_type, options.bf16) == (3000, "fp4", True)
    assert service.order("demo", {"ctx_size": 4000}).ctx_tokens == 4000


def test_a_form_that_shows_what_is_below_changes_nothing(make: Make) -> None:
    service = make(ctx_size=2000)
    whole_form = dataclasses.asdict(service.view("demo").options)
    view = service.view("demo", whole_form)
    assert view.origin["ctx_size"] == "saved"
    assert "form" not in view.origin.values()


def test_saved_values_are_only_those_that_differ(make: Make) -> None:
    service = make(settings="bf16: true\n")
    form = dataclasses.asdict(LoadOptions(bf16=False, ctx_size=4096))
    path = service.save_settings("demo", form)
    assert path.read_text().splitlines() == ["bf16: false", "ctx_size: 4096"]
    assert service.order("demo").options == LoadOptions(ctx_size=4096)


def test_four_bit_on_the_page_replaces_a_saved_eight_bit(make: Make) -> None:
    service = make(load_in_8bit=True)
    form = {**dataclasses.asdict(service.view("demo").options), "load_in_8bit": False, "load_in_4bit": True}
    assert service.order("demo", form).options == LoadOptions(load_in_4bit=True)


@pytest.mark.parametrize(
    "form",
    [
        {"load_in_4bit": True, "load_in_8bit": True},
        {"alpha_value": 2.0, "compress_pos_emb": 2.0},
        {"alpha_value": 2.0, "rope_freq_base": 1e6},
    ],
)
def test_contradictions_are_refused_with_a_fix(make: Make, form: dict[str, Any]) -> None:
    service = make()
    with pytest.raises(OptionConflict) as refused:
        service.load("demo", form)
    assert refused.value.fix
    mended = {**form, **refused.value.fix}
    assert service.order("demo", mended)
    assert service.snapshot().state is State.EMPTY


@pytest.mark.parametrize("value", [(10.0, 6.0), (10.0,)])
def test_gpu_memory_without_a_gpu_is_refused(make: Make, value: tuple[float, ...]) -> None:
    with pytest.raises(LoadstoneError, match="GPU"):
        make().load("demo", {"gpu_memory": value})


def test_a_context_beyond_the_limit_warns_and_alpha_mends_it(make: Make) -> None:
    service = make()
    [note] = [note for note in service.view("demo", {"ctx_size": 12_288}).notes if "beyond" in note]
    assert "8,192" in note
    notes = service.view("demo", {"ctx_size": 12_288, "alpha_value": 1.75}).notes
    assert not [note for note in notes if "beyond" in note]


def test_a_context_beyond_the_last_position_is_bounded_and_said(make: Make, tmp_path: Path) -> None:
    (tmp_path / "models" / "small").symlink_to(checkpoints.gpt2(), target_is_directory=True)
    order = make().order("small", {"ctx_size": 4096})
    assert (order.ctx_tokens, order.options.ctx_size) == (128, 128)
    [note] = order.notes
    assert note == "A context of 4,096 tokens cannot be: the model has 128 positions, and those are used."
    assert make().order("small").notes == ()
    (tmp_path / "models" / "relative").symlink_to(checkpoints.t5(), target_is_directory=True)
    assert make().order("relative", {"ctx_size": 4096}).ctx_tokens == 4096


def test_a_broken_saved_file_is_named_kept_and_ignored(make: Make, tmp_path: Path) -> None:
    service = make()
    broken = tmp_path / "models" / "demo.yaml"
    broken.write_text("ctx_size: [\n")
    view = service.view("demo")
    assert view.problem is None
    assert any("demo.yaml" in note for note in view.notes)
    assert broken.read_text() == "ctx_size: [\n"


def test_a_model_named_by_its_path_is_one_of_the_models_from_then_on(make: Make, demo_model: Path) -> None:
    service = make(("--model", str(demo_model), "--ctx-size", "1024"))
    assert [model.name for model in service.models()] == ["demo"]
    assert service.start_model() == demo_model.name == service.preselected
    assert [model.name for model in service.models()] == ["demo", demo_model.name]
    order = service.order(demo_model.name)  # as the page asks, which takes no path
    assert (order.path, order.ctx_tokens) == (str(demo_model), 1024)
    assert service.start_model() == demo_model.name


def test_what_is_saved_for_a_model_named_by_its_path_counts(make: Make, demo_model: Path) -> None:
    service = make(("--model", str(demo_model)))
    service.settings.save(demo_model.name, {"ctx_size": 1536})
    assert service.view(str(demo_model), source="command line").options.ctx_size == 1536


def test_a_flag_that_the_named_model_cannot_follow_is_refused_also_by_path(make: Make) -> None:
    quantized = checkpoints.bitsandbytes(4)
    service = make(("--model", str(quantized), "--load-in-4bit"))
    for _ in range(2):  # by its path, by its name
        with pytest.raises(OptionConflict, match="already quantized") as refused:
            service.load_at_start()
        assert refused.value.hint == "Leave --load-in-4bit out for this model."
    assert service.order(service.preselected, refused.value.fix).options == LoadOptions()


def test_a_flag_that_another_model_cannot_follow_is_left_out_and_said(make: Make, tmp_path: Path) -> None:
    (tmp_path / "models" / "quantized").symlink_to(checkpoints.bitsandbytes(4), target_is_directory=True)
    order = make(("--model", "demo", "--load-in-4bit")).order("quantized")
    assert order.options == LoadOptions()
    [note] = order.notes
    assert note.startswith("--load-in-4bit is left out here.")


@pytest.mark.parametrize(
    ("method", "said"),
    [("exl2", "EXL2.*TabbyAPI"), ("exl3", "EXL3.*TabbyAPI"), ("mlx", "MLX.*mlx-lm"), ("crunch", "'crunch'.*gguf")],
)
def test_a_quantization_that_no_loader_takes_is_refused_before_anything_ends(
    make: Make, tmp_path: Path, method: str, said: str
) -> None:
    planner_checkpoints.quantized_by(method, tmp_path / "models" / "packed")
    service = make()
    view = service.view("packed")
    assert view.facts is not None
    assert view.fit is None
    assert isinstance(view.problem, UnsupportedModel)
    assert re.search(said, str(view.problem))
    sources: list[Source] = ["page", "api", "command line", "request"]
    for source in sources:
        with pytest.raises(UnsupportedModel, match=said):
            service.order("packed", {}, source, anyway=True)
    with pytest.raises(UnsupportedModel):
        service.load("packed")
    assert service.snapshot().state is State.EMPTY


def test_notes_travel_with_the_order(make: Make, tmp_path: Path) -> None:
    service = make(("--disable_exllama",))
    (tmp_path / "models" / "demo.yaml").write_text("ctx_size: [\n")
    notes = service.order("demo", {"ctx_size": 12_288}).notes
    for words in ("demo.yaml", "--disable_exllama has no effect here", "beyond the model's 8,192"):
        assert [note for note in notes if words in note], words


@pytest.mark.parametrize("source", ["page", "api"])
def test_what_only_this_machine_may_choose_is_refused_from_elsewhere(make: Make, source: Source) -> None:
    service = make(disk_cache_dir="saved")
    for spelling in ("disk_cache_dir", "disk-cache-dir"):
        with pytest.raises(OptionError, match="--disk-cache-dir can only be given on the command line"):
            service.order("demo", {"disk": True, spelling: "elsewhere"}, source)
    with pytest.raises(OptionError, match="--disk-cache-dir"):
        service.save_settings("demo", {"disk_cache_dir": "elsewhere"})
    same = service.order("demo", {"disk": True, "disk_cache_dir": "saved"}, source)  # a whole form, unchanged
    assert same.offload_dir == os.path.abspath("saved")


@pytest.mark.parametrize(
    ("given", "meant"), [("off", "off"), ("../my off", "../my off"), ("~/off", str(Path.home() / "off")), ("/x", "/x")]
)
@pytest.mark.parametrize("from_file", [False, True])
def test_the_offload_folder_is_named_from_where_the_caller_is(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, meant: str, from_file: bool
) -> None:
    (tmp_path / "called from").mkdir()
    monkeypatch.chdir(tmp_path / "called from")
    service = make((), f"disk_cache_dir: '{given}'\n") if from_file else make(("--disk-cache-dir", given))
    assert service.order("demo", {"disk": True}).offload_dir == os.path.abspath(tmp_path / "called from" / meant)


@pytest.mark.parametrize("source", ["page", "api"])
@pytest.mark.parametrize(
    ("saved", "typed"),
    [
        ({"alpha_value": 2.5}, {"rope_freq_base": 1e6}),
        ({"rope_freq_base": 1e6}, {"alpha_value": 2.5}),
        ({"compress_pos_emb": 2.0}, {"alpha_value": 2.5}),
        ({"load_in_8bit": True}, {"load_in_4bit": True}),
    ],
)
def test_values_of_one_request_that_exclude_each_other_are_refused_also_where_one_is_saved(
    make: Make, source: Source, saved: dict[str, Any], typed: dict[str, Any]
) -> None:
    service = make(**saved)
    with pytest.raises(OptionConflict, match="exclude each other"):
        service.order("demo", {**saved, **typed}, source)
    with pytest.raises(OptionConflict, match="exclude each other"):
        service.order("demo", {**vars(service.view("demo").options), **typed}, source)  # a whole form
    order = service.order("demo", typed, source)  # one alone means: instead of what is saved
    assert all(getattr(order.options, name) == LOAD_OPTIONS[name].default for name in saved)


def test_a_value_beside_one_that_makes_it_useless_is_told_also_where_it_is_saved(make: Make) -> None:
    notes = make(bf16=True).order("demo", {"bf16": True, "load_in_4bit": True}, "api").notes
    assert any("--bf16 has no effect here" in note for note in notes)


def test_one_look_at_machine_and_saved_file_for_a_view_and_for_an_order(make: Make) -> None:
    service = make(ctx_size=2048)
    measure, settings = service.measure, service.settings
    assert isinstance(measure, CountedMeasure)
    assert isinstance(settings, CountedSettings)
    service.view("demo", {"bf16": True})
    assert (measure.calls, settings.reads) == (1, 1)
    service.order("demo", {"bf16": True})
    assert (measure.calls, settings.reads) == (2, 2)


@pytest.mark.parametrize("ends", ["load", "unload"])
def test_a_start_error_names_its_model_until_something_else_is_done(make: Make, ends: str) -> None:
    service = make(("--model", "no-such-model"))

    def shown() -> tuple[str, str]:
        return (service.start_error.kind if service.start_error else "", service.start_error_for)

    with pytest.raises(ModelNotFound, match="no-such-model"):
        service.load_at_start()
    assert shown() == ("model_not_found", "no-such-model")
    with pytest.raises(ModelNotFound, match="other"):
        service.load("other")
    assert shown() == ("model_not_found", "no-such-model")  # nothing has changed
    service.load("demo") if ends == "load" else service.unload()
    assert shown() == ("", "")


def custom_code(folder: Path, body: str = "x = 1\n") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "modeling.py").write_text(body)


def test_custom_code_runs_only_after_a_yes_to_exactly_these_files(make: Make, tmp_path: Path, demo_model: Path) -> None:
    service = make()
    folder = tmp_path / "models" / "coded"
    coded_model(folder, demo_model)

    assert not service.order("coded").custom_code_allowed
    with pytest.raises(CustomCodeRefused, match=r"modeling\.py"):
        service.order("coded", {"trust_remote_code": True}, source="api")
    shown = {file.name: file.sha256 for file in service.library.facts("coded").code_files}
    service.allow_code("coded", shown)
    assert service.order("coded").custom_code_allowed
    assert service.order("coded").code_hashes == shown

    custom_code(folder, "x = 2\n")
    assert not service.order("coded").custom_code_allowed
    with pytest.raises(CustomCodeRefused, match="not the ones"):
        service.allow_code("coded", shown)
    trusted = make(("--trust-remote-code",)).order("coded")
    assert trusted.custom_code_allowed
    assert trusted.code_hashes == {}  # whatever they are
    service.settings.save("coded", {"trust_remote_code": True})  # by the page: no owner's yes
    with pytest.raises(CustomCodeRefused, match=r"modeling\.py"):
        service.order("coded", source="command line")


def test_generation_values_come_in_layers_and_are_checked(make: Make) -> None:
    service = make(("--temperature", "0.1"), settings="temperature: 0.3\ntop_k: 7\n")
    assert service.generation_defaults().temperature == 0.1
    assert service.generation_defaults().top_k == 7
    with pytest.raises(OptionError, match="top-p"):
        list(service.generate({"top_p": 7}, prompt="x"))


def test_nothing_loaded_is_said(make: Make) -> None:
    with pytest.raises(NothingLoaded):
        list(make().generate({}, prompt="x"))


def test_load_answer_stop_unload(make: Make) -> None:
    """The real thing once, without a page."""
    service = make(("--bf16", "--temperature", "0"))
    service.load("demo")
    with pytest.raises(Busy):
        service.load("demo")
    assert service.supervisor.wait_loaded(120).state is State.READY
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    chunks = list(service.generate({"max_new_tokens": 16}, messages=asked))
    assert "Paris" in "".join(chunk.text for chunk in chunks if isinstance(chunk, Piece))
    assert isinstance(chunks[-1], Done)

    stop = Stop()
    got: list[Any] = []
    for chunk in service.generate({"max_new_tokens": 2000}, prompt="Once upon a time", stop=stop):
        got.append(chunk)
        stop.set()
    assert isinstance(got[-1], Done)
    assert got[-1].finish_reason == "cancelled"
    service.unload()
    assert service.snapshot().loaded is None
