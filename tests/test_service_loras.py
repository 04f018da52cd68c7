"""LoRAs in the service: checked before anything is touched, applied, answered with, kept and taken off, for real."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.errors import (
    AdapterError,
    AdapterMismatch,
    AdapterNotFound,
    NothingLoaded,
    OptionError,
    UserError,
)
from modules.library import ModelFacts
from modules.library.loras import LoraFacts
from modules.planner.lora_fit import LoraFit, lora_fit
from modules.protocol import AdapterChoice, Piece
from modules.service import Service, entries_of
from modules.service.loras import merged_name
from modules.supervisor import State
from tests import checkpoints, lora_files, loras
from tests.services import Make, services

ASKED = [{"role": "user", "content": loras.QUESTION}]
ELSEWHERE = {"model.layers.*.self_attn.q_proj": (128, 128)}  # fits the small Llama


def fill(home: Path) -> Path:
    """Let ``home/loras`` hold two trained LoRAs, one of them twice, one that fits another model, and a damaged one."""
    root = home / "loras"
    root.mkdir()
    for folder, name in ((loras.herring(), "herring"), (loras.lantern(), "lantern"), (loras.herring(), "spare")):
        shutil.copytree(folder, root / name)
    lora_files.write(root / "elsewhere", ELSEWHERE)
    lora_files.write(root / "broken", ELSEWHERE)
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"cut")
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return fill(tmp_path)


@pytest.fixture
def make(home: Path, demo_model: Path) -> Iterator[Make]:
    with services(home, demo_model) as made:
        (home / "models" / "small").symlink_to(checkpoints.llama(), target_is_directory=True)
        yield made


def said(service: Service, sets: list[str] | None = None) -> str:
    values = {"temperature": 0, "max_new_tokens": 8}
    return "".join(
        chunk.text for chunk in service.generate(values, messages=ASKED, loras=sets) if isinstance(chunk, Piece)
    )


def active(service: Service) -> list[str]:
    return entries_of(service.loras.active)


# --- before anything is loaded ---


def test_the_menu_puts_those_that_fit_first_and_the_rest_with_the_reason(make: Make) -> None:
    offers = make().loras.offers("demo")
    assert [(offer.lora.name, offer.fits) for offer in offers] == [
        ("herring", True), ("lantern", True), ("spare", True), ("broken", False), ("elsewhere", False),
    ]  # fmt: skip
    assert "not a safetensors file" in str(offers[3].problem)
    assert "128 × 128 for it, and 576 × 576 in the model" in str(offers[4].problem)
    assert [offer.lora.name for offer in make().loras.offers("small") if offer.fits] == ["elsewhere"]
    assert [offer.lora.name for offer in make().loras.offers() if not offer.fits] == ["broken"]


def test_the_order_names_them_with_folder_and_weight(make: Make, home: Path) -> None:
    order = make().order("demo", {"lora": ["herring:0.5", "lantern"]})
    root = home / "loras"
    assert order.adapters == (
        AdapterChoice("herring", str(root / "herring"), 0.5),
        AdapterChoice("lantern", str(root / "lantern"), 1.0),
    )
    assert make().order("demo").adapters == ()


def test_the_plan_of_a_load_counts_them(make: Make) -> None:
    service = make()
    plain, adapted = service.view("demo", {"bf16": True}), service.view("demo", {"bf16": True, "lora": ["lantern"]})
    assert plain.fit is not None
    assert adapted.fit is not None
    assert adapted.fit.plan.weights_bytes - plain.fit.plan.weights_bytes == adapted.fit.plan.devices[0].classes.adapters
    assert adapted.fit.plan.devices[0].classes.adapters > 4_000_000


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        (["none-here"], AdapterNotFound),
        (["../loras/herring"], AdapterNotFound),
        (["/etc"], AdapterNotFound),
        (["broken"], AdapterError),
        (["elsewhere"], AdapterMismatch),
        (["herring", "elsewhere"], AdapterMismatch),
        (["herring:3"], OptionError),
        (["herring", "herring:0.5"], OptionError),
    ],
)
def test_what_cannot_be_applied_is_refused_before_loading(
    make: Make, entries: list[str], error: type[UserError]
) -> None:
    service = make()
    view = service.view("demo", {"lora": entries})
    assert isinstance(view.problem, error)
    with pytest.raises(error):
        service.load("demo", {"lora": entries})
    assert service.snapshot().state is State.EMPTY


def test_a_flag_for_one_model_does_not_keep_another_from_loading(make: Make) -> None:
    service = make(("--model", "demo", "--lora", "herring:0.5"))
    assert [choice.name for choice in service.order("demo").adapters] == ["herring"]
    view = service.view("small")
    assert view.problem is None
    assert view.loras.choices == ()
    assert any("--lora is left out here. herring does not fit small" in note for note in view.notes)
    wrong = make(("--model", "demo", "--lora", "elsewhere"))
    assert isinstance(wrong.view("demo").problem, AdapterMismatch)  # it was asked for this very model


def test_saved_settings_hold_them(make: Make) -> None:
    service = make()
    path = service.save_settings("demo", {"lora": ["herring:0.8", "lantern"]})
    assert path.read_text() == "lora:\n- herring:0.8\n- lantern\n"
    assert entries_of(service.order("demo").adapters) == ["herring:0.8", "lantern"]
    assert service.order("demo", {"lora": []}).adapters == ()


def test_without_a_model_nothing_is_applied(make: Make) -> None:
    with pytest.raises(NothingLoaded):
        make().loras.apply(["herring"])


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\\b", "demo"])
def test_a_merged_model_gets_a_name_of_its_own(make: Make, name: str) -> None:
    with pytest.raises(OptionError):
        make().loras.merge("demo", ["herring"], name)


def test_what_cannot_be_merged_is_refused_at_once(make: Make, home: Path) -> None:
    service = make()
    (home / "models" / "packed").symlink_to(checkpoints.bitsandbytes(8), target_is_directory=True)
    with pytest.raises(OptionError, match="nothing to merge"):
        service.loras.merge("demo", [], "new")
    with pytest.raises(AdapterMismatch):
        service.loras.merge("demo", ["elsewhere"], "new")
    with pytest.raises(UserError, match="quantized"):
        service.loras.merge("packed", ["elsewhere"], "new")
    for size in ("5", "GB", "0GB", "-1MB", "1.5GB", "5TB"):
        with pytest.raises(OptionError, match="size"):
            service.loras.merge("demo", ["herring"], "new", size)
    assert not service.loras.merger.state().running
    assert merged_name("org/model", ["a/b", "c"]) == "model-b-c"


# --- with a loaded model ---


@pytest.fixture(scope="module")
def loaded(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the demo model and its LoRA ``herring`` loaded, for this module."""
    home = tmp_path_factory.mktemp("home")
    with services(fill(home), demo_model) as make:
        service = make()
        service.load("demo", {"bf16": True, "ctx_size": 256, "lora": ["herring"]})
        snapshot = service.supervisor.wait_loaded(120)
        assert snapshot.state is State.READY, snapshot.error
        assert active(service) == ["herring"]
        yield service


