"""``python -m modules.worker.convert SRC.gguf DEST``: a GGUF file → a folder of bfloat16 safetensors and a tokenizer.

Writes Progress lines of :mod:`modules.protocol` to stdout, and Failed with exit status 1 where it fails.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.errors import LoadstoneError, NotAModel
from modules.options import LoadOptions
from modules.protocol import Failed, LoadOrder, Progress
from modules.worker import process


def convert(source: Path, destination: Path, emit: Callable[[Any], None]) -> None:
    """Write the model of ``source`` into the new folder ``destination``, which appears when it is whole.

    Takes the RAM of the dequantized weights: 2 bytes a parameter, and as much again while reading.
    Raises NotAModel where there is no such file, and whatever the libraries raise.
    """
    if not source.is_file():
        raise NotAModel(f"There is no GGUF file {source}.")
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(source, partial, emit)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(source: Path, folder: Path, emit: Callable[[Any], None]) -> None:
    emit(Progress("Starting"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    emit(Progress("Reading the GGUF file"))
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.bfloat16,
        # Without it 5.23 keeps the GGUF blocks, which it refuses to save.
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, trust_remote_code=False)
    emit(Progress("Writing safetensors"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _typed(error: Exception, source: Path) -> LoadstoneError:
    if isinstance(error, LoadstoneError):
        return error
    from modules.worker.failures import translate

    order = LoadOrder(
        name=source.name,
        path=str(source),
        file_format="gguf",
        task="causal",
        quantization="gguf",
        options=LoadOptions(),
        ctx_tokens=0,
        offload_dir="",
        cache_dir="",
    )
    return translate(error, order)


def main(arguments: list[str]) -> int:
    """The exit status: 0 when the folder is there, 1 after Failed, 2 for wrong arguments."""
    if len(arguments) != 2:
        print("usage: python -m modules.worker.convert SRC.gguf DEST", file=sys.stderr)
        return 2
    emit = process.claim_stdout()
    process.set_environment()
    process.offer_to_oom_killer()
    source, destination = (Path(argument).absolute() for argument in arguments)
    try:
        convert(source, destination, emit)
    except Exception as error:
        emit(Failed(_typed(error, source)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
