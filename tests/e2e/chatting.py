"""Talking with a model on the Chat tab: what the tests of it share."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, expect

from tests.conftest import wait_until
from tests.e2e.conftest import Server
from tests.e2e.test_load_from_the_browser import LOAD_MS, ask

LONG = "Write a very long story about the sea."
SHORT = "Say hello."
MEMORY = "localStorage.getItem('loadstone-chat')"


def generating(server: Server) -> int:
    return int(server.call("/v1/internal/model/status")[1]["generating"])


def users(page: Page) -> Locator:
    return page.locator("#chatbot .message.user")


def bots(page: Page) -> Locator:
    return page.locator("#chatbot .message.bot")


def answered(page: Page, text: str) -> str:
    """The answer to ``text``, whole."""
    before = users(page).count()
    ask(page, text)
    expect(users(page)).to_have_count(before + 1)
    settled(page)
    return bots(page).last.inner_text()


def new_chat(page: Page) -> None:
    page.locator("#clear").click()
    expect(users(page)).to_have_count(0)


def settled(page: Page) -> None:
    """Wait until an answer that was asked for has begun and ended."""
    expect(page.locator("#message textarea")).to_have_value("")
    expect(page.locator("#stop")).to_be_hidden(timeout=LOAD_MS)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#chat-line")).to_contain_text("first token", timeout=LOAD_MS)


def stream(page: Page) -> None:
    """Ask for a long answer, and wait until it is coming."""
    page.get_by_role("tab", name="Chat").click()
    page.locator("#option-max_new_tokens input").fill("2000")
    ask(page, LONG)
    expect(bots(page).last).to_contain_text(re.compile(r"\w{3,} \w+"), timeout=LOAD_MS)
    expect(page.locator("#stop")).to_be_visible()


def quiet(page: Page, server: Server) -> None:
    """Nothing is generated any more, and the next message can be sent."""
    wait_until(lambda: generating(server) == 0, 10)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()


def kept(page: Page, change: Callable[[], None]) -> None:
    """Change a field, and wait until the browser has kept something else than before."""
    before = page.evaluate(MEMORY)
    change()
    wait_until(lambda: page.evaluate(MEMORY) != before)


def pasted(page: Page) -> None:
    page.locator("#system textarea").click()
    page.keyboard.insert_text("Answer in rhyme.")


def typed_quickly(page: Page) -> None:
    page.locator("#system textarea").press_sequentially("Answer in rhyme.")


def asked(server: Server, who: str) -> http.client.HTTPResponse:
    """A long answer to somebody else, whose first words are there or who waits; closing it makes room."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 2000, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {who}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection.getresponse()
