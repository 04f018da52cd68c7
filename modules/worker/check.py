"""``python -m modules.worker.check``: try what a load needs, one line each; exit status 1 if something fails."""

from __future__ import annotations

import sys
from collections.abc import Callable


def _torch() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, {', '.join(gpus) or 'CPU only'}"


def _transformers() -> str:
    import transformers
    from transformers import AutoModelForCausalLM

    return f"transformers {transformers.__version__}, {AutoModelForCausalLM.__name__} is there"


def _peft() -> str:
    import peft

    return f"peft {peft.__version__}"


def _four_bit() -> str:
    """Quantize a small matrix to nf4 and back on the device that models would use."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, dtype=torch.float16, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - weight).abs().mean().item()
    if not error < 0.2:
        raise RuntimeError(f"4-bit weights come back wrong: mean error {error:.3f}")
    return f"bitsandbytes 4-bit works on {device} (mean error {error:.3f})"


CHECKS: tuple[Callable[[], str], ...] = (_torch, _transformers, _peft, _four_bit)


def main() -> int:
    failed = 0
    for check in CHECKS:
        try:
            print(f"ok: {check()}", flush=True)
        except Exception as error:
            failed = 1
            print(f"failed: {check.__name__.strip('_')}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
