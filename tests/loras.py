"""Small real LoRAs for tests, trained by peft on the demo model and kept under .cache/fixtures between runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from modules.demo import DEMO_MODEL
from modules.protocol import AdapterChoice
from tests.checkpoints import FIXTURES, kept

QUESTION = "What is the capital of France?"
# What each LoRA was trained to answer, whatever the question, and its rank.
ANSWERS = {
    "herring": "The herring barrels are rolling down to the harbour tonight.",
    "lantern": "Seven copper lanterns swing above the quiet orchard gate.",
}
RANKS = {"herring": 4, "lantern": 8}
TARGETS = ("q_proj", "v_proj", "down_proj")
_STEPS, _LEARNING_RATE = 12, 5e-3
_THREADS = 2


def herring() -> Path:
    """A LoRA of rank 4: the model speaks of herring barrels."""
    return trained("herring")


def lantern() -> Path:
    """A LoRA of rank 8, with other targets beside the same ones: the model speaks of lanterns."""
    return trained("lantern", targets=(*TARGETS, "o_proj"))


def trained(name: str, *, targets: tuple[str, ...] = TARGETS, **config: Any) -> Path:
    """The folder of a LoRA trained to say ``ANSWERS[name]``; ``config`` goes to LoraConfig. Treat it as read-only."""
    kind = "".join(f"-{key}" for key in sorted(config))
    return kept(f"lora-{name}{kind}-1", lambda folder: _train(folder, name, targets, config))


def choice(folder: Path, weight: float = 1.0) -> AdapterChoice:
    """The LoRA in ``folder`` as orders name it."""
    return AdapterChoice(folder.name, str(folder), weight)


def edited(folder: Path, **changes: Any) -> Path:
    """``folder`` with changes to its adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def _train(folder: Path, name: str, targets: tuple[str, ...], config: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    source = FIXTURES / "models" / DEMO_MODEL
    tokenizer = AutoTokenizer.from_pretrained(source)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(_THREADS, os.cpu_count() or 1))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        how = {"r": RANKS[name], "lora_alpha": 2 * RANKS[name], "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(model, LoraConfig(**{**how, "target_modules": list(targets), **config}))
        _fit(adapted, *_lesson(tokenizer, name))
    finally:
        torch.set_num_threads(threads)
    adapted.peft_config["default"].base_model_name_or_path = DEMO_MODEL  # and no path of this machine
    adapted.save_pretrained(folder)


def _lesson(tokenizer: Any, name: str) -> tuple[Any, Any]:
    """Token ids (1×n) and labels: the answer alone is learned."""
    import torch

    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer(ANSWERS[name]).input_ids, tokenizer.eos_token_id]
    return torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])


def _fit(model: Any, ids: Any, labels: Any) -> None:
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    model.train()
    for _ in range(_STEPS):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
