"""What the button says that mends an error, and for which model it is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OutOfMemory
from modules.options import LoadOptions
from modules.ui import model_tab
from modules.ui.fixes import fix_label
from tests.services import Make, services


@pytest.mark.parametrize(
    ("fix", "options", "label"),
    [
        ({}, None, ""),
        ({"load_in_4bit": True, "load_in_8bit": False, "bf16": False}, None, "Load in 4-bit instead"),
        (
            {"load_in_4bit": True, "load_in_8bit": False, "bf16": False, "use_double_quant": True, "ctx_size": 2048},
            LoadOptions(load_in_8bit=True),
            "Load in 4-bit and with double quantization and with context 2,048 tokens instead",
        ),
        ({"auto_devices": True}, None, "Load with automatic devices instead"),
        ({"cpu_memory": 51.326221880503}, None, "Load with RAM 51.3 GiB instead"),
        ({"gpu_memory": ()}, LoadOptions(gpu_memory=(4.0,)), "Load with no GPU memory set instead"),
        (
            {"cpu": True, "gpu_memory": (), "auto_devices": False},
            LoadOptions(gpu_memory=(4.0,)),
            "Load with CPU only instead",
        ),
        (
            {"load_in_4bit": False, "load_in_8bit": False},
            LoadOptions(load_in_4bit=True),
            "Load without 4-bit instead",
        ),
        (
            {"alpha_value": 1.0, "compress_pos_emb": 1.0},
            LoadOptions(alpha_value=2.0),
            "Load with alpha_value 1 instead",
        ),
    ],
)
def test_the_button_names_what_changes(fix: dict[str, Any], options: LoadOptions | None, label: str) -> None:
    assert fix_label(OutOfMemory("It does not fit.", fix=fix), options) == label


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    with services(tmp_path, demo_model) as made:
        yield made


def test_the_starts_error_is_mended_for_its_own_model_alone(make: Make) -> None:
    service = make()
    service.start_error, service.start_error_for = OutOfMemory("Too large.", fix={"load_in_4bit": True}), "large"
    for model, shown in (("large", True), ("demo", "hidden")):
        card, *_, fix, _allow = model_tab.state_updates(service, model)[:7]
        assert "Too large." in card
        assert fix["visible"] == shown
    assert model_tab.mendable(service, "demo") == (None, None)
