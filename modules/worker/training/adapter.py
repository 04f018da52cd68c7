"""The LoRA that is trained: put into the model, written as peft's files, read again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from modules.checkpoint import LORA_WEIGHTS
from modules.errors import NotTrainable, OptionError
from modules.options import TrainingOptions


def wrap(model: Any, options: TrainingOptions, base_name: str) -> Any:
    """The model as a PeftModel whose LoRA alone is trained, in float32. Raises OptionError and NotTrainable."""
    prepare(model)
    torch.manual_seed(options.seed)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or 2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=list(options.target_modules) or linear_modules(model),
        use_rslora=options.rslora,
        use_dora=options.dora,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of target modules that are embeddings, of a config that changes
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "arget modules" in str(error):
            raise OptionError(
                f"The model has no modules {', '.join(options.target_modules) or 'that are linear'}: {error}",
                "Leave target_modules empty to take all linear ones.",
            ) from error
        raise NotTrainable(f"peft cannot train this model: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = base_name  # and no path of this machine
    return adapted


def linear_modules(model: Any) -> list[str]:
    """The last parts of the names of all linear layers but the output; whole names where a part is a number.

    peft's "all-linear" (0.21.2) passes over the layers of GPTQ.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is not head and _is_linear(module)]
    parts = sorted({name.rpartition(".")[2] for name in names})
    return names if any(part.isdigit() for part in parts) else parts


def _is_linear(module: Any) -> bool:
    packed = isinstance(getattr(module, "qweight", None), torch.Tensor)
    return packed or isinstance(module, torch.nn.Linear | Conv1D)


def prepare(model: Any) -> None:
    """Make a loaded model one that gradients can go through.

    bitsandbytes (0.50.2) and gptqmodel (7.6.0) repack 4-bit weights on a CPU at the first forward in evaluation mode,
    into a form that has no backward pass: training after an evaluation would learn nothing below it. Here they stay as
    they are. What is float16 becomes bfloat16, in which packed weights are then multiplied too: the loss is a mean over
    all tokens of a step, and gradients that small are lost in float16; and a CPU multiplies it some thirty times as
    slowly (torch 2.13). See :func:`loses_gradients` for GPUs without bfloat16.
    """
    replaces = all(has_bfloat16(device) for device in {parameter.device for parameter in model.parameters()})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype == torch.float16 and replaces:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.modules():
        if getattr(module, "compute_dtype", None) == torch.float16 and replaces:
            module.compute_dtype = torch.bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if getattr(module, "linear_mode", "") is None:
            module.linear_mode = "train"
    model.config.use_cache = False


def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16 without emulating it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def loses_gradients(model: Any) -> bool:
    """Whether gradients pass through float16, so that the loss has to be scaled for them."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The LoRA's own parameters by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write(model: Any, folder: Path) -> None:
    """The LoRA as peft's files in the new ``folder``.

    Not through ``state_dict()`` of the whole model, which ruins bitsandbytes' 4-bit weights on a CPU (0.50.2).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(
        model,
        state_dict={name: tensor.detach() for name, tensor in trained(model).items()},
        save_embedding_layers=False,
    )
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / LORA_WEIGHTS, {"format": "pt"})
    config = model.peft_config["default"]
    was, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = was


def read(model: Any, folder: Path) -> None:
    """Give the LoRA the weights that were written in ``folder``."""
    set_peft_model_state_dict(model, load_file(folder / LORA_WEIGHTS))
