"""What one place changes, every other shows: another browser tab, a program, another tab of the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests import checkpoints, lora_files
from tests.e2e.conftest import Server, serving
from tests.e2e.test_load_from_the_browser import select_model

SMALL, OTHER = "small", "other"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two small models, of which nothing is loaded, and a LoRA for them."""
    home = tmp_path_factory.mktemp("home")
    lora_files.write(home / "loras" / "first", {"model.layers.*.self_attn.q_proj": (128, 128)})
    for name in (SMALL, OTHER):
        checkpoints.copied(checkpoints.llama(), home / "models" / name)
    with serving(home, "--no-warm-worker") as server:
        yield server


def test_what_fits_is_said_anew_when_a_program_loads_and_unloads(
    server: Server, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    fit = page.locator("#fit")
    expect(fit).to_contain_text("Fits.")
    before = fit.inner_html()
    assert server.load(OTHER)[0] == 200
    expect(page.locator("#card")).to_contain_text(f"Ready · {OTHER}")
    page.wait_for_function("before => document.querySelector('#fit').innerHTML !== before", arg=before)
    loaded = fit.inner_html()
    assert server.call("/v1/internal/model/unload", {})[0] == 200
    page.wait_for_function("loaded => document.querySelector('#fit').innerHTML !== loaded", arg=loaded)


def test_the_model_tabs_menus_are_as_new_as_its_opening(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    menu = page.locator("#model input")
    page.get_by_role("tab", name="Session").click()
    lora_files.write(server.home / "loras" / "second", {"model.layers.*.self_attn.q_proj": (128, 128)})
    page.locator("#shelf-model input").click()
    page.get_by_role("option", name=OTHER).click()
    page.locator("#shelf-delete").click()
    page.locator("#shelf-yes").click()
    expect(page.locator("#shelf-line")).to_contain_text("is deleted")
    page.get_by_role("tab", name="Model", exact=True).click()
    expect(menu).to_have_value(re.compile(SMALL))
    page.locator("#loras input").click()
    expect(page.locator("#loras").get_by_role("option")).to_have_count(2)
    page.locator("#loras input").blur()
    menu.click()
    expect(page.locator("#model").get_by_role("option", name=re.compile(f"^{OTHER} · "))).to_have_count(0)
    expect(page.locator("#model").get_by_role("option", name=re.compile(f"^{SMALL} · "))).to_have_count(1)


def test_a_page_that_is_opened_shows_the_model_that_is_loaded(server: Server, open_page: Callable[..., Page]) -> None:
    """That something is loaded is told while the page is still being filled, and no model is chosen on it yet."""
    assert server.load(SMALL)[0] == 200
    for _ in range(4):
        page = open_page(server)
        expect(page.locator(f"#summary [data-model='{SMALL}']")).to_be_visible()
        page.wait_for_timeout(1500)  # until what was asked meanwhile has been answered
        expect(page.locator(f"#summary [data-model='{SMALL}'][data-loaded]")).to_be_visible()
        expect(page.locator("#fit")).to_contain_text("Fits.")
