"""One user's 256 tokens: from the service, and as they appear on the Chat tab, against bare ``generate()``."""

from __future__ import annotations

import statistics
import time
from typing import Any

from modules.demo import DEMO_MODEL as NAME
from tests.benchmarks.common import Row, call, free_port, medians, ratio_row, server_command, started
from tests.benchmarks.many import Bare, ask
from tests.browser import chromium_page
from tests.machine import QUICK_FLAGS

TOKENS = 256
PROMPT = "Write a long story about a lighthouse keeper and the sea."

ASKED = [{"role": "user", "content": PROMPT}]


def rows(runs: int = 5) -> list[Row]:
    """Tokens per second from the first token to the last. Greedy, so every run makes the same tokens.

    Bare and ours take turns, so that a slow spell of the machine hits both.
    """
    bare, port = Bare(), free_port()
    flags = ["--model", NAME, *QUICK_FLAGS, "--temperature", "0", "--max-new-tokens", str(TOKENS), "--no-warm-worker"]
    with started(server_command(port, *flags), port):
        while call(port, "/v1/internal/model/status")["state"] != "ready":
            time.sleep(0.2)
        first = [lambda: bare.answer(ASKED, TOKENS).speed, lambda: ask(port, ASKED, TOKENS).speed]
        medians(first, 1)
        alone, worker = medians(first, runs)
        with chromium_page(f"http://127.0.0.1:{port}") as page:
            _on_chat_tab(page)
            beside = [(bare.answer(ASKED, TOKENS).speed, _on_chat_tab(page)) for _ in range(runs)]
    base = statistics.median(speed for speed, _ in beside)
    drawing, tab = (statistics.median(seen[what] for _, seen in beside) for what in ("worker", "tab"))
    return [
        ratio_row("tokens/s from the worker, against bare generate()", worker, alone, "tokens/s", "≥ 0.97 ×"),
        ratio_row("the same while Chromium draws on the same cores", drawing, base, "tokens/s", ""),
        ratio_row("tokens/s on the Chat tab, against the same", tab, base, "tokens/s", "≥ 0.95 ×"),
    ]


def _on_chat_tab(page: Any) -> dict[str, float]:
    """Ask once; the worker's own tokens/s from the line under the chat, and those seen in the page."""
    page.get_by_role("tab", name="Chat").click()
    page.locator("#clear").click()
    page.wait_for_function("!document.querySelector('#chat-line').innerText.includes('tokens/s')")
    page.locator("#message textarea").fill(PROMPT)
    page.evaluate(_WATCH)
    page.locator("#message textarea").press("Enter")
    first, last = page.evaluate("window.answered")
    words = page.locator("#chat-line .small").inner_text()
    tokens = int(words.split(" tokens ·")[0].split("·")[-1].replace(",", ""))
    return {"worker": float(words.split(" tokens/s")[0].split("·")[-1]), "tab": (tokens - 1) / ((last - first) / 1000)}


# Told of changes, not asking for them: Playwright's own waiting makes the page render 60 times a second.
_WATCH = """() => {
  let first = 0, last = 0, seen = '';
  const chat = document.querySelector('#chatbot'), line = document.querySelector('#chat-line');
  window.answered = new Promise((done) => {
    const watcher = new MutationObserver(() => {
      const text = [...chat.querySelectorAll('.bot .md')].at(-1)?.textContent ?? '';
      if (text.trim() && text !== seen) {
        seen = text;
        last = performance.now();
        first = first || last;
      }
      if (first && line.textContent.includes('tokens/s')) {
        watcher.disconnect();
        done([first, last]);
      }
    });
    const every = {childList: true, subtree: true, characterData: true};
    watcher.observe(chat, every);
    watcher.observe(line, every);
  });
}"""
