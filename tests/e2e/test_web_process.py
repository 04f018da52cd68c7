"""The web process: no ML package in memory, requests from elsewhere refused, bad starts said."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.e2e.conftest import ROOT, Server
from tests.e2e.test_load_from_the_browser import NAME
from tests.machine import QUICK_FLAGS

ML_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")

IN_PROCESS = """
import sys
import server
from pathlib import Path
from modules import flags, web
from modules.errors import LoadstoneError
from fastapi.testclient import TestClient

service = server.prepare(flags.parse(sys.argv[1:]))[0]
client = TestClient(web.application(service), base_url="http://127.0.0.1")
with client:
    assert "Loadstone" in client.get("/").text
    names = client.get("/v1/internal/model/list").json()["model_names"]
    answer = client.post("/v1/internal/model/load", json={"model_name": names[0], "args": {"bf16": True}})
    assert answer.status_code == 200, answer.text
    service.supervisor.close()
print([name for name in %r if name in sys.modules])
"""


def test_page_list_and_load_bring_no_ml_package(home: Path) -> None:
    """In a fresh interpreter: the page is served, models are listed, one is loaded."""
    script = IN_PROCESS % (ML_PACKAGES,)
    command = [sys.executable, "-c", script, "--home", str(home), "--no-hf-cache", "--no-warm-worker"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_running_server_maps_no_torch_library(launch: Callable[..., Server]) -> None:
    server = launch("--model", NAME, *QUICK_FLAGS)
    server.wait_state("ready")
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "bitsandbytes" not in maps


_COUNT_FRAMES = """window.frames_asked = 0;
const real = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (then) => { window.frames_asked += 1; return real(then); }"""


def test_a_page_that_nobody_touches_draws_nothing(quiet_server: Server, open_page: Callable[..., Page]) -> None:
    """It would do so 60 times a second, on the processor that the model may need."""
    page = open_page(quiet_server)
    page.add_init_script(_COUNT_FRAMES)
    page.reload()
    page.wait_for_selector("#summary .small")
    page.wait_for_timeout(4000)  # until the sign of the opening page has come to rest
    assert page.evaluate("window.frames_asked") > 0
    page.evaluate("window.frames_asked = 0")
    page.wait_for_timeout(2000)
    assert page.evaluate("window.frames_asked") < 12


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {"Host": "evil.example"}),
        ("/config", {"Host": "evil.example:7860"}),
        ("/v1/internal/model/list", {"Host": "evil.example"}),
        ("/v1/internal/model/list", {"Origin": "http://evil.example"}),
        ("/v1/internal/model/list", {"Origin": "null"}),
        ("/v1/internal/model/list", {"Sec-Fetch-Site": "cross-site"}),
        ("/gradio_api/info", {"Origin": "http://localhost:1"}),
    ],
)
def test_requests_of_other_sites_are_refused(quiet_server: Server, path: str, headers: dict[str, str]) -> None:
    request = urllib.request.Request(quiet_server.url + path, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 403


def test_its_own_requests_are_served(quiet_server: Server) -> None:
    own = {"Origin": quiet_server.url, "Sec-Fetch-Site": "same-origin"}
    assert quiet_server.call("/v1/internal/model/list", headers=own)[0] == 200
    with urllib.request.urlopen(quiet_server.url, timeout=10) as page:
        assert page.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("args", [{"disk_cache_dir": "/tmp/x"}, {"no_such_option": 1}, {"ctx_size": "many"}])
def test_bad_options_over_http_are_typed_errors(quiet_server: Server, args: dict[str, Any]) -> None:
    status, body = quiet_server.load(NAME, **args)
    assert status == 422
    assert body["error"]["kind"] == "option"
    assert body["error"]["message"]


@pytest.mark.parametrize("name", ["../models", "/etc", "nothing-like-it", "SmolLM2-135M-Instruc"])
def test_unknown_names_over_http_are_refused(quiet_server: Server, name: str) -> None:
    status, body = quiet_server.load(name)
    assert (status, body["error"]["kind"]) == (404, "model_not_found")
    assert quiet_server.info()["state"] == "empty"
