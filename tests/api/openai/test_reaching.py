"""Requests that wait for a model: they hold no thread, wait no longer than they should, and say how long it stays."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules import api
from modules.api.openai.reaching import seconds
from modules.errors import OptionError
from modules.library import Library
from modules.options import ServerOptions
from modules.service import Service
from modules.settings import CodeApprovals, Settings
from modules.supervisor import NEVER, Supervisor
from tests import checkpoints
from tests.loops import run
from tests.services import MACHINE
from tests.supervised import FAKE_WORKER, LIMIT_S

WAITING = 60  # more than there are threads for requests


def application(home: Path, **options: Any) -> tuple[Service, FastAPI]:
    """A service whose models are loaded by the fake worker; their names tell it what to do."""
    models = home / "models"
    models.mkdir()
    for name in ("hang", "good"):
        (models / name).symlink_to(checkpoints.llama(), target_is_directory=True)
    service = Service(
        Library([models]), Settings(home / "settings.yaml", models), CodeApprovals(models / ".cache" / "allowed.json"),
        Supervisor(command=(sys.executable, FAKE_WORKER), warm_worker=False), lambda: MACHINE,
        cache_dir=models / ".cache", server=ServerOptions(quantized_cache=False, **options),
    )  # fmt: skip
    app = FastAPI()
    api.install(app, service)
    return service, app


@pytest.fixture
def demanding(tmp_path: Path) -> Iterator[tuple[Service, FastAPI]]:
    """It loads on demand, and lets a request wait for two seconds."""
    service, app = application(tmp_path, load_on_demand=True, load_wait=2)
    yield service, app
    service.close()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None), (5, 5.0), (0, 0.0), (-1, NEVER), ("5m", 300.0), ("1h30m", 5400.0), ("250ms", 0.25), ("10", 10.0),
        ("-1", NEVER), ("-1m", NEVER), ("0", 0.0), ("0s", 0.0), (1.5, 1.5), ("1.5h", 5400.0), (" 5m ", 300.0),
    ],
)  # fmt: skip
def test_times_are_read_as_ollama_reads_them(given: Any, meant: float | None) -> None:
    assert seconds(given) == meant


@pytest.mark.parametrize("given", ["", "soon", "5 m", "5d", "m", "nan", float("nan"), "5m6", "--5"])
def test_other_times_are_refused_by_name(given: Any) -> None:
    with pytest.raises(OptionError, match=r"^keep_alive: "):
        seconds(given)


def test_those_who_wait_keep_nobody_else_waiting_and_are_told_when_to_try_again(
    demanding: tuple[Service, FastAPI],
) -> None:
    service, app = demanding
    on_demand = service.on_demand
    assert on_demand is not None

    async def ask() -> tuple[list[httpx.Response], int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=LIMIT_S) as http:
            body = {"model": "hang", "prompt": "2"}
            asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(WAITING)]
            until = time.monotonic() + LIMIT_S
            while on_demand.waiting < WAITING and time.monotonic() < until:
                await asyncio.sleep(0.01)
            waiting = on_demand.waiting
            assert (await http.get("/v1/internal/model/info")).status_code == 200  # a route that needs a thread
            assert on_demand.waiting == waiting
            return await asyncio.gather(*asked), waiting

    answers, waiting = run(ask())
    assert waiting == WAITING
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"load_pending"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
    assert on_demand.waiting == 0


def test_a_good_model_comes_while_another_hangs_no_longer(demanding: tuple[Service, FastAPI]) -> None:
    service, app = demanding
    answer = TestClient(app).post("/v1/completions", json={"model": "good", "prompt": "3"})
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "1 2 3 ")
    (place,) = service.fleet.places()
    assert (place.name, place.uses) == ("good", 0)


def test_without_load_on_demand_nothing_is_loaded(tmp_path: Path) -> None:
    service, app = application(tmp_path)
    http = TestClient(app)
    service.load("good").wait_loaded(LIMIT_S)
    assert http.post("/v1/completions", json={"model": "good", "prompt": "3"}).status_code == 200
    refused = http.post("/v1/completions", json={"model": "hang", "prompt": "3"})
    assert refused.status_code == 404
    assert "'hang' is not loaded; 'good' is." in refused.json()["error"]["message"]
    refused = http.post("/v1/completions", json={"model": "good", "prompt": "3", "keep_alive": 5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "keep_alive")
    service.close()
