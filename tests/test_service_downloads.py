"""Downloads as the service offers them: looked at, checked, judged by the plan, put where they belong, kept."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules import api
from modules.devices import Gpu
from modules.errors import DiskFull, ModelInUse, NotOnHub, UserError
from modules.hub import JobState
from modules.library import Library
from modules.options import LoadOptions
from modules.protocol import LoadOrder
from modules.service import Service
from modules.service.badges import badge
from modules.service.downloads import fits_roughly
from modules.service.fit import fit_of
from modules.service.shelf import Shelf
from tests.conftest import wait_until
from tests.hub.conftest import hub, online  # noqa: F401 (fixtures)
from tests.hub_models import config, names_in, tiny_files, weights
from tests.hub_server import TOKEN, Fault, Hub, Repo, bytes_of
from tests.services import MACHINE, services

LORA = {
    "adapter_config.json": b'{"peft_type": "LORA", "r": 4}', "adapter_model.safetensors": weights(1),
    "README.md": b"x", "adapter_model.bin": b"y" * 5000,
}  # fmt: skip


@pytest.fixture
def service(hub: Hub, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:  # noqa: F811
    """A service whose Hub is the one on localhost."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with services(tmp_path, demo_model) as make:
        made = make()
        made.downloads.queue.start()
        yield made
        made.downloads.close()


def brought(service: Service, text: str, pattern: str = "") -> Path:
    """The folder of what was downloaded."""
    job = service.downloads.queue.wait_for(service.downloads.download(text, pattern).key)
    assert job.state is JobState.DONE, job.error
    return Path(job.order.target)


