"""A repeated 4- or 8-bit load from its quantized copy, against ``from_pretrained`` quantizing again; tokens compared.

Each load has a process of its own; imports do not count. The rows on first loads say what keeping a copy costs.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from modules.demo import DEMO_MODEL as NAME
from tests.benchmarks.common import FIXTURES, Row, bare_script, medians, ratio_row

_TOKENS = """
def tokens(model):
    ids = torch.tensor([[1, 504, 2737, 282, 4649, 314]])
    return [int(number) for number in model.generate(ids, max_new_tokens=32, do_sample=False)[0]]
"""
BARE = f"""
import json, sys, time, torch
import bitsandbytes
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
{_TOKENS}
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
how = four_bit if sys.argv[2] == "load_in_4bit" else BitsAndBytesConfig(load_in_8bit=True)
begun = time.perf_counter()
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, device_map={{"": "cpu"}}, quantization_config=how
)
print(json.dumps({{"seconds": time.perf_counter() - begun, "tokens": tokens(model)}}))
"""
OURS = f"""
import json, sys, time
from modules.worker import process
process.import_packages()  # as a worker that waits warm has
import bitsandbytes, torch
from pathlib import Path
from modules.worker import transformers_loader
from tests.checkpoints import order_for
{_TOKENS}
order = order_for(Path(sys.argv[1]), Path(sys.argv[3]), quantized_cache=True, cpu=True, **{{sys.argv[2]: True}})
begun = time.perf_counter()
loaded = transformers_loader.load(order, lambda _: None)
print(json.dumps({{"seconds": time.perf_counter() - begun, "tokens": tokens(loaded.model)}}))
"""
PRECISIONS = {"load_in_4bit": ("4-bit", "≤ 0.2 ×"), "load_in_8bit": ("8-bit", "–")}


def rows(runs: int = 3) -> list[Row]:
    return [row for option in PRECISIONS for row in _rows(option, runs)]


def _rows(option: str, runs: int) -> list[Row]:
    model = str(FIXTURES / "models" / NAME)
    what, aim = PRECISIONS[option]
    answers: set[str] = set()

    def seconds(source: str, *arguments: str) -> float:
        measured = bare_script(source, model, option, *arguments)
        answers.add(str(measured["tokens"]))
        return measured["seconds"]

    def first() -> float:
        with tempfile.TemporaryDirectory() as unused:
            return seconds(OURS, unused)

    with tempfile.TemporaryDirectory() as work:
        seconds(OURS, work)  # makes the copy
        assert any(Path(work).glob("cache/quantized/*/manifest.json"))
        repeated, once, bare = medians([partial(seconds, OURS, work), first, partial(seconds, BARE)], runs)
    return [
        ratio_row(f"{what} load from a quantized copy, against quantizing again", repeated, bare, "s", aim),
        ratio_row(f"{what} first load, its copy kept, against quantizing alone", once, bare, "s", "–"),
        Row(f"{what} tokens of all these loads", "equal" if len(answers) == 1 else "NOT equal", "–", "–", "equal"),
    ]
