"""Loads that fail: what was running stays, the page says why, and the server goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests import checkpoints
from tests.conftest import wait_until
from tests.e2e.conftest import Server, serving
from tests.e2e.gate import GATED, Gate
from tests.e2e.test_load_from_the_browser import LOAD_MS, NAME, answer_line, ask, load, select_model
from tests.machine import QUICK_OPTIONS

SMALL = "small"  # loads in less than a second
LACKING = "lacking"
STATUS = "**/v1/internal/model/status"


# --- checkpoints in which something is wrong ---


def lacking(models: Path, demo_model: Path) -> None:
    """The demo model, said to have two layers more than its weights hold. Only the worker finds that out."""
    folder = models / LACKING
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((demo_model / "config.json").read_text())
    config["num_hidden_layers"] += 2
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def empty(folder: Path) -> None:
    folder.mkdir()


def config_not_json(folder: Path) -> None:
    checkpoints.copied(checkpoints.llama(), folder)
    (folder / "config.json").write_text('{"architectures": [')


def truncated(folder: Path) -> None:
    checkpoints.copied(checkpoints.llama(), folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def shard_missing(folder: Path) -> None:
    checkpoints.copied(checkpoints.sharded(), folder)
    max(folder.glob("model-*.safetensors")).unlink()


def index_leaves_the_folder(folder: Path) -> None:
    """Its index names a file that is there, but beside the folder."""
    checkpoints.copied(checkpoints.sharded(), folder)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shard = max(data["weight_map"].values())
    shutil.move(folder / shard, folder.parent / f".{shard}")
    names = data["weight_map"].items()
    data["weight_map"] = {name: f"../.{shard}" if file == shard else file for name, file in names}
    index.write_text(json.dumps(data))


def unknown_architecture(folder: Path) -> None:
    checkpoints.copied(checkpoints.llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "quux", "architectures": ["QuuxForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def pickled_code(folder: Path) -> None:
    checkpoints.malicious(folder, marker_of(folder))


def marker_of(folder: Path) -> Path:
    """What the pickle of :func:`pickled_code` would make."""
    return folder.parent.parent / "it-ran"


@dataclass(frozen=True)
class Broken:
    """How a checkpoint is made, and what loading it answers: the error's kind, and words of its message."""

    make: Callable[[Path], None]
    kind: str
    words: str

    @property
    def name(self) -> str:
        return self.make.__name__.replace("_", "-")


BROKEN = (
    Broken(empty, "not_a_model", "empty"),
    Broken(config_not_json, "broken_checkpoint", "config.json"),
    Broken(truncated, "broken_checkpoint", "model.safetensors"),
    Broken(shard_missing, "broken_checkpoint", "missing"),
    Broken(index_leaves_the_folder, "unsafe_checkpoint", "outside the model's folder"),
    Broken(unknown_architecture, "unsupported_model", "quux"),
    Broken(pickled_code, "unsafe_checkpoint", "pickle"),
)


# --- servers ---


@pytest.fixture(scope="module")
def shared(demo_model: Path, gate: Gate) -> Iterator[Server]:
    """One server for this module, with a good model, one that lacks tensors, and every broken one."""
    models = gate.file.parent / "models"
    (models / NAME).symlink_to(demo_model, target_is_directory=True)
    (models / SMALL).symlink_to(checkpoints.llama(), target_is_directory=True)
    lacking(models, demo_model)
    for broken in BROKEN:
        broken.make(models / broken.name)
    with serving(models.parent, "--temperature", "0", "--max-new-tokens", "8") as server:
        yield server


# --- one model runs, another fails ---


def test_the_running_model_answers_after_another_failed(server: Server, open_page: Callable[..., Page]) -> None:
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200
    before = server.info()
    page = open_page(server)
    select_model(page, LACKING)
    page.locator("#load").click()
    card = page.locator("#card")
    expect(card).to_contain_text("tensors that its architecture needs", timeout=LOAD_MS)
    expect(card).to_contain_text(LACKING)
    expect(page.locator("#status")).to_contain_text(NAME)
    info = server.wait_state("failed")
    assert info["error"]["kind"] == "broken_checkpoint"
    assert (info["model_name"], info["options"]) == (NAME, before["options"])
    ask(page, "Say hello.")
    assert "tokens" in answer_line(page)


def test_over_http_the_failure_is_the_answer_and_the_model_stays(server: Server) -> None:
    assert server.load(SMALL)[0] == 200
    status, body = server.load(LACKING)
    assert (status, body["error"]["kind"]) == (422, "broken_checkpoint")
    assert "lack" in body["error"]["message"]
    assert server.info()["model_name"] == SMALL
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200


# --- nothing runs ---


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_what_is_wrong_with_the_files_has_a_name(server: Server, broken: Broken) -> None:
    status, body = server.load(broken.name)
    assert body["error"]["kind"] == broken.kind
    assert broken.words in body["error"]["message"]
    assert body["error"]["hint"]
    assert 400 <= status < 500
    info = server.info()
    assert info["state"] in ("empty", "failed")
    assert info["model_name"] is None
    assert not marker_of(server.home / "models" / broken.name).exists(), "code in a pickle was run"
    assert server.process.poll() is None
    status, info = server.load(SMALL)
    assert (status, info["state"], info["model_name"]) == (200, "ready", SMALL)
    assert info["error"] is None


def test_a_start_with_a_model_that_fails_opens_the_page(
    launch: Callable[..., Server], open_page: Callable[..., Page], home: Path, demo_model: Path
) -> None:
    lacking(home / "models", demo_model)
    server = launch("--no-warm-worker", "--model", LACKING)
    assert server.wait_state("failed")["error"]["kind"] == "broken_checkpoint"
    page = open_page(server)
    expect(page.locator("#card")).to_contain_text("tensors that its architecture needs")
    expect(page.locator(f"#summary [data-model='{LACKING}']")).to_be_visible()  # what was asked for is chosen
    select_model(page)
    load(page)


# --- two at once ---


def test_a_second_tab_that_loads_too_is_told(server: Server, open_page: Callable[..., Page], gate: Gate) -> None:
    one, other = open_page(server), open_page(server)
    select_model(one, GATED)
    select_model(other, SMALL)
    stale = server.call("/v1/internal/model/status")[1]

    def answer_stale(route: Route) -> None:
        route.fulfill(json=stale)

    other.route(STATUS, answer_stale)  # the second tab has not heard of the first one's load yet
    one.locator("#load").click()
    wait_until(lambda: server.info()["state"] in ("starting", "loading"))
    other.locator("#load").click()
    expect(other.locator("#card")).to_contain_text(f"Loadstone is loading {GATED}")
    assert server.info()["state"] in ("starting", "loading")  # the first load goes on
    other.unroute(STATUS, answer_stale)
    gate.open()
    for page in (one, other):
        expect(page.locator("#card")).to_contain_text(f"Ready · {GATED}", timeout=LOAD_MS)
    select_model(other, SMALL)
    other.locator("#load").click()
    expect(one.locator("#card")).to_contain_text(f"Ready · {SMALL}", timeout=LOAD_MS)
