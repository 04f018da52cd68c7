"""What is installed, seen without importing it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from modules import packages


def test_a_feature_without_extras_misses_nothing() -> None:
    assert packages.missing("bitsandbytes") == ()


def test_a_missing_package_is_named_as_pip_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "EXTRAS", {"odd": ("no-such-package-at-all==1.0", "PyYAML>=6")})
    assert packages.missing("odd") == ("no-such-package-at-all==1.0",)


@pytest.mark.parametrize("feature", packages.EXTRAS)
def test_every_extra_names_its_packages(feature: str) -> None:
    assert packages.EXTRAS[feature]
    assert set(packages.missing(feature)) <= set(packages.EXTRAS[feature])


def test_a_package_installed_later_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "EXTRAS", {"late": ("late-comer==2.5",)})
    assert packages.missing("late") == ("late-comer==2.5",)

    info = tmp_path / "late_comer-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late-comer\nVersion: 2.5\n")
    assert packages.missing("late") == ()


def test_a_module_without_metadata_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "EXTRAS", {"bare": ("bare-module",)})
    assert packages.missing("bare") == ("bare-module",)
    (tmp_path / "bare_module.py").write_text("raise RuntimeError('imported')\n")
    assert packages.missing("bare") == ()


def test_versions_are_those_of_the_requirements() -> None:
    versions = packages.installed_versions()
    pinned = dict(
        line.split("==") for line in packages.REQUIREMENTS.read_text(encoding="utf-8").splitlines() if "==" in line
    )
    assert {name: pinned[name] for name in ("PyYAML", "safetensors")}.items() <= versions.items()
    assert set(versions) == set(pinned)


def test_comments_markers_and_absent_packages(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# head\n\nPyYAML >=6 # why\nno-such-package[x]; python_version > '3'\n")
    versions = packages.installed_versions(file)
    assert versions["no-such-package"] == ""
    assert versions["PyYAML"]


def test_looking_imports_nothing() -> None:
    code = (
        "import sys; from modules import packages; "
        "[packages.missing(f) for f in packages.EXTRAS]; packages.installed_versions(); "
        "print(sorted({'torch', 'transformers', 'gptqmodel', 'gradio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("prefix", "pip"), [(packages.REQUIREMENTS.parent / ".venv", r"\.venv\S+pip"), ("/usr", "pip")]
)
def test_the_line_installs_where_this_python_looks(prefix: object, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(prefix))
    assert re.fullmatch(rf"{pip} install one==1 two", packages.install_line("one==1", "two"))
