"""Small real LoRAs for tests, trained by peft on the demo model and kept under .cache/fixtures between runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from modules.demo import DEMO_MODEL
from modules.protocol import AdapterChoice
from tests.checkpoints import demo_model, kept

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
    source = demo_model()
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


def demo_gptq() -> Path:
    """The demo model in 4-bit GPTQ, groups of 32, by rounding to nearest: all 30 layers in a second or two, where
    gptqmodel's calibration takes minutes. Loading it needs the gptq extra."""

    def build(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        source = demo_model()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        tensors: dict[str, Any] = {}
        for name, weight in load_file(source / "model.safetensors").items():
            if name.endswith("proj.weight"):
                parts = gptq_tensors(weight)
                tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            else:
                tensors[name] = weight.half()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config |= {"dtype": "float16", "quantization_config": _GPTQ}
        (folder / "config.json").write_text(json.dumps(config))

    return kept("demo-gptq-1", build)


_GPTQ_GROUP = 32
_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": _GPTQ_GROUP, "sym": True, "desc_act": False,
    "checkpoint_format": "gptq", "damp_percent": 0.1, "true_sequential": True,
}  # fmt: skip


def gptq_tensors(weight: Any) -> dict[str, Any]:
    """``weight`` (N×K, float) in the layout of GPTQ's 4 bits, symmetric: qweight K/8×N, qzeros K/g×N/8 (one less
    than the zero, as the format has it), scales K/g×N, g_idx K."""
    import torch

    outputs, inputs = weight.shape
    grouped = weight.float().T.reshape(-1, _GPTQ_GROUP, outputs)  # K/g × g × N
    scales = (grouped.abs().amax(1, keepdim=True) / 7.5).clamp(min=1e-6).half().float()
    numbers = (grouped / scales + 8).round().clamp(0, 15).reshape(inputs, outputs)
    return {
        "qweight": _packed(numbers.T).T.contiguous(),
        "qzeros": _packed(torch.full((inputs // _GPTQ_GROUP, outputs), 7)),
        "scales": scales.squeeze(1).half().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // _GPTQ_GROUP,
    }


def _packed(matrix: Any) -> Any:
    """Eight neighbouring columns in one int32, the first in the lowest bits."""
    import torch

    columns = matrix.to(torch.int64).reshape(matrix.shape[0], -1, 8)
    total = sum(columns[:, :, column] << (4 * column) for column in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def untrained(folder: Path, base: Path, kind: str = "LoraConfig", task: str = "causal", **config: Any) -> Path:
    """An adapter with random weights for the small checkpoint at ``base``, saved by peft: it changes much, in no
    direction. ``kind``: the name of peft's class; ``config`` goes to it, ``seed`` excepted."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class = AutoModelForCausalLM if task == "causal" else AutoModelForSeq2SeqLM
    torch.manual_seed(config.pop("seed", 0))
    init = "init_lora_weights" if kind == "LoraConfig" else "init_weights"
    how = getattr(peft, kind)(**{"r": 4, init: False, "target_modules": ["q_proj", "down_proj"], **config})
    adapted = peft.get_peft_model(auto_class.from_pretrained(base), how)
    adapted.peft_config["default"].base_model_name_or_path = base.name
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
