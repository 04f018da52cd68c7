"""What processes of one job have in common: their surroundings."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from modules.service import jobs
from modules.service.jobs import end, start
from modules.supervisor.child import ROOT

TELL = "import json, os; print(json.dumps({**os.environ, 'cwd': os.getcwd()}))"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_job_is_offline_and_has_no_token(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "a-secret-for-this-test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryFile() as log, start((sys.executable, "-c", TELL), log) as process:
        told, _ = process.communicate(timeout=60)
    seen = json.loads(told)
    assert "a-secret-for-this-test" not in told.decode()
    assert (seen["HF_HUB_OFFLINE"], seen["HF_HUB_DISABLE_IMPLICIT_TOKEN"], seen["cwd"]) == ("1", "1", str(ROOT))


def test_one_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_END_S", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    with tempfile.TemporaryFile() as log, start((sys.executable, "-c", code), log) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        end(process)
        assert process.returncode == -9
