"""The Model tab beyond loading: menu, saved settings, a model's own code, ways out of an error, keys."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, Request, Route, expect

from tests import checkpoints
from tests.browser import unfold
from tests.conftest import wait_until
from tests.e2e.conftest import Server, serving, wait_for
from tests.e2e.gate import GATED, Gate
from tests.e2e.test_load_from_the_browser import LOAD_MS, NAME, load, select_model

SMALL = "small-gpt2"  # loads in less than a second
OWN_CODE = "own-code"
RECORD = """
window.seen = [];
const look = () => {
  const bar = document.querySelector('#card .bar .fill');
  window.seen.push({
    card: document.getElementById('card').innerText,
    status: document.getElementById('status').innerText,
    width: bar ? bar.style.width : '',
  });
};
new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


@pytest.fixture(scope="module")
def shared(demo_model: Path, gate: Gate) -> Iterator[Server]:
    """One server for this module."""
    models = gate.file.parent / "models"
    (models / NAME).symlink_to(demo_model, target_is_directory=True)
    (models / SMALL).symlink_to(checkpoints.gpt2(), target_is_directory=True)
    with serving(models.parent) as server:
        yield server


@pytest.fixture
def own_code(server: Server) -> Path:
    """A model with code of its own that nobody has allowed; the path of the code."""
    folder = server.home / "models" / OWN_CODE
    if not folder.exists():
        checkpoints.copied(checkpoints.custom_code(), folder)
    code = folder / "modeling_own.py"
    original = (checkpoints.custom_code() / code.name).read_text()
    code.write_text(f"{original}\n# {time.time_ns()}\n")  # new to every test, so an earlier yes does not count
    return code


def field(page: Page, option: str) -> Locator:
    """The field of an option; its group is opened if it is folded."""
    place = page.locator(f"#option-{option} input")
    if not place.is_visible():
        unfold(page.locator("#group-rope").get_by_role("button").first)
        expect(place).to_be_visible()
    return place


def fill(page: Page, option: str, value: str) -> None:
    field(page, option).fill(value)
    field(page, option).press("Tab")


def digest_of(code: Path) -> str:
    return hashlib.sha256(code.read_bytes()).hexdigest()


# --- the menu and its buttons ---


