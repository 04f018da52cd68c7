"""HTML that is typed is shown, edited and copied so, also where browsers have no clipboard for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests import checkpoints
from tests.browser import ARGUMENTS, chromium_path
from tests.e2e.chatting import settled, users
from tests.e2e.conftest import Server
from tests.e2e.test_load_from_the_browser import LOAD_MS, ask

HOST = "loadstone.test"  # by http:// and a name of its own, as on a network: not what browsers call secure
TEXT = "Why is <script>alert(1)</script> not `<b>`?"


@pytest.fixture
def elsewhere(browser: Browser) -> Iterator[Page]:
    """A page of a browser that finds HOST here."""
    arguments = [*ARGUMENTS, f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
    other = browser.browser_type.launch(executable_path=chromium_path(), args=arguments)
    yield other.new_page()
    other.close()


def test_typed_html_is_shown_edited_and_copied_as_typed(
    home: Path, launch: Callable[..., Server], elsewhere: Page
) -> None:
    (home / "models" / "small").symlink_to(checkpoints.gpt2(), target_is_directory=True)
    server = launch(
        "--model", "small", "--no-warm-worker", "--max-new-tokens", "4", "--allowed-host", HOST, "--gradio-auth", "a:b"
    )
    page = elsewhere
    page.goto(server.url.replace("127.0.0.1", HOST))
    page.locator("input[name=user]").fill("a")
    page.locator("input[name=password]").fill("b")
    page.keyboard.press("Enter")
    expect(page.locator("#card")).to_contain_text("Ready", timeout=LOAD_MS)
    assert not page.evaluate("isSecureContext")
    ask(page, TEXT)
    expect(users(page)).to_contain_text("<\u2060script>alert(1)<\u2060/script>")
    expect(users(page).locator("code")).to_have_text("<b>")
    settled(page)
    field = page.locator("#message textarea")
    users(page).hover()
    page.locator("#chatbot").get_by_role("button", name="Copy message").first.click()
    field.press("Control+V")
    expect(field).to_have_value(TEXT)
    field.fill("")
    page.locator("#chatbot").get_by_role("button", name="Copy conversation").click()
    field.press("Control+V")
    assert TEXT in field.input_value()
    field.fill("")
    page.locator("#chatbot").get_by_role("button", name="Edit").first.click()
    page.locator("#chatbot textarea").press("End")
    page.locator("#chatbot textarea").press("!")
    page.locator("#chatbot").get_by_role("button", name="Submit").click()
    expect(users(page)).to_contain_text("?!")
    page.locator("#undo").click()  # what was written comes back into the field
    expect(field).to_have_value(TEXT + "!")