def test_a_model_goes_to_models_a_lora_to_loras(service: Service, hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.repos["user/lora"] = Repo({"main": dict(LORA)})
    assert brought(service, "user/model") == tmp_path / "models" / "user_model"
    assert brought(service, f"{hub.url}/user/lora") == tmp_path / "loras" / "user_lora"
    assert names_in(tmp_path / "loras" / "user_lora") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert [model.name for model in service.models()] == ["demo", "user_model"]


def test_a_look_says_what_would_come_and_fetches_nothing(service: Service, hub: Hub) -> None:  # noqa: F811
    hub.repos["user/model"].branches["main"]["pytorch_model.bin"] = b"x" * 9000
    hub.moved["user/old"] = "user/model"
    offer = service.downloads.look("user/old")
    assert offer.notes == ("user/old is called user/model now.",)
    assert offer.choice.left_out == {"pytorch_model.bin": "a duplicate of the safetensors"}
    assert offer.missing_bytes == offer.order.size_bytes == sum(f.size for f in offer.choice.wanted)
    assert hub.sent_bytes() == 0
    assert service.downloads.narrowed(offer, "pytorch_model.bin").order.size_bytes == 9000
    with pytest.raises(NotOnHub, match=r"no file 'x\.gguf'"):
        service.downloads.look("user/model", "x.gguf")


def test_the_plan_judges_by_headers(service: Service, hub: Hub) -> None:  # noqa: F811
    verdict = service.downloads.verdict(service.downloads.look("user/model"))
    assert verdict.startswith("LlamaForCausalLM · 32.8 k · bf16 · 66 kB · 256 context. Fits.")
    assert hub.sent_bytes("model.safetensors") <= len(weights())
    large = json.loads(config()) | {"hidden_size": 65536, "vocab_size": 512_000}
    size = 2 * 512_000 * 65_536
    tensor = {"dtype": "BF16", "shape": [512_000, 65_536], "data_offsets": [0, size]}
    raw = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    hub.repos["user/huge"] = Repo({"main": {**tiny_files(), "config.json": json.dumps(large).encode(),
                                            "model.safetensors": len(raw).to_bytes(8, "little") + raw}})  # fmt: skip
    offer = service.downloads.look("user/huge")
    files = tuple(
        replace(file, size=8 + len(raw) + size) if file.name == "model.safetensors" else file
        for file in offer.order.files
    )
    huge = replace(offer, order=replace(offer.order, files=files))
    assert "Too large" in service.downloads.verdict(huge)
    with pytest.raises(DiskFull, match="are needed in"):
        service.downloads.check(
            replace(huge, order=replace(huge.order, files=tuple(replace(f, size=2**50) for f in files)))
        )


def test_a_plan_with_layers_in_ram_says_that_4_bit_would_spare_them(
    service: Service, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    machine = replace(service.measure(), gpus=(Gpu(0, "simulated", "0", 24 * 2**30, 1030 * 2**20),))
    fit = fit_of(facts, LoadOptions(), 8192, machine, ())
    described = (facts, badge(facts, machine), fit)
    monkeypatch.setattr(service.downloads, "describe", lambda offer: described)
    verdict = service.downloads.verdict(service.downloads.look("user/model"))
    assert "layers in RAM" in verdict
    assert verdict.endswith(" It fits in 4-bit.")


def test_a_verdict_without_a_place_for_the_headers_says_why(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without_temporary_files:
        without_temporary_files.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        verdict = service.downloads.verdict(service.downloads.look("user/model"))
    assert verdict == "Whether it fits cannot be said: No such file or directory."


def test_a_verdict_that_cannot_be_given_says_why(service: Service, hub: Hub) -> None:  # noqa: F811
    hub.repos["user/odd"] = Repo({"main": {"model.safetensors": b"no header here", "config.json": b"{}"}})
    verdict = service.downloads.verdict(service.downloads.look("user/odd"))
    assert verdict.startswith("Whether it fits cannot be said: ")


def test_a_choice_that_is_open_is_not_downloaded(service: Service, hub: Hub) -> None:  # noqa: F811
    hub.repos["user/gguf"] = Repo({"main": {"a.gguf": b"GGUF" * 100, "b.gguf": b"GGUF" * 100}})
    with pytest.raises(UserError, match="2 GGUF files"):
        service.downloads.download("user/gguf")
    assert brought(service, "user/gguf", "b.gguf").name == "user_gguf"


def test_another_model_of_the_same_folder_is_not_replaced(service: Service, hub: Hub) -> None:  # noqa: F811
    hub.repos["user/model_v2"] = Repo({"main": tiny_files(seed=2)})
    hub.repos["user/model"].branches["v2"] = tiny_files(seed=3)
    folder = brought(service, "user/model_v2")
    with pytest.raises(UserError, match="user_model_v2 holds user/model_v2, which would be replaced"):
        service.downloads.download("user/model:v2")
    assert brought(service, "user/model_v2") == folder
    folder.rename(folder.with_name("mine"))
    assert brought(service, "user/model:v2") == folder


@pytest.mark.parametrize("own", [b"trained for a week", weights(seed=9)], ids=["another size", "the same size"])
def test_what_was_not_downloaded_here_is_not_replaced(service: Service, hub: Hub, tmp_path: Path, own: bytes) -> None:  # noqa: F811
    folder = tmp_path / "models" / "user_model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(own)
    (folder / "config.json").write_bytes(config())  # as the Hub has it
    try:
        key = service.downloads.download("user/model").key
        error = str(service.downloads.queue.wait_for(key).error)  # a file of the same size is hashed by the process
    except UserError as at_once:
        error = str(at_once)
    assert error.startswith("model.safetensors in user_model was not downloaded here")
    assert names_in(folder) == {"model.safetensors", "config.json"}
    assert (folder / "model.safetensors").read_bytes() == own
    assert hub.sent_bytes() == 0
    (folder / "model.safetensors").unlink()
    assert brought(service, "user/model") == folder
    assert not hub.asked("/config.json")


def test_a_small_file_of_a_newer_commit_costs_no_weights(service: Service, hub: Hub) -> None:  # noqa: F811
    folder = brought(service, "user/model")
    hub.repos["user/model"].branches["main"] = {**tiny_files(), "chat_template.jinja": b"new"}
    with pytest.raises(UserError, match=r"user_model holds model\.safetensors of an older commit"):
        service.downloads.download("user/model", "chat_template.jinja")
    brought(service, "user/model", "chat_template.jinja,model.safetensors")
    assert names_in(folder) == {"chat_template.jinja", "model.safetensors"}


def test_an_update_replaces_no_file_of_somebodys_own(service: Service, hub: Hub) -> None:  # noqa: F811
    folder = brought(service, "user/model")
    (folder / "chat_template.jinja").write_text("mine")
    branch = hub.repos["user/model"].branches
    branch["main"] = {**tiny_files(), "chat_template.jinja": b"the Hub's"}
    with pytest.raises(UserError, match=r"chat_template\.jinja in user_model was not downloaded here"):
        service.shelf.update("user_model")
    assert (folder / "chat_template.jinja").read_text() == "mine"


def test_search_tells_what_fits(service: Service, hub: Hub) -> None:  # noqa: F811
    for name, count in (("small", 10**9), ("medium", 10**10), ("large", 10**12)):
        tensors = {"parameters": {"BF16": count}, "total": count}
        hub.repos[f"user/{name}-llm"] = Repo({"main": {}}, info={"safetensors": tensors})
    results = service.downloads.search("llm")
    fits = {result.found.name: result.fits for result in results}
    assert fits == {"user/small-llm": "fits", "user/medium-llm": "fits in 4-bit", "user/large-llm": "too large"}
    fitting = service.downloads.search("llm", fitting=True)
    assert {result.found.name for result in fitting} == {"user/small-llm", "user/medium-llm"}
    assert fits_roughly(0, 0, MACHINE) == ""


def test_verify_repair_and_update(service: Service, hub: Hub) -> None:  # noqa: F811
    folder, shelf = brought(service, "user/model"), service.shelf
    assert shelf.verify("user_model").broken == {}
    assert shelf.newer_commit("user_model") == ""
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert shelf.verify("user_model").broken == {"model.safetensors": "another content"}
    service.downloads.queue.wait_for(shelf.repair("user_model").key)
    assert shelf.verify("user_model").broken == {}
    hub.repos["user/model"].branches["main"] = {**tiny_files(), "model.safetensors": weights(seed=4)}
    assert shelf.newer_commit("user_model") == hub.repos["user/model"].commit("main")
    service.downloads.queue.wait_for(shelf.update("user_model").key)
    assert shelf.newer_commit("user_model") == ""
    assert (folder / "model.safetensors").read_bytes() == weights(seed=4)
    with pytest.raises(UserError, match="not known where demo is from"):
        shelf.verify("demo")


def test_a_repair_asks_the_hub_in_use_whatever_a_copied_folder_says(
    service: Service, hub: Hub, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = brought(service, "user/model")
    (folder / "config.json").write_text("damaged")
    with Hub({"user/model": Repo({"main": tiny_files()})}) as stranger:
        record = json.loads((folder / ".download.json").read_text())
        (folder / ".download.json").write_text(json.dumps({**record, "endpoint": stranger.url}))
        job = service.downloads.queue.wait_for(service.shelf.repair("user_model").key)
        assert stranger.requests == []
    assert (job.state, service.shelf.verify("user_model").broken) == (JobState.DONE, {})
    assert job.notes == (f"It was downloaded from {stranger.url}; what is broken comes from {hub.url}.",)


def test_an_update_brings_the_files_that_were_chosen(service: Service, hub: Hub) -> None:  # noqa: F811
    branches = hub.repos["user/model"].branches
    branches["main"] = branches["older"] = {**tiny_files(), "model.fp16.safetensors": weights(seed=5)}
    folder = brought(service, "user/model", "config.json,model.fp16.safetensors")
    branches["main"] = {**branches["older"], "model.fp16.safetensors": weights(seed=6), "chat_template.jinja": b"new"}
    sent = hub.sent_bytes()
    service.downloads.queue.wait_for(service.shelf.update("user_model").key)
    assert names_in(folder) == {"config.json", "model.fp16.safetensors", "chat_template.jinja"}
    assert (folder / "model.fp16.safetensors").read_bytes() == weights(seed=6)
    assert hub.sent_bytes() - sent == len(weights()) + 3


def test_the_shelf_knows_sizes_sources_and_favourites(service: Service) -> None:
    brought(service, "user/model")
    service.shelf.favourite("user_model", True)
    first, second = service.shelf.kept()
    assert (first.name, first.favourite, first.repairable) == ("user_model", True, True)
    assert first.source.startswith("user/model:main at ")
    assert first.size_bytes > len(weights())
    assert (second.name, second.used, second.source) == ("demo", 0.0, "")


def test_delete_refuses_what_is_in_use(service: Service, hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    folder = brought(service, "user/model")
    hub.repos["user/model"].branches["main"] = {**tiny_files(), "model.safetensors": weights(seed=4)}
    hub.faults = {"model.safetensors": [Fault(stall=100)]}
    job = service.shelf.update("user_model")
    with pytest.raises(ModelInUse, match="being downloaded"):
        service.shelf.delete("user_model")
    service.downloads.queue.cancel(job.key)
    service.load("demo", {"cpu": True, "bf16": True})
    with pytest.raises(ModelInUse, match="demo is loaded"):
        service.shelf.delete("demo")
    assert service.shelf.marks.last_used()["demo"] == pytest.approx(time.time(), abs=60)
    assert service.shelf.delete("user_model") > len(weights())
    assert not folder.exists()
    service.unload()
    wait_until(lambda: service.snapshot().order is None or service.snapshot().loaded is None)
    service.supervisor.close()
    assert service.shelf.delete("demo") == 0  # a link, of which nothing but the link goes
    assert not (tmp_path / "models" / "demo").is_symlink()


def test_delete_refuses_what_holds_other_models(service: Service, tmp_path: Path) -> None:
    """A GGUF file in the folder of a model; the folder of an owner, which is offered under no name."""
    models = tmp_path / "models"
    for place in ("both", "org/first", "org/second"):
        (models / place).mkdir(parents=True)
        for name, content in tiny_files().items():
            (models / place / name).write_bytes(bytes_of(content))
    (models / "both" / "a.gguf").write_bytes(b"GGUF" * 100)
    with pytest.raises(UserError, match=r"both holds other models: both/a\.gguf\."):
        service.shelf.delete("both")
    with pytest.raises(UserError, match="org holds other models: org/first and 1 more"):
        service.shelf.delete("org")
    assert len(list(models.rglob("model.safetensors"))) == 3
    assert service.shelf.delete("both/a.gguf") == 400
    assert service.shelf.delete("both") > len(weights())
    assert service.shelf.delete("org/first") > len(weights())
    assert [model.name for model in service.models()] == ["demo", "org/second"]


@pytest.mark.parametrize("held", ["both/a.gguf", "linked"])
def test_delete_refuses_the_folder_of_what_is_loaded(service: Service, tmp_path: Path, held: str) -> None:
    """A GGUF file that lies in it, or a link that leads to it."""
    models = tmp_path / "models"
    (models / "both").mkdir()
    for name, content in tiny_files().items():
        (models / "both" / name).write_bytes(bytes_of(content))
    (models / "both" / "a.gguf").write_bytes(b"GGUF" * 100)
    (models / "linked").symlink_to(models / "both", target_is_directory=True)
    file_format = "gguf" if held.endswith(".gguf") else "safetensors"
    order = LoadOrder(held, str(models / held), file_format, "causal", "", LoadOptions(), 256, "", "")
    shelf = Shelf(service.library, models, service.downloads, lambda: [order])
    with pytest.raises(ModelInUse, match=f"{Path(held).name} in both is loaded"):
        shelf.delete("both")
    with pytest.raises(ModelInUse, match="is loaded"):
        shelf.delete(held)
    assert (models / held).exists()


def test_what_the_cache_has_is_the_caches_own(service: Service, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "models--user--cached" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    for name, content in tiny_files().items():
        (cached / name).write_bytes(content)  # type: ignore[arg-type]
    service.library.hf_cache = tmp_path / "cache"
    with pytest.raises(UserError, match="lies in the Hugging Face cache"):
        service.shelf.delete("user/cached")
    assert cached.is_dir()


@pytest.fixture
def http(service: Service) -> TestClient:
    app = FastAPI()
    api.install(app, service)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_the_api_downloads_and_tells(http: TestClient, hub: Hub) -> None:  # noqa: F811
    url = "/v1/internal/download"
    listed: dict[str, Any] = http.get(f"{url}/files", params={"repo": "user/model"}).json()
    assert listed["total_bytes"] == listed["missing_bytes"] == sum(file["bytes"] for file in listed["files"])
    before = http.get("/v1/internal/model/status").json()["downloads"]
    done = http.post(url, json={"repo": "user/model", "wait": True}).json()
    assert (done["state"], done["name"], done["done_bytes"]) == ("done", "user_model", done["total_bytes"])
    assert http.get("/v1/internal/model/status").json()["downloads"] != before
    assert [job["id"] for job in http.get(url).json()["downloads"]] == [done["id"]]
    assert "user_model" in http.get("/v1/internal/model/list").json()["model_names"]


def test_the_api_pauses_resumes_cancels_and_refuses(http: TestClient, hub: Hub) -> None:  # noqa: F811
    url = "/v1/internal/download"
    hub.faults = {"model.safetensors": [Fault(stall=1000)]}
    key = http.post(url, json={"repo": "user/model"}).json()["id"]
    assert http.post(f"{url}/{key}/pause").json()["state"] == "paused"
    hub.faults = {"model.safetensors": [Fault(stall=1000)]}
    assert http.post(f"{url}/{key}/resume").json()["state"] in ("waiting", "running")
    assert http.post(f"{url}/{key}/cancel").json()["state"] == "cancelled"
    for body, kind in (({"repo": "user/nothing"}, "not_on_hub"), ({"repo": "x y"}, "user"), ({}, "option")):
        assert http.post(url, json=body).json()["error"]["kind"] == kind
    assert http.post(f"{url}/nonsense/pause").status_code == 404
    hub.faults = {"config.json": [Fault(flip=1)] * 2}
    broken = http.post(url, json={"repo": "user/model", "wait": True})
    assert (broken.status_code, broken.json()["error"]["kind"]) == (502, "broken_download")