def test_reload_starts_a_new_process_with_the_same_options(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    fill(page, "ctx_size", "64")
    load(page)
    before, first = server.info(), {worker.pid for worker in server.workers()}
    page.locator("#reload").click()
    wait_until(lambda: bool(first - {worker.pid for worker in server.workers()}), 60)  # that of the model
    wait_until(lambda: server.info()["state"] == "ready", 60)
    assert server.info()["options"] == before["options"]
    expect(page.locator("#card")).to_contain_text("Ready")
    page.locator("#unload").click()
    expect(page.locator("#unload")).to_be_disabled()
    expect(page.locator("#reload")).to_be_enabled()
    expect(page.locator("#reload")).to_have_attribute("title", re.compile(f"^Loads {SMALL} again"))
    page.locator("#reload").click()
    wait_until(lambda: server.info()["state"] == "ready", 60)
    assert server.info()["options"] == before["options"]


def test_refresh_offers_a_new_folder_and_keeps_the_form(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    fill(page, "ctx_size", "4096")
    (server.home / "models" / "newcomer").symlink_to(checkpoints.gpt2(), target_is_directory=True)
    page.locator("#refresh").click()
    menu = page.locator("#model input")
    menu.click()
    expect(page.get_by_role("option", name=re.compile("^newcomer · "))).to_be_visible()
    page.keyboard.press("Escape")
    expect(menu).to_have_value(re.compile(rf"^{NAME} · "))
    expect(field(page, "ctx_size")).to_have_value("4096")
    (server.home / "models" / "newcomer").unlink()


def test_the_menu_left_without_a_choice_changes_nothing(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    fill(page, "ctx_size", "4096")
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request) if "/gradio_api/run/" in request.url else None)
    page.locator("#model input").click()
    field(page, "ctx_size").click()  # the menu tells of its being left
    while not asked or any(request.response() is None for request in asked):
        page.wait_for_timeout(20)
    expect(field(page, "ctx_size")).to_have_value("4096")


def test_autoload_loads_what_is_selected_and_is_remembered(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    page.locator("#autoload input").check()
    wait_for(lambda: page.evaluate("JSON.stringify(localStorage).includes('loadstone-model')"), "the browser's memory")
    assert server.info()["state"] == "empty"  # ticking the box loads nothing
    page.locator("#model input").click()
    page.get_by_role("option", name=re.compile(rf"^{SMALL} · ")).click()
    expect(page.locator("#card")).to_contain_text(f"Ready · {SMALL}", timeout=LOAD_MS)

    page.reload()
    expect(page.locator("#autoload input")).to_be_checked(timeout=10_000)
    select_model(page)
    expect(page.locator("#card")).to_contain_text(f"Ready · {NAME}", timeout=LOAD_MS)


def test_autoload_says_so_where_something_is_loading(
    server: Server, open_page: Callable[..., Page], gate: Gate
) -> None:
    page = open_page(server)
    select_model(page, GATED)
    page.locator("#autoload input").check()
    page.locator("#load").click()
    expect(page.locator("#load")).to_be_disabled()
    choose(page, SMALL)
    expect(page.get_by_text(f"Loadstone is loading {GATED}").first).to_be_visible()
    gate.open()
    expect(page.locator("#card")).to_contain_text(f"Ready · {GATED}", timeout=LOAD_MS)


def test_a_choice_that_is_taken_back_before_the_answer_counts(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    held: list[Route] = []
    holding = True

    def hold(route: Route) -> None:
        held.append(route) if holding else route.continue_()

    page.route("**/gradio_api/run/**", hold)
    choose(page, SMALL)
    while not held:
        page.wait_for_timeout(20)
    choose(page, NAME)
    page.wait_for_timeout(300)  # the second choice is told of, or is not
    holding = False
    for route in held:
        route.continue_()
    expect(page.locator("#summary [data-model]")).to_have_attribute("data-model", NAME)
    page.wait_for_timeout(1000)  # the answers to both have come
    expect(page.locator("#summary [data-model]")).to_have_attribute("data-model", NAME)


def choose(page: Page, name: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=re.compile(rf"^{re.escape(name)} · ")).click()


# --- saved settings ---


def test_forget_brings_the_defaults_back(server: Server, open_page: Callable[..., Page]) -> None:
    saved = server.home / "models" / f"{SMALL}.yaml"
    page = open_page(server)
    select_model(page, SMALL)
    fill(page, "ctx_size", "48")
    page.locator("#save").click()
    expect(page.get_by_text(f"Saved for {SMALL}")).to_be_visible()
    assert "ctx_size: 48" in saved.read_text()
    expect(page.locator("#summary")).to_contain_text("from saved")  # the form has been shown anew
    expect(page.locator("#forget-ask")).to_be_hidden()
    page.locator("#forget").click()
    expect(page.locator("#forget-question")).to_contain_text(f"Forget the settings saved for {SMALL}?")
    page.locator("#forget-no").click()
    expect(page.locator("#forget-ask")).to_be_hidden()
    expect(page.locator("#forget")).to_be_focused()
    assert saved.exists()
    page.locator("#forget").click()
    page.locator("#forget-yes").click()
    expect(field(page, "ctx_size")).to_have_value("")
    expect(page.locator("#forget")).to_be_focused()
    assert not saved.exists()
    page.locator("#forget").click()
    expect(page.locator("#forget-question")).to_contain_text("Nothing is saved")
    expect(page.locator("#forget-ask")).to_be_hidden()


def test_settings_of_another_program_are_imported(server: Server, open_page: Callable[..., Page]) -> None:
    models = server.home / "models"
    (models / "imported").symlink_to(checkpoints.llama(), target_is_directory=True)
    entry = {"loader": "Transformers", "load_in_4bit": True, "n_ctx": 160, "wbits": 4, "trust_remote_code": True}
    (models / "config-user.yaml").write_text(json.dumps({"imported$": entry}))
    page = open_page(server)
    select_model(page, "imported")
    expect(page.locator("#option-precision").get_by_label("4-bit")).not_to_be_checked()
    page.locator("#import").click()
    expect(page.locator("#option-precision").get_by_label("4-bit")).to_be_checked()
    expect(field(page, "ctx_size")).to_have_value("160")
    expect(page.locator("#import")).to_be_hidden()
    expect(page.locator("body")).to_contain_text("wbits")  # not understood
    expect(page.locator("body")).to_contain_text("imported: trust_remote_code")  # never taken
    assert "load_in_4bit: true" in (models / "imported.yaml").read_text()
    (models / "config-user.yaml").unlink()
    (models / "imported.yaml").unlink()
    (models / "imported").unlink()


# --- a model's own code ---


def test_own_code_is_shown_and_runs_after_a_yes(server: Server, open_page: Callable[..., Page], own_code: Path) -> None:
    page = open_page(server)
    select_model(page, OWN_CODE)
    page.locator("#load").click()
    allow = page.locator("#allow-code")
    expect(allow).to_be_visible(timeout=LOAD_MS)
    expect(page.locator("#card")).to_contain_text("modeling_own.py")
    expect(page.locator("body")).to_contain_text(digest_of(own_code)[:12])
    assert server.info()["model_name"] is None
    allow.click()
    expect(page.locator("#card")).to_contain_text(f"Ready · {OWN_CODE}", timeout=LOAD_MS)
    assert server.info()["model_name"] == OWN_CODE


def test_code_swapped_after_it_was_shown_does_not_run(
    server: Server, open_page: Callable[..., Page], own_code: Path, tmp_path: Path
) -> None:
    page = open_page(server)
    select_model(page, OWN_CODE)
    page.locator("#load").click()
    allow = page.locator("#allow-code")
    expect(allow).to_be_visible(timeout=LOAD_MS)

    shown, marker = digest_of(own_code), tmp_path / "it-ran"
    own_code.write_text(f"open({str(marker)!r}, 'w').close()\n{own_code.read_text()}")
    before = server.info()["version"]
    allow.click()
    expect(page.locator("#card")).to_contain_text("not the ones that were shown")
    wait_until(lambda: server.info()["state"] not in ("starting", "loading"))
    assert not marker.exists(), "code that nobody has seen was run"
    assert server.info()["model_name"] is None
    assert server.info()["version"] >= before

    assert digest_of(own_code) != shown  # shown anew, a yes means the new files: they run, and leave the marker
    expect(page.locator("body")).to_contain_text(digest_of(own_code)[:12])
    expect(allow).to_be_visible()
    allow.click()
    expect(page.locator("#card")).to_contain_text(f"Ready · {OWN_CODE}", timeout=LOAD_MS)
    assert marker.exists()


# --- ways out ---


def test_stretching_the_context_sets_alpha(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    expect(page.locator("#stretch")).to_be_hidden()
    fill(page, "ctx_size", "12288")  # 1.5 times the model's own limit
    expect(page.locator("#stretch")).to_contain_text("12,288")
    page.locator("#stretch").click()
    expect(page.locator("#stretch")).to_be_hidden()
    expect(field(page, "alpha_value")).to_have_value("1.75")
    expect(field(page, "ctx_size")).to_have_value("12288")


def test_the_proposed_fix_is_one_click(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    fill(page, "alpha_value", "2")
    fill(page, "compress_pos_emb", "2")
    page.locator("#load").click()
    expect(page.locator("#card")).to_contain_text("exclude each other")
    page.locator("#fix").click()
    expect(page.locator("#card")).to_contain_text("Ready", timeout=LOAD_MS)
    expect(page.locator("#fix")).to_be_hidden()
    options = server.info()["options"]
    assert (options["alpha_value"] > 1) != (options["compress_pos_emb"] > 1)


def test_a_refusal_goes_with_its_cause(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    fill(page, "cpu_memory", "0.1")
    page.locator("#load").click()
    expect(page.locator("#card .error")).to_contain_text("missing")
    expect(page.locator("#fix")).to_be_visible()
    assert "None" not in page.locator("#fix").inner_text()
    fill(page, "cpu_memory", "")
    expect(page.locator("#card .error")).to_have_count(0)
    expect(page.locator("#fix")).to_be_hidden()
    fill(page, "ctx_size", "-3")
    expect(page.locator("#fit .error")).to_contain_text("not -3")
    expect(page.locator("#fit .ok")).to_have_count(0)  # whether it fits, nobody knows


def test_after_a_reload_the_form_is_what_is_loaded(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    page.locator("#option-precision").get_by_label("8-bit").check()
    fill(page, "ctx_size", "1024")
    load(page)
    page.reload()
    expect(page.locator("#card")).to_contain_text("Ready")
    expect(page.locator("#option-precision").get_by_label("8-bit")).to_be_checked()
    expect(field(page, "ctx_size")).to_have_value("1024")
    select_model(page, SMALL)
    expect(page.locator("#option-precision").get_by_label("8-bit")).not_to_be_checked()
    select_model(page)
    expect(page.locator("#option-precision").get_by_label("8-bit")).to_be_checked()


# --- a load that runs ---


def test_progress_is_seen_while_quantizing(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page)
    page.locator("#option-precision").get_by_label("4-bit").check()
    page.evaluate(RECORD)
    load(page)
    seen = page.evaluate("window.seen")
    counted = [
        entry for entry in seen if re.search(r"quantizing the weights · [\d,]+ of [\d,]+ tensors", entry["card"])
    ]
    assert counted, sorted({entry["card"] for entry in seen})
    widths = {entry["width"] for entry in counted}
    assert len(widths) > 1, f"the bar did not grow: {widths}"
    assert any(re.search(rf"Loading {NAME}\s\d+ %", entry["status"]) for entry in seen)


def test_enter_in_a_number_field_loads(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    field(page, "ctx_size").fill("80")
    field(page, "ctx_size").press("Enter")
    expect(page.locator("#card")).to_contain_text("Ready", timeout=LOAD_MS)
    assert server.info()["context_tokens"] == 80


def test_escape_cancels_a_load(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, GATED)
    page.locator("#load").click()
    expect(page.locator("#cancel")).to_be_visible()
    page.keyboard.press("Escape")
    server.wait_state("cancelled", "empty", timeout_s=10)
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#load")).to_be_enabled()
    assert server.info()["model_name"] is None


def test_a_load_is_cancelled_from_every_tab(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, GATED)
    page.locator("#load").click()
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#cancel-load")).to_be_hidden()
    page.get_by_role("tab", name="Chat").click()
    page.locator("#cancel-load").click()
    server.wait_state("cancelled", "empty", timeout_s=10)
    expect(page.locator("#cancel-load")).to_be_hidden()
    server.load(GATED, wait=False)
    expect(page.locator("#cancel-load")).to_be_visible()
    page.keyboard.press("Escape")
    server.wait_state("cancelled", "empty", timeout_s=10)


def test_what_is_unfolded_stays_so_while_it_changes(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    select_model(page, SMALL)
    plan = page.locator("#fit details.plan")
    plan.locator("summary").click()
    expect(plan).to_have_attribute("open", "")
    for tokens in ("64", "96"):
        before = page.locator("#fit").text_content() or ""
        field(page, "ctx_size").fill(tokens)
        expect(page.locator("#fit")).not_to_have_text(before)
        expect(plan).to_have_attribute("open", "")
    plan.locator("summary").click()
    field(page, "ctx_size").fill("80")
    page.wait_for_timeout(1000)
    assert plan.get_attribute("open") is None


def test_escape_in_the_open_menu_closes_only_the_menu(
    server: Server, open_page: Callable[..., Page], gate: Gate
) -> None:
    page = open_page(server)
    select_model(page, GATED)
    page.locator("#load").click()
    expect(page.locator("#cancel")).to_be_visible()
    page.locator("#model input").click()
    expect(page.get_by_role("option").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    assert server.info()["state"] in ("starting", "loading")
    gate.open()
    expect(page.locator("#card")).to_contain_text(f"Ready · {GATED}", timeout=LOAD_MS)
