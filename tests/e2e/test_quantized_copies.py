"""A model loaded in 4-bit twice: the second load reads what the first one kept; the Session tab deletes it."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from modules import copies
from modules.demo import DEMO_MODEL
from tests.e2e.conftest import Server
from tests.test_copies import make


def test_the_second_4_bit_load_reads_the_copy_of_the_first(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker", "--cpu")
    server.load(DEMO_MODEL, load_in_4bit=True)
    [copy] = copies.copies(server.home / "models" / ".cache")
    assert (copy.model, copy.what) == (DEMO_MODEL, "nf4")
    server.load(DEMO_MODEL, load_in_4bit=True)
    server.wait_state("ready")
    assert "from the quantized copy" in str(server.info())


def test_without_the_copies_none_is_kept(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker", "--cpu", "--no-quantized-cache")
    server.load(DEMO_MODEL, load_in_4bit=True)
    server.wait_state("ready")
    assert copies.copies(server.home / "models" / ".cache") == []


def test_the_session_tab_lists_copies_and_deletes_one(
    launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    server = launch("--no-warm-worker")
    cache = server.home / "models" / ".cache"
    make(cache, "one", size=3_000_000)
    other = make(cache, "other")
    page = open_page(server)
    page.get_by_role("tab", name="Session").click()
    expect(page.locator("#session")).to_contain_text("nf4, 3 MB, made")
    expect(page.locator("#copy input")).to_have_value("one, nf4")
    page.locator("#copy-delete").click()
    expect(page.locator("#copy-question")).to_contain_text("Delete the copy one, nf4, 3 MB?")
    page.locator("#copy-no").click()
    expect(page.locator("#copy-ask")).to_be_hidden()
    expect(page.locator("#copy-delete")).to_be_focused()
    assert len(copies.copies(cache)) == 2
    choose_copy(page, "other, nf4")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("tab", name="Session").click()
    page.locator("#session-refresh").click()
    expect(page.locator("#copy input")).to_have_value("other, nf4")  # and not the first one again
    choose_copy(page, "one, nf4")
    page.locator("#copy-delete").click()
    page.locator("#copy-yes").click()
    expect(page.locator("#session")).not_to_contain_text("3 MB, made")
    assert [copy.path for copy in copies.copies(cache)] == [other]
    page.locator("#copy-delete").click()
    page.locator("#copy-yes").click()
    expect(page.locator("#copy-delete")).to_be_hidden()
    expect(page.locator("#session-refresh")).to_be_focused()
    assert copies.copies(cache) == []


def choose_copy(page: Page, label: str) -> None:
    page.locator("#copy input").click()
    page.get_by_role("option", name=label).click()
    expect(page.locator("#copy input")).to_have_value(label)
