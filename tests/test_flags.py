"""The options as flags: every row of the table in both spellings, and errors that name the nearest flag."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError
from modules.flags import Help, Parsed, parse
from modules.options import COMMAND_OPTIONS, GENERATION_OPTIONS, LOAD_OPTIONS, SERVER_OPTIONS, Spec

ROOT = Path(__file__).resolve().parent.parent
TABLES = {"load": LOAD_OPTIONS, "generation": GENERATION_OPTIONS, "server": SERVER_OPTIONS, "command": COMMAND_OPTIONS}
ROWS = [pytest.param(table, spec, id=spec.name) for table, specs in TABLES.items() for spec in specs.values()]
# A value of each kind that is not the default of any option, as typed and as parsed.
TYPED: dict[str, tuple[list[str], Any]] = {
    "integer": (["3"], 3),
    "number": (["1"], 1.0),
    "text": (["some text"], "some text"),
    "numbers": (["10", "6.5"], (10.0, 6.5)),
    "names": (["a b", "c"], ("a b", "c")),
    "adapters": (["a b", "c:0.5"], ("a b", "c:0.5")),
}


def parsed(*argv: str) -> Parsed:
    result = parse(argv)
    assert isinstance(result, Parsed)
    return result


def help_text() -> str:
    result = parse(["--help"])
    assert isinstance(result, Help)
    return result.text


def both_spellings(flag: str) -> set[str]:
    return {"--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")}


def typed(spec: Spec) -> tuple[list[str], Any]:
    return ([spec.choices[-1]], spec.choices[-1]) if spec.kind == "choice" else TYPED[spec.kind]


@pytest.mark.parametrize(("table", "spec"), ROWS)
def test_every_option_is_a_flag_in_both_spellings(table: str, spec: Spec) -> None:
    for flag in both_spellings(spec.flag):
        if spec.kind == "flag":
            assert getattr(parsed(flag), table) == {spec.name: True}
            for off in both_spellings(f"--no-{flag[2:]}"):
                assert getattr(parsed(off), table) == {spec.name: False}
        else:
            words_of_value, expected = typed(spec)
            assert getattr(parsed(flag, *words_of_value), table) == {spec.name: expected}


@pytest.mark.parametrize(("table", "spec"), ROWS)
def test_every_option_is_explained_in_the_help(table: str, spec: Spec) -> None:
    text = " ".join(help_text().split())
    assert " ".join(spec.help.split()) in text
    shown = f"--no-{spec.flag[2:]}" if spec.default is True else spec.flag  # what changes something
    assert not both_spellings(shown).isdisjoint(text.replace(",", "").split())


def test_names_of_options_are_used_once() -> None:
    assert len({name for table in TABLES.values() for name in table}) == sum(len(table) for table in TABLES.values())


def test_only_what_was_given_is_there() -> None:
    assert parsed() == Parsed({}, {}, {}, {})
    assert parsed("--load-in-4bit", "--temperature", "0", "--listen-port", "0", "--prompt", "x") == Parsed(
        {"load_in_4bit": True}, {"temperature": 0.0}, {"listen_port": 0}, {"prompt": "x"}
    )


def test_server_options_lie_over_those_of_a_file() -> None:
    options = parsed("--listen-port", "1").server_options({"listen_port": 2, "verbose": True})
    assert (options.listen_port, options.verbose, options.hf_cache) == (1, True, True)
    assert parsed("--check").command_options().check


def test_the_last_of_contradicting_flags_counts() -> None:
    assert parsed("--use_fast", "--no_use_fast").load == {"use_fast": False}


@pytest.mark.parametrize(
    "words", [["10", "6"], ["10,6"], ["10GiB", "6GB"], ["10,", "6144MiB"], ["10 6"]], ids=lambda words: " ".join(words)
)
def test_gpu_memory_as_people_write_it(words: list[str]) -> None:
    assert parsed("--gpu-memory", *words).load == {"gpu_memory": (10.0, 6.0)}


def test_folders_may_be_named_one_flag_each() -> None:
    assert parsed("--model-dir", "/a b", "/c", "--model_dir", "/d").server == {"model_dir": ("/a b", "/c", "/d")}


def test_a_path_is_kept_as_given() -> None:
    assert parsed("--model", "../x/Some Model").load == {"model": "../x/Some Model"}


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["--load-in-4bits"], "no flag --load-in-4bits", "--load-in-4bit"),
        (["--LOAD_IN_8BIT"], "no flag --LOAD_IN_8BIT", "--load-in-8bit"),
        (["--quant-typ=fp4"], "no flag --quant-typ.", "--quant_type"),
        (["--modle", "x"], "no flag --modle", "--model"),
        (["--load-in"], "no flag --load-in", "--load-in-"),
        (["--zzzzzz"], "no flag --zzzzzz", ""),
        (["word"], "'word' belongs to no flag", "quotation marks"),
        (["--quant_type", "nf5"], "does not know 'nf5'", "nf4"),
        (["--ctx-size", "large"], "a whole number of at least 0", ""),
        (["--alpha_value", "0.5"], "at least 1", ""),
        (["--gpu-memory", "much"], "not 'much'", ""),
        (["--gpu-memory", "-1"], "at least 0", ""),
        (["--temperature", "nan"], "not nan", ""),
        (["--prompt"], "--prompt", "--help"),
        (["--verbose=yes"], "--verbose", "--help"),
        (["--max-new-tokens", "99999999"], "up to 1,000,000 tokens, not 99,999,999", ""),
    ],
)
def test_mistakes_are_explained(argv: list[str], message: str, hint: str) -> None:
    with pytest.raises(OptionError) as error:
        parse(argv)
    assert message in error.value.message
    assert hint in error.value.hint
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--json"], "--json means nothing without --plan"),
        (["--raw-prompt", "--plan"], "--raw-prompt means nothing without --prompt"),
        (["--file", "*.json", "--no-plan"], "--file means nothing without --download"),
        (["--prompt", "hi", "--plan"], "--prompt and --plan are 2 commands"),
        (["--check", "--merge", "x", "--train", "y"], "--check and --merge and --train are 3 commands"),
    ],
)
def test_commands_that_do_not_go_together_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parsed(*argv).command_options()


def test_commands_that_go_together_are_taken() -> None:
    assert parsed("--plan", "--json").command_options().json
    assert parsed("--prompt", "", "--raw-prompt", "--no-plan").command_options().raw_prompt


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "server.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert "--load-in-4bit" in done.stdout
    assert min(times) < 0.5


def test_help_imports_no_more_than_it_needs() -> None:
    code = "import sys; from modules import flags; flags.parse(['--help']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()}.isdisjoint({"yaml", "gradio", "torch", "numpy"})
    assert {name for name in done.stdout.split() if name.startswith("modules.") and "options" not in name} == {
        "modules.errors",
        "modules.flags",
    }
