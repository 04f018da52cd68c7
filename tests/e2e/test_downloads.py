"""From the Hub to the first answer: in the browser, from the command line, and through a kill of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser import unfold
from tests.e2e.conftest import ROOT, Server, serving, wait_for
from tests.hub_models import tiny_files, weights
from tests.hub_server import TOKEN, Hub, Repo, folder_files
from tests.loras import herring

NAME = "tester/SmolLM2-135M"
FOLDER = "tester_SmolLM2-135M"
MEDIUM = "tester/medium"  # of 20 MB


@pytest.fixture(scope="module")
def hub(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with the demo model, which takes three seconds, and what a server needs to find it."""
    tensors = {"safetensors": {"parameters": {"BF16": 134_515_008}, "total": 134_515_008}, "downloads": 1000}
    files = {**folder_files(demo_model), "pytorch_model.bin": b"x" * 9000}
    repos = {
        NAME: Repo({"main": files}, info=tensors),
        MEDIUM: Repo({"main": {**tiny_files(), "model.safetensors": weights(rows=160_000)}}),
        "tester/lora": Repo({"main": folder_files(herring())}),
        "tester/gated": Repo({"main": tiny_files()}, gated=True, accepted=frozenset({TOKEN})),
    }
    with pytest.MonkeyPatch.context() as environment, Hub(repos) as running:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("HF_ENDPOINT", running.url)
        environment.setenv("HF_HUB_OFFLINE", "0")
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        yield running


@pytest.fixture(autouse=True)
def fast(hub: Hub) -> None:
    """Each test begins with 90 MB/s, and no request before it."""
    hub.bytes_per_second = 90e6
    hub.requests.clear()


