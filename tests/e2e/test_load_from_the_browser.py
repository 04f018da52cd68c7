"""What a person does on the page, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import unfold
from tests.e2e.conftest import Server
from tests.machine import QUICK_FLAGS

NAME = "SmolLM2-135M-Instruct"
LOAD_MS = 90_000


def select_model(page: Page, name: str = NAME) -> None:
    """Choose a model in the menu, as a person would: only if another one is chosen, and look at what it is."""
    expect(page.locator("#summary .small")).to_be_visible(timeout=20_000)  # the page has been filled in
    menu = page.locator("#model input")
    if not menu.input_value().startswith(f"{name} · "):
        menu.click()
        page.get_by_role("option", name=re.compile(rf"^{re.escape(name)} · ")).click()
    expect(page.locator(f"#summary [data-model='{name}']")).to_be_visible(timeout=10_000)
    expect(page.locator("#load")).to_be_enabled()


def load(page: Page) -> None:
    page.locator("#load").click()
    expect(page.locator("#card")).to_contain_text("Ready", timeout=LOAD_MS)


def ask(page: Page, text: str) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")


def answer_line(page: Page) -> str:
    expect(page.locator("#chat-line")).to_contain_text("tokens", timeout=LOAD_MS)
    return page.locator("#chat-line").inner_text()


def test_pick_set_options_load_chat_stop_unload(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--temperature", "0")
    page = open_page(server)
    select_model(page)
    expect(page.locator("#summary")).to_contain_text("135 M")
    page.locator("#option-precision").get_by_label("4-bit").check()
    expect(page.locator("#option-bf16")).to_have_count(0)
    load(page)
    expect(page.locator("#card")).to_contain_text("Linear4bit")
    expect(page.locator("#status")).to_contain_text("4-bit nf4")

    ask(page, "What is the capital of France? Answer in one word.")
    assert "tokens/s" in answer_line(page)
    expect(page.locator("#chatbot .bot").last).to_contain_text("Paris")

    page.locator("#option-max_new_tokens input").fill("2000")
    ask(page, "Write a very long story about the sea.")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#chatbot .bot").last).to_contain_text(re.compile(r"\w{3,} \w+"), timeout=LOAD_MS)
    page.keyboard.press("Escape")
    expect(page.locator("#chat-line")).to_contain_text("stopped", timeout=5_000)
    expect(page.locator("#send")).to_be_visible()

    page.get_by_role("tab", name="Model").click()
    page.locator("#unload").click()
    expect(page.locator("#card")).to_contain_text("No model loaded", timeout=10_000)
    assert server.info()["model_name"] is None


def test_saved_settings_come_back_with_the_model(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker")
    page = open_page(server)
    select_model(page)
    page.locator("#option-precision").get_by_label("8-bit").check()
    page.locator("#option-ctx_size input").fill("4096")
    page.locator("#option-ctx_size input").press("Tab")
    page.locator("#save").click()
    expect(page.get_by_text(f"Saved for {NAME}")).to_be_visible()
    assert "load_in_8bit: true" in (server.home / "models" / f"{NAME}.yaml").read_text()

    page.reload()
    expect(page.locator("#option-precision").get_by_label("8-bit")).to_be_checked(timeout=10_000)
    expect(page.locator("#option-ctx_size input")).to_have_value("4096")
    expect(page.locator("#option-precision")).to_contain_text("from saved")


def test_two_tabs_see_the_same_state(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch()
    one, other = open_page(server), open_page(server)
    select_model(one)
    load(one)
    expect(other.locator("#status")).to_contain_text(NAME, timeout=5_000)
    expect(other.locator("#card")).to_contain_text("Ready")
    other.locator("#unload").click()
    expect(one.locator("#card")).to_contain_text("No model loaded", timeout=10_000)


def test_a_failing_load_shows_what_to_change(
    launch: Callable[..., Server], open_page: Callable[..., Page], home: Path, demo_model: Path
) -> None:
    broken = home / "models" / "broken"
    broken.mkdir()
    for file in demo_model.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    weights = (demo_model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])

    server = launch("--no-warm-worker")
    page = open_page(server)
    select_model(page, "broken")
    page.locator("#load").click()
    card = page.locator("#card")
    expect(card).to_contain_text("model.safetensors", timeout=LOAD_MS)
    expect(card).to_contain_text("Download the file")
    select_model(page)
    load(page)


def test_contradictory_options_are_said_before_loading(
    launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    page = open_page(launch("--no-warm-worker"))
    select_model(page)
    unfold(page.locator("#group-rope").get_by_role("button").first)
    page.locator("#option-alpha_value input").fill("2")
    page.locator("#option-compress_pos_emb input").fill("2")
    page.locator("#option-compress_pos_emb input").press("Tab")
    expect(page.locator("#fit")).to_contain_text("exclude each other")
    page.locator("#load").click()
    expect(page.locator("#card")).to_contain_text("exclude each other")
    expect(page.locator("#fix")).to_be_visible()


def test_what_does_not_apply_is_greyed_with_the_reason(
    launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    page = open_page(launch("--no-warm-worker"))
    select_model(page)
    expect(page.locator("#option-gpu_memory")).to_contain_text("no GPU")
    expect(page.locator("#option-gpu_memory textarea, #option-gpu_memory input")).to_be_disabled()


def test_edit_regenerate_and_take_back(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--model", NAME, *QUICK_FLAGS, "--temperature", "0", "--max-new-tokens", "12")
    server.wait_state("ready")
    page = open_page(server)
    ask(page, "Say hello.")
    first = answer_line(page)
    assert "cut at the length limit" in first or "tokens" in first
    said = page.locator("#chatbot .bot").last.inner_text()
    page.locator("#regenerate").click()
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_visible(timeout=LOAD_MS)
    assert page.locator("#chatbot .bot").last.inner_text() == said  # greedy: the same again
    page.locator("#undo").click()
    expect(page.locator("#message textarea")).to_have_value("Say hello.")
    expect(page.locator("#chatbot .bot")).to_have_count(0)


def test_each_tab_has_its_own_conversation(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--model", NAME, *QUICK_FLAGS, "--max-new-tokens", "8")
    server.wait_state("ready")
    one, other = open_page(server), open_page(server)
    ask(one, "First tab here.")
    answer_line(one)
    other.get_by_role("tab", name="Chat").click()
    expect(other.locator("#chatbot .user")).to_have_count(0)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_width(
    launch: Callable[..., Server], open_page: Callable[..., Page], width: int, dark: bool
) -> None:
    page = open_page(launch("--no-warm-worker"), width=width)
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.reload()
    page.wait_for_selector("#model input")
    for tab in ("Model", "Chat", "Session"):
        page.get_by_role("tab", name=tab).click()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{tab} is {overflow} pixels too wide"
