"""The Session tab: several models, what goes on with them, and the server's flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from modules.options import ServerOptions
from modules.ui import session_tab
from tests import checkpoints
from tests.e2e.conftest import Server


def test_several_models_are_seen_pinned_shown_and_unloaded(
    launch: Callable[..., Server], open_page: Callable[..., Page], home: Path
) -> None:
    for name in ("one", "two"):
        (home / "models" / name).symlink_to(checkpoints.llama(), target_is_directory=True)
    server = launch("--no-warm-worker", "--load-on-demand", "--max-loaded", "2")
    for name in ("one", "two"):
        body = {"model": name, "prompt": "invisible", "max_tokens": 3}
        assert server.call("/v1/completions", body)[0] == 200
    page = open_page(server)
    page.get_by_role("tab", name="Session").click()
    now, requests = page.locator("#now"), page.locator("#now-requests")
    expect(now.locator(".results tbody tr")).to_have_count(2)
    expect(now).to_contain_text("shown on the page")
    expect(requests).to_contain_text("POST /v1/completions")
    expect(page.locator("#status")).to_contain_text("one")
    page.locator("#now-model input").click()
    page.get_by_role("option", name="two").click()
    page.locator("#now-pin").click()
    expect(now).to_contain_text("pinned")
    page.locator("#now-front").click()
    expect(page.locator("#status")).to_contain_text("two")
    assert server.call("/v1/completions", {"model": "one", "prompt": "a", "max_tokens": 2})[0] == 200
    expect(requests.locator("tbody tr")).to_have_count(3)  # by itself: nobody asked for it
    page.locator("#now-unload").click()
    expect(now.locator(".results tbody tr")).to_have_count(1)
    expect(page.locator("#status")).to_contain_text("one")
    server.call("/v1/internal/model/unload", {})
    expect(now).to_contain_text("Nothing is loaded.")
    page.wait_for_timeout(2500)  # the page asks again meanwhile
    assert server.load("one")[0] == 200
    expect(now.locator(".results tbody tr")).to_have_count(1)
    expect(page.locator("#now-pin")).to_be_visible()
    assert not [line for line in server.output if "Traceback" in line]
    expect(page.locator("#session")).to_contain_text("--max-loaded")
    assert "invisible" not in page.locator("body").inner_text()


def test_of_a_secret_only_that_it_is_set_is_told() -> None:
    server = ServerOptions(
        listen=True, warm_worker=False, gradio_auth=("ann:hidden", "bob:hidden"), api_key="hidden", idle_timeout=2.5,
        allowed_host=("a", "b"),
    )  # fmt: skip
    assert session_tab.server_flags(server) == [
        ("--listen", "on"),
        ("--allowed-host", "a, b"),
        ("--gradio-auth", "set (2, not shown)"),
        ("--api-key", "set (not shown)"),
        ("--warm-worker", "off"),
        ("--idle-timeout", "2.5 minutes"),
    ]
