"""LoRAs on a ready model: the first one against ``PeftModel.from_pretrained``, switching, and speed after removal.

Each first one has a process of its own, since both keep what they have read; imports do not count. Ours includes the
measure of how far the LoRA moves the model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from modules.demo import DEMO_MODEL as NAME
from tests import loras
from tests.benchmarks.common import FIXTURES, Row, bare_script, medians, ratio_row

_LOADED = """
import json, statistics, sys, time, torch
from pathlib import Path
from modules.worker import transformers_loader
from modules.worker.adapters import Adapters
from tests import loras
from tests.checkpoints import order_for
def load():
    order = order_for(Path(sys.argv[1]), Path(sys.argv[3]), cpu=True, bf16=True)
    loaded = transformers_loader.load(order, lambda _: None)
    seconds(loaded.model)
    return loaded.model, Adapters(loaded.model, loaded.tokenizer, loaded.order)
def seconds(model, tokens=24):
    ids = torch.tensor([[1, 504, 2737, 282, 4649, 314]])
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - begun
"""
OURS = f"""
{_LOADED}
model, adapters = load()
begun = time.perf_counter()
adapters.apply((loras.choice(Path(sys.argv[2])),))
print(json.dumps({{"seconds": time.perf_counter() - begun}}))
"""
BARE = """
import json, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
model.generate(torch.tensor([[1, 504, 2737, 282, 4649, 314]]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
begun = time.perf_counter()
PeftModel.from_pretrained(model, sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""
SWITCHING = f"""
{_LOADED}
model, adapters = load()
sets = [(loras.choice(loras.herring()),), (loras.choice(loras.lantern()),),
        (loras.choice(loras.herring(), 0.5), loras.choice(loras.lantern(), 0.5)), ()]
for choices in sets:
    adapters.apply(choices)
def switch(choices):
    begun = time.perf_counter()
    adapters.apply(choices)
    return time.perf_counter() - begun
print(json.dumps({{"seconds": max(statistics.median(switch(choices) for _ in range(9)) for choices in sets)}}))
"""
AFTERWARDS = f"""
{_LOADED}
never, _ = load()
had, adapters = load()
adapters.apply((loras.choice(loras.herring()), loras.choice(loras.lantern())))
seconds(had)
adapters.apply(())
taken = {{"had": [], "never": []}}
for turn in range(12):  # in changing order, and the best of each: what else the machine does only ever adds
    for name in ("had", "never") if turn % 2 else ("never", "had"):
        taken[name].append(seconds(had if name == "had" else never))
print(json.dumps({{name: min(values) for name, values in taken.items()}}))
"""
_TOKENS = 24


def rows(runs: int = 5) -> list[Row]:
    model, lora = str(FIXTURES / "models" / NAME), str(loras.lantern())
    with tempfile.TemporaryDirectory() as work:

        def measured(source: str) -> dict[str, float]:
            return bare_script(source, model, lora, work)

        ours, bare = medians([lambda: measured(OURS)["seconds"], lambda: measured(BARE)["seconds"]], runs)
        switch = measured(SWITCHING)["seconds"]
        after = measured(AFTERWARDS)
    size = sum(file.stat().st_size for file in Path(lora).glob("*.safetensors")) / 1e6
    had, never = (_TOKENS / after[name] for name in ("had", "never"))
    return [
        ratio_row(f"first LoRA of {size:.0f} MB on a ready model, and how far it moves it", ours, bare, "s", "≤ 1.2 ×"),
        Row("switching to a set used before, the slowest of four", f"{switch * 1000:.1f} ms", "–", "–", "≤ 50 ms"),
        ratio_row("generation after LoRAs were removed, against a model that never had one", had, never, "tokens/s",
                  "≥ 0.99 ×"),
    ]  # fmt: skip
