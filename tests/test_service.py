"""The service: every option from every source reaches the order; what cannot be done is refused before loading."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modules import flags
from modules.devices import Machine
from modules.errors import Busy, CustomCodeRefused, LoadstoneError, NothingLoaded, OptionConflict, OptionError
from modules.library import Library
from modules.options import LOAD_OPTIONS, LoadOptions, Spec
from modules.protocol import Done, Piece
from modules.service import Service, Source
from modules.settings import CodeApprovals, Settings
from modules.supervisor import State, Supervisor

MACHINE = Machine(gpus=(), ram_total_bytes=16 * 2**30, ram_free_bytes=12 * 2**30, disk_free_bytes=2**40)
Make = Callable[..., Service]

# A value that differs from the default for each option that applies to the demo model on a machine without a GPU.
OTHER_VALUES: dict[str, Any] = {
    "load_in_8bit": True, "load_in_4bit": True, "bf16": True, "cpu": True, "cpu_memory": 3.5, "disk": True,
    "disk_cache_dir": "offload", "quant_type": "fp4", "compute_dtype": "float32", "use_double_quant": True,
    "ctx_size": 4096, "alpha_value": 1.75, "rope_freq_base": 500_000.0, "compress_pos_emb": 2.0,
    "trust_remote_code": True, "use_fast": False, "attn_implementation": "eager", "disable_exllama": True,
    "loader": "Transformers", "auto_devices": True,
}  # fmt: skip
REFUSED_HERE = {"gpu_memory": (10.0, 6.0), "model": ""}


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    """A service on a home of its own with the demo model in it; its supervisor is closed afterwards."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "demo").symlink_to(demo_model, target_is_directory=True)
    made: list[Service] = []

    def service(argv: tuple[str, ...] = (), settings: str = "", **saved: Any) -> Service:
        (tmp_path / "settings.yaml").write_text(settings)
        parsed = flags.parse(argv)
        assert isinstance(parsed, flags.Parsed)
        kept = Settings(tmp_path / "settings.yaml", models)
        if saved:
            kept.save("demo", saved)
        made.append(
            Service(
                Library([models]), kept, CodeApprovals(models / ".cache" / "allowed-code.json"),
                Supervisor(warm_worker=False), lambda: MACHINE, cache_dir=models / ".cache",
                flags=parsed.load, generation_flags=parsed.generation,
            )
        )  # fmt: skip
        return made[-1]

    yield service
    for one in made:
        one.supervisor.close()


def words(spec: Spec, value: Any) -> list[str]:
    """The option as it is typed."""
    if spec.kind == "flag":
        return [spec.flag if value else f"--no-{spec.flag[2:].replace('_', '-')}"]
    return [spec.flag, str(value)]


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


def test_a_broken_saved_file_is_named_kept_and_ignored(make: Make, tmp_path: Path) -> None:
    service = make()
    broken = tmp_path / "models" / "demo.yaml"
    broken.write_text("ctx_size: [\n")
    view = service.view("demo")
    assert view.problem is None
    assert any("demo.yaml" in note for note in view.notes)
    assert broken.read_text() == "ctx_size: [\n"


def custom_code(folder: Path, body: str = "x = 1\n") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "modeling.py").write_text(body)


def test_custom_code_runs_only_after_a_yes_to_exactly_these_files(make: Make, tmp_path: Path, demo_model: Path) -> None:
    service = make()
    folder = tmp_path / "models" / "coded"
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((demo_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.M"}}))
    custom_code(folder)

    assert not service.order("coded").custom_code_allowed
    with pytest.raises(CustomCodeRefused, match=r"modeling\.py"):
        service.order("coded", {"trust_remote_code": True}, source="api")
    shown = {file.name: file.sha256 for file in service.library.facts("coded").code_files}
    service.allow_code("coded", shown)
    assert service.order("coded").custom_code_allowed

    custom_code(folder, "x = 2\n")
    assert not service.order("coded").custom_code_allowed
    with pytest.raises(CustomCodeRefused, match="not the ones"):
        service.allow_code("coded", shown)
    assert make(("--trust-remote-code",)).order("coded").custom_code_allowed


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

    stopped = threading.Event()
    got: list[Any] = []
    for chunk in service.generate({"max_new_tokens": 2000}, prompt="Once upon a time", stopped=stopped):
        got.append(chunk)
        stopped.set()
    assert isinstance(got[-1], Done)
    assert got[-1].finish_reason == "cancelled"
    service.unload()
    assert service.snapshot().loaded is None
