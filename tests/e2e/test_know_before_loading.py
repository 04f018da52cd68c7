"""The plan before loading: on the page, on the command line, and kept by the load that follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.e2e.conftest import Server
from tests.e2e.test_command_line import run
from tests.e2e.test_load_from_the_browser import NAME, load, select_model
from tests.machine import BF16

DEVICE_KEYS = {
    "name", "cap_bytes", "weights_bytes", "kv_cache_bytes", "working_bytes", "fixed_bytes", "total_bytes",
}  # fmt: skip


def test_plan_as_json_has_the_promised_keys_and_exact_weights(home: Path) -> None:
    done = run("--home", str(home), "--no-hf-cache", "--model", NAME, "--load-in-4bit", "--plan", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan["device_map"] == {"": "cpu"}
    [device] = plan["devices"]
    assert set(device) == DEVICE_KEYS
    # What the loaded model's parameters and buffers take: of 28,346,688 that stay, 2 or 4 bytes each.
    assert plan["weights_bytes"] == (116_426_752 if BF16 else 173_120_128)


def test_a_plan_that_does_not_fit_says_what_would(home: Path) -> None:
    done = run("--home", str(home), "--no-hf-cache", "--model", NAME, "--cpu-memory", "0.6", "--plan", "--json")
    assert done.returncode == 2
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    assert plan["missing_bytes"] > 0
    assert 1 <= len(plan["suggestions"]) <= 4
    for suggestion in plan["suggestions"]:
        flags = [
            word
            for name, value in suggestion["options"].items()
            for word in (
                [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
            )
        ]
        again = run("--home", str(home), "--model", NAME, "--cpu-memory", "0.6", *flags, "--plan")
        assert again.returncode == 0, (suggestion, again.stdout)


def test_a_load_beyond_the_cap_is_refused_before_it_starts(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    status, body = server.load(NAME, cpu_memory=0.6)
    assert (status, body["error"]["kind"]) == (507, "out_of_memory")
    assert "missing" in body["error"]["message"]
    assert not server.workers()
    status, info = server.load(NAME, **{"cpu_memory": 0.6, **body["error"]["fix"]})
    assert (status, info["state"]) == (200, "ready")


def test_one_click_makes_it_fit(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker", "--cpu-memory", "0.6")
    page = open_page(server)
    select_model(page)
    expect(page.locator("#fit")).to_contain_text("Too large")
    expect(page.locator("#anyway")).to_be_visible()
    page.get_by_role("button", name="Load in 4-bit").click()
    expect(page.locator("#fit")).to_contain_text("Fits")
    expect(page.locator("#anyway")).to_be_hidden()
    expect(page.locator("#option-precision").get_by_label("4-bit")).to_be_checked()
    load(page)
    expect(page.locator("#card")).to_contain_text("Linear4bit")


def test_the_menu_says_what_fits(launch: Callable[..., Server], open_page: Callable[..., Page], home: Path) -> None:
    (home / "models" / "empty").mkdir()
    page = open_page(launch("--no-warm-worker"))
    expect(page.locator("#model input")).to_have_value(f"{NAME} · fits", timeout=10_000)


def test_load_anyway_is_there(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker", "--cpu-memory", "0.6")
    page = open_page(server)
    select_model(page)
    page.locator("#anyway").click()
    expect(page.locator("#card")).to_contain_text("Ready", timeout=90_000)


def test_layers_go_to_disk_where_the_cap_leaves_no_room(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker", "--temperature", "0")
    status, info = server.load(NAME, bf16=True, cpu_memory=0.2, ctx_size=1024, disk=True)
    assert status == 200, info
    devices = info["device_bytes"]
    assert devices["disk"] > 0
    assert devices["cpu"] <= 0.2 * 2**30
