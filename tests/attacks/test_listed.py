"""README lists no attack without a test."""

from __future__ import annotations

import ast

import pytest

from tests.attacks.listed import ATTACKS
from tests.e2e.conftest import ROOT


@pytest.mark.parametrize("test", sorted({test for one in ATTACKS for test in one.tests}))
def test_each_attack_that_is_listed_is_tested(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_each_file_of_attacks_is_listed() -> None:
    named = {test.partition("::")[0] for one in ATTACKS for test in one.tests}
    files = {f"tests/attacks/{file.name}" for file in (ROOT / "tests/attacks").glob("test_*.py")}
    assert files - named == {"tests/attacks/test_listed.py"}