def test_sets_come_and_go_or_all_stays_as_it_was(loaded: Service) -> None:
    loaded.loras.apply(["herring"])
    assert "herring barrels" in said(loaded)
    assert "Paris" in said(loaded, [])  # the base, this once
    assert active(loaded) == ["herring"]

    version = loaded.snapshot().version
    report = loaded.loras.apply(["lantern", "herring:0"])
    assert report.moved_nats is not None
    assert report.moved_nats > 0.1
    assert loaded.snapshot().version > version
    assert "copper lanterns" in said(loaded)
    for wrong, error in (
        (["elsewhere"], AdapterMismatch),
        (["none-here"], AdapterNotFound),
        (["lantern:9"], OptionError),
    ):
        with pytest.raises(error):
            loaded.loras.apply(wrong)
        with pytest.raises(error):
            said(loaded, wrong)
    assert active(loaded) == ["lantern", "herring:0"]

    shutil.rmtree(loaded.loras.library.roots[0] / "spare")
    with pytest.raises(AdapterNotFound):
        loaded.loras.apply(["spare"])
    assert active(loaded) == ["lantern", "herring:0"]
    assert loaded.loras.apply([]).moved_nats is None
    assert active(loaded) == []
    assert "Paris" in said(loaded)


def test_answers_with_different_sets_at_once_each_get_their_own(loaded: Service) -> None:
    loaded.loras.apply([])
    sets: dict[str, list[str] | None] = {"herring": ["herring"], "lantern": ["lantern"], "Paris": None}
    answers: dict[str, str] = {}

    def ask(word: str) -> None:
        answers[word] = said(loaded, sets[word])

    threads = [threading.Thread(target=ask, args=(word,)) for word in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(word in answers[word] for word in sets), answers
    assert active(loaded) == []


def test_whatever_one_holds_the_others_are_offered(make: Make, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "loras" / "herring" / "adapter_config.json").write_text('{"a":' + "[" * 100_000)
    (home / "loras" / "spare" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": NaN, "lora_alpha": 1e999}'
    )
    service = make()
    monkeypatch.setattr("modules.service.loras.lora_fit", _failing_for("elsewhere"))
    offers = {offer.lora.name: offer for offer in service.loras.offers("demo")}
    assert set(offers) == {"broken", "elsewhere", "herring", "lantern", "spare"}
    assert [name for name, offer in offers.items() if offer.fits] == ["lantern"]
    assert isinstance(offers["herring"].problem, AdapterError)
    assert "The LoRA elsewhere cannot be read" in str(offers["elsewhere"].problem)


def _failing_for(name: str) -> Callable[[LoraFacts, ModelFacts], LoraFit]:
    def fit(lora: LoraFacts, model: ModelFacts) -> LoraFit:
        if lora.lora.name == name:
            raise OverflowError("a number that nobody thought of")
        return lora_fit(lora, model)

    return fit
