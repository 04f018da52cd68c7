"""The dtype of weights that are not quantized: the documented rule, row by row."""

from __future__ import annotations

import pytest

from modules.options import LoadOptions
from modules.precision import weights_dtype

FOUR, EIGHT, BF16 = LoadOptions(load_in_4bit=True), LoadOptions(load_in_8bit=True), LoadOptions(bf16=True)


@pytest.mark.parametrize(
    ("options", "stored", "prequantized", "gpus", "gpu_bf16", "expected"),
    [
        (LoadOptions(), "float32", False, 0, True, "float32"),
        (LoadOptions(), "bfloat16", False, 0, True, "float32"),
        (BF16, "float32", False, 0, True, "bfloat16"),
        (FOUR, "float32", False, 0, True, "bfloat16"),
        (EIGHT, "float16", False, 0, True, "bfloat16"),
        (LoadOptions(), "float16", True, 0, True, "float16"),
        (LoadOptions(), "", True, 0, True, "bfloat16"),
        (LoadOptions(), "float32", False, 1, True, "float16"),
        (LoadOptions(), "", False, 1, True, "float16"),
        (LoadOptions(), "bfloat16", False, 2, True, "bfloat16"),
        (LoadOptions(), "bfloat16", False, 1, False, "float16"),
        (BF16, "float16", False, 1, False, "bfloat16"),
        (BF16, "float16", True, 1, True, "float16"),
        (FOUR, "bfloat16", False, 1, True, "bfloat16"),
    ],
)
def test_the_rule(
    options: LoadOptions, stored: str, prequantized: bool, gpus: int, gpu_bf16: bool, expected: str
) -> None:
    dtype, _ = weights_dtype(options, stored=stored, prequantized=prequantized, gpus=gpus, gpu_bf16=gpu_bf16)
    assert dtype == expected


def test_a_choice_that_no_option_shows_is_said() -> None:
    _, kept = weights_dtype(LoadOptions(), stored="bfloat16", prequantized=False, gpus=1)
    assert "bfloat16" in kept[0]
    _, fallback = weights_dtype(LoadOptions(), stored="bfloat16", prequantized=False, gpus=0)
    assert "CPU" in fallback[0]
    assert weights_dtype(LoadOptions(cpu=True), stored="bfloat16", prequantized=False, gpus=0)[1] == ()


def test_what_is_unpacked_is_in_the_dtype_of_what_lies_beside_it() -> None:
    for gpus, gpu_bf16 in ((0, True), (1, True), (1, False)):
        for stored, dtype in (("bfloat16", "bfloat16"), ("float16", "float16"), ("", "bfloat16")):
            made = weights_dtype(
                LoadOptions(), stored=stored, prequantized=True, gpus=gpus, gpu_bf16=gpu_bf16, unpacked=True
            )
            assert made == (dtype, ())
