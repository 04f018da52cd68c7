"""Answers under way, where the machine does not give what they need."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from modules.api.openai.running import Lane
from tests.api.openai.test_reaching import application
from tests.supervised import LIMIT_S, until


def test_where_no_thread_begins_every_hold_and_place_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three answers finds no thread; the places of all are free afterwards."""
    monkeypatch.setattr(Lane.__init__, "__defaults__", (6,))  # half of them are one user's
    service, app = application(tmp_path)
    start, begun = threading.Thread.start, 0

    def scarce(thread: threading.Thread) -> None:
        nonlocal begun
        if thread.name == "api-answer":
            begun += 1
            if begun == 2:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    try:
        service.load("good").wait_loaded(LIMIT_S)
        http = TestClient(app)
        body = {"model": "good", "prompt": "3", "n": 3}
        answer = http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        until(lambda: service.fleet.places()[0].uses == 0, "no hold is left")
        until(lambda: http.post("/v1/completions", json=body).status_code == 200, "no place is left")
    finally:
        service.close()
