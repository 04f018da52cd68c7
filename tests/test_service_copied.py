"""Whether a quantized copy will be read, as told before the load: against what the worker then does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules import copies
from modules.library import Library
from modules.options import LoadOptions
from modules.planner import plan
from modules.service.copied import reads_copy
from tests import checkpoints
from tests.services import MACHINE
from tests.worker.quantized import NF4, kept, load

DOUBLE = {"use_double_quant": True}


def told(source: Path, work: Path, **options: Any) -> bool:
    """What is told of a load on the processor."""
    facts, asked = Library([source.parent]).facts(source.name), LoadOptions(cpu=True, **options)
    return reads_copy(plan(facts, asked, MACHINE, ctx_tokens=64), asked, work / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of which a copy in nf4 is kept."""
    made = checkpoints.copied(checkpoints.llama(), tmp_path / "models" / "source")
    assert not told(made, tmp_path, **NF4)
    assert not load(made, tmp_path, **NF4).report.from_copy
    return made


def nothing(source: Path, work: Path) -> None:
    pass


def new_weights(source: Path, work: Path) -> None:
    file = source / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def another_setting(source: Path, work: Path) -> None:
    file = source / "config.json"
    file.write_text(file.read_text().replace("{", '{"of_no_matter": 1,', 1))


def a_setting_more(source: Path, work: Path) -> None:
    (source / "generation_config.json").write_text("{}")


def other_versions(source: Path, work: Path) -> None:
    [copy] = kept(work)
    relabelled(copy, versions={**copy.identity["versions"], "bitsandbytes": "0.1"})


def another_layout(source: Path, work: Path) -> None:
    relabelled(kept(work)[0], layout=0)


def of_a_gpu(source: Path, work: Path) -> None:
    [copy] = kept(work)
    relabelled(copy, recipe={**copy.identity["recipe"], "device": "gpu"})


def relabelled(copy: copies.QuantizedCopy, **changes: Any) -> None:
    identity = {**copy.identity, **changes}
    folder = copy.path.with_name(copies.key_of(identity))
    copy.path.rename(folder)
    copies.write_manifest(folder, copy.model, identity)


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (nothing, {}, True),
        (nothing, {"compute_dtype": "float32", "alpha_value": 2.0}, True),  # not in the weights
        (nothing, DOUBLE, False),
        (nothing, {"quant_type": "fp4"}, False),
        (nothing, {"load_in_4bit": False, "load_in_8bit": True}, False),
        (nothing, {"load_in_4bit": False, "bf16": True}, False),
        *((change, {}, False) for change in (new_weights, another_setting, a_setting_more)),
        *((change, {}, False) for change in (other_versions, another_layout, of_a_gpu)),
    ],
)
def test_what_is_told_is_what_the_worker_does(
    source: Path, tmp_path: Path, change: Callable[[Path, Path], None], options: dict[str, Any], expected: bool
) -> None:
    change(source, tmp_path)
    assert told(source, tmp_path, **{**NF4, **options}) is expected
    assert load(source, tmp_path, **{**NF4, **options}).report.from_copy is expected


def test_a_build_that_pip_does_not_name_is_the_same_release(source: Path, tmp_path: Path) -> None:
    [copy] = kept(tmp_path)
    version = copy.identity["versions"]["torch"].split("+")[0]
    relabelled(copy, versions={**copy.identity["versions"], "torch": f"{version}+cu130"})
    assert told(source, tmp_path, **NF4)


def test_another_model_of_the_same_name_has_no_copy(source: Path, tmp_path: Path) -> None:
    other = checkpoints.copied(source, tmp_path / "others" / source.name)
    assert not told(other, tmp_path, **NF4)
    assert not load(other, tmp_path, **NF4).report.from_copy
    assert told(other, tmp_path, **NF4)
    assert told(source, tmp_path, **NF4)


def test_a_model_whose_files_vanish_has_no_copy(source: Path, tmp_path: Path) -> None:
    asked = LoadOptions(cpu=True, **NF4)
    planned = plan(Library([source.parent]).facts(source.name), asked, MACHINE, ctx_tokens=64)
    assert reads_copy(planned, asked, tmp_path / "cache")
    (source / "model.safetensors").unlink()
    assert not reads_copy(planned, asked, tmp_path / "cache")
    assert not reads_copy(replace(planned, path=""), asked, tmp_path / "cache")


def test_telling_it_needs_no_ml_package() -> None:
    code = "import sys, modules.service.copied; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
