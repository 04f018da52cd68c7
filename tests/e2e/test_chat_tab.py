"""The Chat tab: modes, the system prompt, editing, stopping, and what is remembered."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests import checkpoints
from tests.conftest import wait_until
from tests.e2e.chatting import (
    LONG,
    SHORT,
    answered,
    asked,
    bots,
    generating,
    kept,
    new_chat,
    pasted,
    quiet,
    settled,
    stream,
    typed_quickly,
    users,
)
from tests.e2e.conftest import Server, serving
from tests.e2e.test_load_from_the_browser import LOAD_MS, NAME, answer_line, ask
from tests.machine import QUICK_OPTIONS

NO_TEMPLATE = "no-template"


@pytest.fixture(scope="module")
def shared(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this module; answers are greedy and short unless a test asks for more."""
    models = tmp_path_factory.mktemp("home") / "models"
    models.mkdir()
    (models / NAME).symlink_to(demo_model, target_is_directory=True)
    (models / NO_TEMPLATE).symlink_to(checkpoints.gpt2(), target_is_directory=True)
    with serving(models.parent, "--temperature", "0", "--max-new-tokens", "12") as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    """The module's server with the demo model loaded and nothing being generated."""
    if shared.info()["model_name"] != NAME:
        assert shared.load(NAME, **QUICK_OPTIONS)[0] == 200
    wait_until(lambda: generating(shared) == 0)
    return shared


# --- modes ---


