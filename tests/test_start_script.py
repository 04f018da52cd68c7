"""start.sh in a folder of its own: a real virtual environment, real pip, and a package that lies beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "dirname", "cat")  # all that start.sh calls before it has found a Python
# Says what it was started with; --exit N ends it with that status.
SERVER = """
import json, sys
import tiny
print(json.dumps({"argv": sys.argv[1:], "tiny": tiny.VERSION, "prefix": sys.prefix}))
sys.exit(int(sys.argv[2]) if sys.argv[1:2] == ["--exit"] else 0)
"""


@dataclass(frozen=True)
class Installation:
    """A folder with start.sh; ``first`` is how its first start ended."""

    folder: Path
    first: subprocess.CompletedProcess[str]

    def require(self, version: str) -> None:
        """requirements.txt names this version of the package."""
        (self.folder / "requirements.txt").write_text(f"./tiny-{version}-py3-none-any.whl\n")

    @property
    def installed(self) -> str:
        return (self.folder / ".venv" / "installed.txt").read_text()


def wheel(folder: Path, version: str) -> None:
    """A package of one line, as pip installs it."""
    record = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{record}/RECORD", "")


def start(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """start.sh, from another folder, without any index to install from."""
    return subprocess.run(
        [str(folder / "start.sh"), *flags],
        cwd=folder.parent,
        env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def prepared(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(ROOT / "start.sh", folder)
    (folder / "server.py").write_text(SERVER)
    return folder


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """One for all tests here; the folder's name has a space in it."""
    folder = prepared(tmp_path_factory.mktemp("start") / "a folder")
    for version in ("1.0", "2.0"):
        wheel(folder, version)
    (folder / "requirements.txt").write_text("./tiny-1.0-py3-none-any.whl\n")
    return Installation(folder, start(folder, "--model", "a name", "--cpu"))


@pytest.fixture
def ready(installation: Installation) -> Iterator[Installation]:
    """The installation with version 1.0 in it."""
    installation.require("1.0")
    assert start(installation.folder, "--install-only").returncode == 0
    yield installation
    installation.require("1.0")


@pytest.fixture
def no_pip(tmp_path: Path) -> dict[str, str]:
    """An environment in which pip only leaves a file, ``called``, and fails."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # without it the real pip, which has one, would be taken
    called = tmp_path / "called"
    (tmp_path / "pip" / "__main__.py").write_text(f"open({str(called)!r}, 'w').close()\nraise SystemExit(3)\n")
    return {"PYTHONPATH": str(tmp_path)}


def said(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def test_the_first_start_installs_and_passes_the_flags_on(installation: Installation) -> None:
    assert installation.first.returncode == 0, installation.first.stderr
    assert "Installing the requirements" in installation.first.stderr
    assert said(installation.first) == {
        "argv": ["--model", "a name", "--cpu"],
        "tiny": "1.0",
        "prefix": str(installation.folder / ".venv"),
    }


def test_a_second_start_runs_no_pip(ready: Installation, no_pip: dict[str, str], tmp_path: Path) -> None:
    done = start(ready.folder, "--listen-port", "1", **no_pip)
    assert said(done)["argv"] == ["--listen-port", "1"]
    assert "Installing" not in done.stderr
    assert not (tmp_path / "called").exists()


def test_a_second_start_needs_no_python_but_its_own(ready: Installation) -> None:
    done = start(ready.folder, PYTHON="/no/such/python")
    assert said(done)["prefix"] == str(ready.folder / ".venv")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_exit_status_is_the_servers(ready: Installation, status: int) -> None:
    assert start(ready.folder, "--exit", str(status)).returncode == status


def test_changed_requirements_are_installed(ready: Installation) -> None:
    ready.require("2.0")
    done = start(ready.folder)
    assert said(done)["tiny"] == "2.0"
    assert "tiny-2.0" in ready.installed


def test_an_installation_that_failed_is_tried_again(
    ready: Installation, no_pip: dict[str, str], tmp_path: Path
) -> None:
    ready.require("2.0")
    failed = start(ready.folder, **no_pip)
    assert (tmp_path / "called").exists()
    assert failed.returncode == 3
    assert not failed.stdout  # the server was not started
    assert "tiny-1.0" in ready.installed
    assert said(start(ready.folder))["tiny"] == "2.0"


def test_install_only_starts_no_server(ready: Installation) -> None:
    done = start(ready.folder, "--install-only")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_python_that_is_too_old_is_said(tmp_path: Path) -> None:
    """On a machine whose only Python answers the question for its version as an old one would."""
    folder = prepared(tmp_path / "fresh")
    (folder / "requirements.txt").write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = start(folder, PATH=str(tools), PYTHON=str(old))
    assert done.returncode == 2
    assert "Python 3.10 or newer is needed" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (folder / ".venv").exists()
