"""What a browser remembers of a form where it may keep little."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.conftest import wait_until
from tests.e2e.chatting import MEMORY
from tests.e2e.conftest import Server

LITTLE = """(most) => {
  const own = Storage.prototype.setItem;
  Storage.prototype.setItem = function (key, value) {
    if (value.length > most) throw new DOMException('full', 'QuotaExceededError');
    own.call(this, key, value);
  };
}"""


def test_a_text_that_does_not_fit_leaves_the_rest_remembered(
    quiet_server: Server, open_page: Callable[..., Page]
) -> None:
    page = open_page(quiet_server)
    page.evaluate(LITTLE, 15_000)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#system textarea").fill("x" * 20_000)
    page.locator("#option-temperature input").first.fill("1.25")
    page.locator("#option-temperature input").first.press("Tab")
    wait_until(lambda: "1.25" in (page.evaluate(MEMORY) or ""))
    page.reload()
    page.wait_for_selector("#model input")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#option-temperature input").first).to_have_value("1.25")
    expect(page.locator("#system textarea")).to_have_value("")