def test_a_model_without_template_is_continued(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    mode = page.locator("#mode")
    expect(mode.get_by_label("Chat")).to_be_checked()
    assert server.load(NO_TEMPLATE)[0] == 200
    expect(mode.get_by_label("Completion")).to_be_checked()
    expect(mode.get_by_label("Chat")).to_be_disabled()
    expect(mode).to_contain_text("no chat template")
    ask(page, "parser.add_argument(")
    assert "tokens" in answer_line(page)
    expect(bots(page)).to_have_count(1)


def test_completion_goes_on_with_the_text(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#mode").get_by_label("Completion").check()
    assert "five, six" in answered(page, "One, two, three, four,")


def test_the_system_prompt_has_an_effect(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    question = "What is your name?"
    plain = answered(page, question)
    new_chat(page)
    page.locator("#system textarea").fill("Your name is Captain Redbeard. You are a pirate.")
    assert "Redbeard" in answered(page, question)
    new_chat(page)
    page.locator("#system textarea").fill("")
    assert answered(page, question) == plain  # greedy: without it the first answer again
    assert "Redbeard" not in plain


# --- changing what was said ---


def test_an_edited_question_is_answered_anew(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    answered(page, SHORT)
    answered(page, "And goodbye?")
    expect(users(page)).to_have_count(2)
    users(page).first.hover()
    page.locator("#chatbot").get_by_role("button", name="Edit").first.click()
    box = page.locator("#chatbot textarea")
    box.fill("What is the capital of France?")
    page.locator("#chatbot").get_by_role("button", name="Submit").click()
    expect(users(page)).to_have_count(1)  # the later turn is gone
    expect(bots(page).last).to_contain_text("Paris", timeout=LOAD_MS)
    settled(page)
    expect(bots(page)).to_have_count(1)
    expect(users(page)).to_contain_text("France")


def test_text_comes_between_two_renderings(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    stream(page)
    page.wait_for_function(
        """() => {
          const line = document.querySelector('#chat-line [data-live]');
          const tail = document.querySelector('#chatbot .tail');
          const rendered = Number(line?.dataset.rendered ?? 0);
          if (!rendered || !tail?.textContent.length) return false;
          const shown = tail.closest('.md').textContent.length;
          if (window.before?.rendered === rendered && shown > window.before.shown) return true;
          window.before = {rendered, shown};
          return false;
        }""",
        polling=100, timeout=60_000,
    )  # fmt: skip
    page.locator("#stop").click()
    expect(page.locator("#chat-line")).to_contain_text("stopped", timeout=LOAD_MS)
    expect(page.locator("#chatbot .tail")).to_have_count(0)


def test_stop_keeps_what_has_come(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    stream(page)
    come = bots(page).inner_text()
    page.locator("#stop").click()
    expect(page.locator("#chat-line")).to_contain_text("stopped", timeout=5_000)
    quiet(page, server)
    expect(bots(page)).to_have_count(1)
    assert bots(page).inner_text().startswith(come)
    page.locator("#option-max_new_tokens input").fill("8")
    ask(page, SHORT)
    expect(bots(page)).to_have_count(2)
    settled(page)


def test_an_answer_that_still_comes_is_not_generated_twice(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    stream(page)
    expect(page.locator("#regenerate")).to_be_disabled()
    bots(page).last.hover()
    retry = page.locator("#chatbot").get_by_role("button", name="Retry")
    if retry.count() and retry.is_enabled():  # Gradio's own button on the answer
        retry.click()
        expect(bots(page).last).to_contain_text(re.compile(r"\w{3,} \w+"), timeout=LOAD_MS)
    assert generating(server) == 1
    page.locator("#stop").click()
    quiet(page, server)
    expect(users(page)).to_have_count(1)
    expect(bots(page)).to_have_count(1)
    expect(page.locator("#regenerate")).to_be_enabled()


def test_a_new_chat_after_a_stopped_answer_is_empty(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    stream(page)
    expect(page.locator("#clear")).to_be_disabled()  # Stop comes first
    page.locator("#stop").click()
    page.locator("#clear").click()
    expect(users(page)).to_have_count(0)
    quiet(page, server)
    page.locator("#option-max_new_tokens input").fill("8")
    answered(page, SHORT)  # nothing of the old chat comes back with the next one
    expect(users(page)).to_have_count(1)
    expect(bots(page)).to_have_count(1)


# --- what is remembered, and what is not there ---


def test_sampling_and_system_prompt_come_back(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#system textarea").fill("Answer in rhyme")
    kept(page, lambda: page.locator("#system textarea").press("."))
    kept(page, lambda: page.locator("#option-temperature input").fill("1.25"))
    kept(page, lambda: page.locator("#option-max_new_tokens input").fill("33"))
    page.reload()
    page.wait_for_selector("#model input")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#system textarea")).to_have_value("Answer in rhyme.", timeout=10_000)
    expect(page.locator("#option-temperature input").first).to_have_value("1.25")
    expect(page.locator("#option-max_new_tokens input").first).to_have_value("33")
    expect(users(page)).to_have_count(0)


@pytest.mark.parametrize("give", [pasted, typed_quickly])
def test_a_system_prompt_comes_back_however_it_was_given(
    server: Server, open_page: Callable[..., Page], give: Callable[[Page], None]
) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()

    def change() -> None:
        give(page)
        page.locator("#message textarea").click()

    kept(page, change)
    page.reload()
    page.wait_for_selector("#model input")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#system textarea")).to_have_value("Answer in rhyme.", timeout=10_000)


def test_asking_without_a_model_keeps_the_text(server: Server, open_page: Callable[..., Page]) -> None:
    assert server.call("/v1/internal/model/unload", {})[0] == 200
    page = open_page(server)
    ask(page, "Is anybody there?")
    expect(page.locator("#chat-line")).to_contain_text("No model is loaded")
    expect(page.locator("#message textarea")).to_have_value("Is anybody there?")
    expect(users(page)).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_who_has_to_wait_is_told_how_many_are_before(
    server: Server, open_page: Callable[..., Page], width: int
) -> None:
    assert server.load(NAME, **QUICK_OPTIONS, max_batch=1)[0] == 200
    page = open_page(server, width=width)
    first = asked(server, "first")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, server, "second")
        wait_until(lambda: generating(server) == 2)
        ask(page, SHORT)
        line = page.locator("#chat-line")
        expect(line).to_contain_text("waiting, 1 before you")
        box = line.bounding_box()
        assert box
        assert 0 <= box["x"] <= width - box["width"]
        first.close()
        expect(line).to_contain_text("waiting, next")
        waiting.result().close()
    assert "tokens/s" in answer_line(page)
    expect(bots(page)).to_have_count(1)


# --- a reload, and what nothing came of ---


def reloaded(page: Page) -> Page:
    page.reload()
    page.wait_for_selector("#model input", state="attached")
    page.get_by_role("tab", name="Chat").click()
    return page


def test_the_conversation_comes_back_after_a_reload_and_goes_on(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    first = answered(page, SHORT)
    for _ in range(2):
        reloaded(page)
        expect(bots(page)).to_have_text([re.compile(re.escape(first.splitlines()[0]))])
        expect(users(page)).to_contain_text(SHORT)
    answered(page, "And goodbye?")
    expect(users(page)).to_have_count(2)
    new_chat(page)
    reloaded(page)
    expect(page.locator("#message textarea")).to_be_visible()
    expect(users(page)).to_have_count(0)


def test_a_reload_while_the_answer_comes_keeps_the_question_and_what_has_come(
    server: Server, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    stream(page)
    kept_words = "JSON.parse(sessionStorage.getItem('loadstone-chat') ?? '[]').at(-1)?.content"
    wait_until(lambda: len(json.dumps(page.evaluate(kept_words))) > 80)
    reloaded(page)
    expect(users(page)).to_contain_text(LONG)
    expect(bots(page)).to_contain_text(re.compile(r"\w{3,} \w+"))
    quiet(page, server)


def test_what_is_typed_after_enter_stays(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    field = page.locator("#message textarea")
    field.fill(SHORT)
    field.press("Enter")
    page.keyboard.type("my next one")
    expect(page.locator("#chat-line")).to_contain_text("first token", timeout=LOAD_MS)
    expect(field).to_have_value("my next one")
    expect(users(page)).to_have_text([re.compile(SHORT)])


def test_what_is_sent_while_an_answer_comes_is_not_lost(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#option-max_new_tokens input").fill("2000")
    field = page.locator("#message textarea")
    field.fill(LONG)
    field.press("Enter")
    page.keyboard.type("and then?")
    page.keyboard.press("Enter")  # at once: before the page shows that it waits
    expect(page.locator("#stop")).to_be_visible()
    expect(users(page)).to_have_text([re.compile(LONG)])
    page.wait_for_timeout(1200)
    expect(field).to_have_value("and then?")
    page.locator("#stop").click()
    quiet(page, server)


def test_a_stop_before_the_first_word_leaves_things_as_they_were(
    server: Server, open_page: Callable[..., Page]
) -> None:
    assert server.load(NAME, **QUICK_OPTIONS, max_batch=1)[0] == 200
    page = open_page(server)
    answer = answered(page, SHORT)
    other = asked(server, "other")
    page.locator("#regenerate").click()
    expect(page.locator("#chat-line")).to_contain_text("waiting")
    page.locator("#stop").click()
    expect(page.locator("#send")).to_be_visible()
    assert bots(page).last.inner_text() == answer
    ask(page, "And goodbye?")
    expect(page.locator("#chat-line")).to_contain_text("waiting")
    page.locator("#stop").click()
    expect(page.locator("#message textarea")).to_have_value("And goodbye?")
    expect(users(page)).to_have_count(1)
    other.close()


def test_without_a_model_nothing_is_edited_away(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    answered(page, SHORT)
    answered(page, "And goodbye?")
    edit = page.locator("#chatbot").get_by_role("button", name="Edit")
    expect(edit).to_have_count(4)
    assert server.call("/v1/internal/model/unload", {})[0] == 200
    expect(edit).to_have_count(0)  # what follows an edited message would be gone, with nobody to answer
    page.locator("#regenerate").click()
    expect(page.locator("#chat-line")).to_contain_text("No model is loaded")
    expect(users(page)).to_have_count(2)
    expect(bots(page)).to_have_count(2)
    reloaded(page)
    expect(bots(page)).to_have_count(2)
    expect(edit).to_have_count(0)
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200
    expect(edit).to_have_count(4)


def test_a_picture_in_a_message_tells_nobody(server: Server, open_page: Callable[..., Page]) -> None:
    hits: list[str] = []

    class Spy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Spy) as spy:
        threading.Thread(target=spy.serve_forever, daemon=True).start()
        page = open_page(server)
        refused: list[str] = []
        page.on("console", lambda told: refused.append(told.text))
        answered(page, f"Look: ![a](http://127.0.0.1:{spy.server_port}/leak?secret=1) done")
        wait_until(lambda: any("Content Security Policy" in text for text in refused))
        spy.shutdown()
    assert not hits


@pytest.mark.parametrize("width", [1280, 390])
def test_a_tables_words_are_whole(server: Server, open_page: Callable[..., Page], width: int) -> None:
    page = open_page(server, width=width)
    words = ["Configuration", "Quantization", "Architecture", "Temperature", "Parallelism", "Performance"]
    rows = ["| " + " | ".join(words) + " |", "|" + "---|" * 6, "| " + " | ".join(words) + " |"]
    page.get_by_role("tab", name="Chat").click()
    page.locator("#message textarea").fill("\n".join(rows))
    page.locator("#send").click()
    cell = users(page).locator("td").first
    expect(cell).to_be_visible()
    box = cell.bounding_box()
    assert box
    assert box["width"] > 80
    assert box["height"] < 60
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    settled(page)
