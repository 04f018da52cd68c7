"""LoRAs in the browser: choose two with weights, load, chat, see the proof, switch, compare, remove, save, merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests import checkpoints, lora_files, loras
from tests.browser import unfold
from tests.e2e.conftest import Server, serving
from tests.e2e.test_load_from_the_browser import LOAD_MS, NAME, load, select_model
from tests.machine import QUICK_FLAGS

SMALL = "small"
HERRING, LANTERN = "herring barrels", "copper lanterns"


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this module, that answers briefly and without chance."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / NAME).symlink_to(demo_model, target_is_directory=True)
    (home / "models" / SMALL).symlink_to(checkpoints.llama(), target_is_directory=True)
    lora_files.write(home / "loras" / "little", {"model.layers.*.self_attn.q_proj": (128, 128)})
    shutil.copytree(loras.herring(), home / "loras" / "herring")
    shutil.copytree(loras.lantern(), home / "loras" / "lantern")
    with serving(home, *QUICK_FLAGS, "--cpu", "--temperature", "0", "--max-new-tokens", "14") as server:
        yield server


def choose(page: Page, *names: str) -> None:
    """Add LoRAs in the menu: a few letters, Enter."""
    for name in names:
        page.locator("#loras input").fill(name)
        expect(page.locator("#loras").get_by_role("option")).to_have_count(1)
        page.locator("#loras input").press("Enter")
        expect(weight_of(page, name)).to_be_visible()
        page.locator("#loras input").blur()


def weight_of(page: Page, name: str) -> Locator:
    return page.get_by_label(f"{name}, weight")


def line(page: Page) -> Locator:
    return page.locator("#lora-line")


def ask(page: Page, *expected: str, place: str = "#chatbot") -> None:
    """Ask the question in a new chat, and wait for the answer."""
    page.get_by_role("tab", name="Chat").click()
    page.locator("#clear").click()
    expect(page.locator("#chatbot")).not_to_contain_text(loras.QUESTION)
    page.locator("#message textarea").fill(loras.QUESTION)
    page.locator("#send").click()
    for words in expected:
        expect(page.locator(place)).to_contain_text(words, timeout=LOAD_MS)


def test_two_with_weights_are_chosen_applied_switched_and_removed(
    server: Server, open_page: Callable[..., Page]
) -> None:
    page, other = open_page(server), open_page(server)
    select_model(page)
    page.locator("#loras input").click()
    expect(page.locator("#loras").get_by_role("option")).to_have_count(3)
    unfit = page.locator("#loras").get_by_role("option").last  # last, greyed, with the reason
    expect(unfit).to_contain_text("✕ little · does not fit SmolLM2")
    assert unfit.evaluate("node => getComputedStyle(node).opacity") < "1"
    page.locator("#loras input").blur()

    choose(page, "herring", "lantern")
    weight_of(page, "lantern").fill("0.25")
    expect(page.locator("#lora-about")).to_contain_text("LoRA · rank 8 · alpha 16")
    expect(page.locator("#fit")).to_contain_text("Fits")
    load(page)
    expect(line(page)).to_contain_text("herring + lantern 0.25 active")
    expect(line(page)).to_contain_text("moves the next token by")
    expect(page.locator("#status")).to_contain_text("LoRA herring + lantern 0.25")
    expect(other.locator("#status")).to_contain_text("LoRA herring + lantern 0.25")
    ask(page, HERRING)

    page.get_by_role("tab", name="Model").click()
    weight_of(page, "herring").fill("0")
    weight_of(page, "lantern").fill("1")
    page.locator("#lora-apply").click()  # at once: what was typed last counts
    expect(line(page)).to_contain_text("herring 0 + lantern active")
    assert server.info()["lora_weights"] == [0, 1]
    ask(page, LANTERN)

    page.get_by_role("tab", name="Model").click()
    page.locator("#lora-remove").click()
    expect(line(page)).to_contain_text("No LoRA is active")
    expect(weight_of(page, "herring")).to_be_hidden()
    expect(page.locator("#lora-remove")).to_be_disabled()
    expect(page.locator("#status")).not_to_contain_text("LoRA")
    expect(other.locator("#status")).not_to_contain_text("LoRA")
    ask(page, "Paris")


def test_what_another_tab_applies_is_shown_and_reload_keeps_it(server: Server, open_page: Callable[..., Page]) -> None:
    ready(server)
    page = open_page(server)
    expect(line(page)).to_contain_text("No LoRA is active")
    assert server.call("/v1/internal/lora/load", {"lora_names": ["lantern:0.5"]})[0] == 200
    expect(line(page)).to_contain_text("lantern 0.5 active")
    expect(weight_of(page, "lantern")).to_have_value("0.5")  # in the menu too: nothing was chosen by hand

    page.locator("#save").click()
    expect(page.get_by_text(f"Saved for {NAME}")).to_be_visible()
    assert "- lantern:0.5" in (server.home / "models" / f"{NAME}.yaml").read_text()
    page.locator("#reload").click()
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#card")).to_contain_text("Ready", timeout=LOAD_MS)
    expect(line(page)).to_contain_text("lantern 0.5 active")
    page.locator("#forget").click()
    page.locator("#forget-yes").click()
    assert server.call("/v1/internal/lora/unload", {})[0] == 200


def test_one_that_cannot_be_applied_changes_nothing_and_says_why(
    server: Server, open_page: Callable[..., Page]
) -> None:
    ready(server)
    assert server.call("/v1/internal/lora/load", {"lora_names": ["herring"]})[0] == 200
    page = open_page(server)
    expect(weight_of(page, "herring")).to_be_visible()
    choose(page, "little")
    expect(page.locator("#lora-about")).to_contain_text("little does not fit")
    expect(page.locator("#fit")).to_contain_text("little does not fit")  # a load would be refused too
    page.locator("#lora-apply").click()
    expect(line(page).locator(".error")).to_contain_text("little does not fit")
    expect(line(page)).to_contain_text("herring active")
    assert server.info()["lora_names"] == ["herring"]
    assert server.call("/v1/internal/lora/unload", {})[0] == 200


def test_two_sets_answer_side_by_side(server: Server, open_page: Callable[..., Page]) -> None:
    ready(server)
    assert server.call("/v1/internal/lora/load", {"lora_names": ["herring"]})[0] == 200
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#other")).to_be_hidden()
    page.locator("#chat-beside input").click()
    page.get_by_role("option").filter(has_text="the base model").click()
    expect(page.locator("#other")).to_be_visible()
    ask(page, HERRING)
    expect(page.locator("#other")).to_contain_text("Paris", timeout=LOAD_MS)
    expect(page.locator("#chatbot")).not_to_contain_text("Paris")

    page.locator("#chat-loras input").fill("herring 0 + lantern")  # a set written by hand, for this message alone
    page.locator("#chat-loras input").press("Enter")
    ask(page, LANTERN)
    expect(page.locator("#other")).to_contain_text("Paris", timeout=LOAD_MS)
    assert server.info()["lora_names"] == ["herring"]
    assert server.call("/v1/internal/lora/unload", {})[0] == 200


def test_a_merged_model_is_in_the_menu(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    choose(page, "little")
    unfold(page.locator("#merge").get_by_role("button").first)
    page.locator("#merge-name input, #merge-name textarea").first.fill("grown")
    page.locator("#merge-start").click()
    expect(page.locator("#merge-cancel")).to_be_visible()
    expect(page.locator("#merge-line")).to_contain_text("grown is in the model menu", timeout=LOAD_MS)
    expect(page.locator("#merge-cancel")).to_be_hidden()
    select_model(page, "grown")
    expect(page.locator("#summary")).to_contain_text("LlamaForCausalLM")
    expect(weight_of(page, "little")).to_be_hidden()  # none is chosen for a new model
    choose(page, "little")
    page.locator("#merge-start").click()  # the name is taken by now
    expect(page.locator("#merge-line")).to_contain_text("There is a model grown already")


def ready(server: Server) -> None:
    """The demo model is loaded, with no LoRA."""
    if server.info()["model_name"] != NAME:
        assert server.load(NAME)[0] == 200
    elif server.info()["lora_names"]:
        assert server.call("/v1/internal/lora/unload", {})[0] == 200