@pytest.fixture(scope="module")
def shared(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that load nothing."""
    home = tmp_path_factory.mktemp("home")
    with serving(home, "--no-warm-worker") as server:
        yield server


def ask(page: Page, text: str) -> None:
    field = page.locator("#hub-ask textarea, #hub-ask input").first
    field.fill(text)
    field.press("Enter")


def jobs(server: Server) -> list[dict[str, object]]:
    return list(server.call("/v1/internal/download")[1]["downloads"])


def test_search_choose_download_and_load(
    hub: Hub, launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    server = launch()
    hub.bytes_per_second = 45e6  # six seconds, in which the page looks a dozen times
    page = open_page(server)
    ask(page, "smollm2")
    page.locator("#hub-results label", has_text=NAME).click()
    expect(page.locator("#hub-offer")).to_contain_text("Fits.")
    expect(page.locator("#hub-offer")).to_contain_text("1 file is left out")
    expect(page.locator("#hub-offer")).to_contain_text(f"models/{FOLDER}")
    page.locator("#hub-download").click()
    bar = page.locator("#job-0 [role=progressbar]")
    seen: list[int] = []

    def ended() -> bool:
        seen.append(_percent(page))
        return page.locator("#job-0 [data-state=done]").count() == 1

    wait_for(ended, "the end", 60)
    assert len({share for share in seen if 0 < share < 100}) >= 3, seen
    expect(bar).to_have_count(0)
    expect(page.locator("#job-0")).to_contain_text("every file verified")
    page.locator("#model input").click()
    page.get_by_role("option", name=FOLDER).click()
    expect(page.locator("#summary")).to_contain_text("135 M")
    page.locator("#load").click()
    expect(page.locator("#card")).to_contain_text("Ready", timeout=60_000)
    assert server.info()["model_name"] == FOLDER


def _percent(page: Page) -> int:
    # In one look: between finding a bar and asking it, the page makes the same element something else.
    value = page.evaluate("document.querySelector('#job-0 [role=progressbar]')?.getAttribute('aria-valuenow')")
    return int(value or 0)


def test_the_panel_survives_a_reload_pauses_refuses_and_takes_a_token(
    hub: Hub, shared: Server, open_page: Callable[..., Page]
) -> None:
    hub.bytes_per_second = 1e6  # none of it ends by itself
    page = open_page(shared)
    ask(page, "tester/nothing")
    expect(page.locator("#hub-offer .error")).to_contain_text("There is no tester/nothing on the Hub")
    ask(page, "tester/gated")
    expect(page.locator("#hub-offer .error")).to_contain_text(f"Accept the licence at {hub.url}/tester/gated")
    unfold(page.locator("#hub-token button").first)
    page.locator("#hub-token-text input").fill(TOKEN)
    page.locator("#hub-token-save").click()
    expect(page.locator("#hub-token-line")).to_contain_text(f"hf_…{TOKEN[-4:]}")
    assert TOKEN not in page.content()
    ask(page, "tester/gated")
    expect(page.locator("#hub-offer")).to_contain_text("Fits.")
    ask(page, MEDIUM)
    expect(page.locator("#hub-offer")).to_contain_text("tester_medium")
    expect(page.locator("#hub-offer")).to_contain_text("Fits.")
    page.locator("#hub-download").click()
    page.locator("#job-pause-0").click()
    expect(page.locator("#job-0 [data-state=paused]")).to_be_visible()
    page.reload()
    expect(page.locator("#job-0 [data-state=paused]")).to_be_visible()
    other = open_page(shared)
    other.locator("#job-resume-0").click()
    expect(page.locator("#job-0 [data-state=running]")).to_be_visible()
    other.locator("#job-cancel-0").click()
    expect(page.locator("#job-0 [data-state=cancelled]")).to_be_visible()
    wait_for(lambda: not list((shared.home / "models" / ".cache" / "downloads").iterdir()), "nothing to be left")


def test_a_lora_is_in_its_menu_when_it_has_come(hub: Hub, shared: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(shared)
    ask(page, "tester/lora")
    expect(page.locator("#hub-offer")).to_contain_text("loras/tester_lora")
    page.locator("#hub-download").click()
    expect(page.locator("[data-state=done]", has_text="tester_lora")).to_be_visible(timeout=30_000)
    page.locator("#loras input").click()
    expect(page.get_by_role("option", name="tester_lora")).to_be_visible()


def test_the_shelf_verifies_and_deletes(hub: Hub, shared: Server, open_page: Callable[..., Page]) -> None:
    hub.bytes_per_second = 0
    assert shared.call("/v1/internal/download", {"repo": MEDIUM, "wait": True})[1]["state"] == "done"
    page = open_page(shared)
    page.get_by_role("tab", name="Session").click()
    expect(page.locator("#shelf")).to_contain_text(f"{MEDIUM}:main at ")
    page.locator("#shelf-model input").click()
    page.get_by_role("option", name="tester_medium", exact=True).click()
    page.locator("#shelf-favourite").click()
    expect(page.locator("#shelf")).to_contain_text("★ tester_medium")
    expect(page.locator("#shelf-favourite")).to_contain_text("No favourite any more")
    page.locator("#shelf-verify").click()
    expect(page.locator("#shelf-line")).to_contain_text("all 5 files are what the Hub has")
    page.locator("#shelf-newer").click()
    expect(page.locator("#shelf-line")).to_contain_text("is up to date")
    branches = hub.repos[MEDIUM].branches
    old = branches["main"]
    branches["main"] = {**old, "README.md": b"A newer commit."}
    page.reload()
    page.get_by_role("tab", name="Session").click()
    page.locator("#shelf-model input").click()
    page.get_by_role("option", name="tester_medium", exact=True).click()
    expect(page.locator("#shelf-line")).to_contain_text("Update available")
    branches["main"] = old
    page.locator("#shelf-delete").click()
    expect(page.locator("#shelf-question")).to_contain_text("Delete tester_medium and its 20 MB?")
    expect(page.get_by_role("button", name="No, keep it")).to_be_focused()
    page.locator("#shelf-yes").click()
    expect(page.locator("#shelf-line")).to_contain_text("is deleted")
    assert not (shared.home / "models" / "tester_medium").exists()


def test_after_a_kill_at_70_percent_little_is_fetched_twice(hub: Hub, launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    total = int(server.call("/v1/internal/download", {"repo": NAME})[1]["total_bytes"])
    wait_for(lambda: hub.sent_bytes() >= 0.7 * total, "70 %", 60)
    children = server.workers()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(15)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    models = server.home / "models"
    assert not (models / FOLDER).exists()
    again = launch("--no-warm-worker")
    assert FOLDER not in again.call("/v1/internal/model/list")[1]["model_names"]
    wait_for(lambda: jobs(again)[0]["state"] == "done", "the rest", 60)
    assert hub.sent_bytes() <= 1.05 * total
    assert again.call("/v1/internal/model/list")[1]["model_names"].count(FOLDER) == 1
    whole = hub.repos[NAME].branches["main"]["model.safetensors"]
    assert isinstance(whole, Path)
    assert (models / FOLDER / "model.safetensors").read_bytes() == whole.read_bytes()


def command(home: Path, *words: str) -> subprocess.Popen[str]:
    """The command, which Ctrl-C ends even where the tests run in the background of a shell, which ignores it."""
    line = [sys.executable, "server.py", "--home", str(home), "--no-hf-cache", "--download", *words]
    return subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_from_the_command_line_stopped_and_gone_on_with(hub: Hub, home: Path) -> None:
    hub.bytes_per_second = 2e6  # six seconds are left when it is stopped
    first = command(home, MEDIUM)
    wait_for(lambda: hub.sent_bytes() > 8e6, "a good part", 60)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 130
    assert f"./start.sh --download {MEDIUM}" in said
    assert not (home / "models" / "tester_medium").exists()
    stopped_at = hub.sent_bytes()
    hub.bytes_per_second = 0
    second = command(home, MEDIUM)
    printed, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert printed.strip() == str(home / "models" / "tester_medium")
    assert "100%" in said
    assert "Fits." in said
    total = sum(path.stat().st_size for path in (home / "models" / "tester_medium").iterdir() if path.name[0] != ".")
    assert hub.sent_bytes() - stopped_at < total - 0.7 * stopped_at


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("tester/nothing",), 2, "There is no tester/nothing on the Hub"),
        (("no name at all",), 2, "names no model on the Hub"),
        ((NAME, "--file", "*.gguf"), 2, "has no file '*.gguf'"),
    ],
)
def test_the_command_says_what_is_wrong(hub: Hub, home: Path, words: tuple[str, ...], status: int, said: str) -> None:
    process = command(home, *words)
    assert said in process.communicate(timeout=60)[1]
    assert process.returncode == status
