"""One user's 256 tokens: from the service, and as they appear on the Chat tab, against bare ``generate()``."""

from __future__ import annotations

import statistics
import time
from typing import Any

from modules.demo import DEMO_MODEL as NAME
from tests.benchmarks.common import FIXTURES, Row, bare_script, call, free_port, ratio_row, server_command, started
from tests.browser import chromium_page

TOKENS = 256
PROMPT = "Write a long story about a lighthouse keeper and the sea."

BARE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, tokens, runs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
class Clock:
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass
speeds = []
for _ in range(runs + 1):
    clock = Clock()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    speeds.append((tokens - 1) / (clock.times[-1] - clock.times[1]))
print(json.dumps({"speed": sorted(speeds[1:])[runs // 2]}))
"""


def rows(runs: int = 3) -> list[Row]:
    """Tokens per second from the first token to the last. Greedy, so every run makes the same tokens."""
    path = str(FIXTURES / "models" / NAME)
    before = bare_script(BARE, path, PROMPT, str(TOKENS), str(runs))["speed"]
    port = free_port()
    flags = ["--model", NAME, "--bf16", "--temperature", "0", "--max-new-tokens", str(TOKENS), "--no-warm-worker"]
    with started(server_command(port, *flags), port):
        while call(port, "/v1/internal/model/status")["state"] != "ready":
            time.sleep(0.2)
        with chromium_page(f"http://127.0.0.1:{port}") as page:
            results = [_on_chat_tab(page) for _ in range(runs + 1)][1:]
    after = bare_script(BARE, path, PROMPT, str(TOKENS), str(runs))["speed"]
    bare = (before + after) / 2
    worker = statistics.median(result["worker"] for result in results)
    tab = statistics.median(result["tab"] for result in results)
    return [
        ratio_row("tokens/s from the worker, against bare generate()", worker, bare, "tokens/s", "≥ 0.97 ×"),
        ratio_row("tokens/s on the Chat tab, against the same", tab, bare, "tokens/s", "≥ 0.95 ×"),
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
