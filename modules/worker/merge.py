"""``python -m modules.worker.merge``: a model and LoRAs → a new checkpoint that needs no LoRA.

Reads a :class:`MergeOrder` from stdin, whose end ends the process, as SIGTERM does. Writes Progress lines of
:mod:`modules.protocol` to stdout, then Merged, or Failed with exit status 1.
"""

from __future__ import annotations

import gc
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modules.checkpoint import read_json, weight_files
from modules.errors import AdapterError, DiskFull, LoadstoneError, OptionError, WrongResult
from modules.options import LoadOptions
from modules.protocol import Failed, LoadOrder, Merged, MergeOrder, Progress
from modules.units import format_bytes
from modules.worker import process

if TYPE_CHECKING:
    import torch

Emit = Callable[[Any], None]
PROMPTS = ("Question: What should I know about the harbour of Marseille?\nAnswer:", "Once upon a time, there was")
_ANSWER_TOKENS = 16
_AGREEING = 0.9  # of the tokens: weights are rounded once more by merging, which decides where two are as likely
_SPARE_BYTES = 64 * 1024**2  # for a tokenizer and what else lies beside the weights
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
_OWN_SETTINGS = frozenset({"config.json", "generation_config.json"})  # save_pretrained writes them


@dataclass(frozen=True)
class Answers:
    """What a model answers to :data:`PROMPTS`, greedily: for each the inputs and the whole output, as token ids."""

    inputs: tuple[Any, ...]  # 1×n each
    outputs: tuple[Any, ...]  # 1×m each; of a causal model the prompt comes first


def merge(order: MergeOrder, emit: Emit) -> Merged:
    """Write the merged checkpoint; its folder appears when it is whole and has been checked.

    Takes the RAM of the model in its own dtype, and of one layer more. Raises AdapterError for LoRAs that do not
    fit and for a quantized model, OptionError where the folder is there, DiskFull, WrongResult where the merged
    model does not answer as the pair did, and whatever the libraries raise.
    """
    started = time.perf_counter()
    out = Path(order.out)
    _check(order, out)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    try:
        with tempfile.TemporaryDirectory() as cache:
            tokens = _merge(order, aside, cache, emit)
        size = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Merged(str(out), size, tokens, round(time.perf_counter() - started, 3))


def _check(order: MergeOrder, out: Path) -> None:
    if out.exists():
        raise OptionError(f"{out.name} is there already.", "Choose another name, or delete the folder.")
    acting = [choice for choice in order.adapters if choice.weight]
    if not acting:
        raise AdapterError("There is no LoRA to merge, or each has the weight 0.", "Name one with its weight.")
    source = Path(order.path)
    if order.file_format == "gguf" or read_json(source / "config.json").get("quantization_config"):
        raise AdapterError(
            f"{order.name} is quantized, and rounding it once more would spoil what the LoRA has learned.",
            "Merge with the model in 16 or 32 bits that it was made from.",
        )
    needed = sum(file.stat().st_size for file in weight_files(source, order.file_format)) + _SPARE_BYTES
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < needed:
        raise DiskFull(f"The merged model takes {format_bytes(needed)} in {out.parent}; {format_bytes(free)} are free.")


def _merge(order: MergeOrder, aside: Path, cache: str, emit: Emit) -> int:
    """Write the merged model to ``aside`` and check it; returns how many tokens agree."""
    emit(Progress("starting"))
    process.import_packages()
    from modules.worker import tokenizer, transformers_loader
    from modules.worker.adapters import Adapters

    source = _load_order(order, order.path, cache)
    transformers_loader.check_source(source)
    facts = transformers_loader.model_facts(source)
    model = _load(source, "loading the model", emit)
    words = tokenizer.load(source, facts.config, emit).tokenizer
    emit(Progress("applying the LoRAs"))
    Adapters(model, words, source).apply(order.adapters)
    emit(Progress("asking the model with its LoRAs"))
    answers = _answers(model, words)
    _merge_layers(model, emit)
    _write(model, order, aside, emit)
    del model
    gc.collect()  # before the merged one is loaded: there may be no room for both
    return _check_answers(_load(_load_order(order, str(aside), cache), "checking", emit), answers, order)


def _load_order(order: MergeOrder, path: str, cache: str) -> LoadOrder:
    return LoadOrder(
        name=order.name,
        path=path,
        file_format=order.file_format if path == order.path else "safetensors",
        task=order.task,
        quantization="",
        options=LoadOptions(cpu=True),
        ctx_tokens=0,
        offload_dir=cache,
        cache_dir=cache,
        custom_code_allowed=order.custom_code_allowed,
        code_hashes=order.code_hashes if path == order.path else {},
    )


def _load(order: LoadOrder, stage: str, emit: Emit) -> Any:
    """The model on the CPU in the dtype that it is stored in."""
    from modules.worker import quantization, transformers_loader

    facts = transformers_loader.model_facts(order)
    arguments = transformers_loader.load_kwargs(order, transformers_loader.device_facts(order), facts)
    dtype = quantization.DTYPES[facts.stored_dtype or "float32"]
    arguments = transformers_loader.LoadArguments({**arguments.kwargs, "dtype": dtype})
    return transformers_loader.load_weights(order, arguments, stage, emit)


# --- merging ---


def _merge_layers(model: Any, emit: Emit) -> None:
    """Merge what acts, layer by layer, in float32 so that each weight is rounded once, and take peft's layers off."""
    layers = list(_adapter_layers(model))
    for done, (name, layer) in enumerate(layers):
        emit(Progress("merging", done, len(layers), "layers"))
        _put(model, name, _merged(model, name, layer))
    _note_untied(model)
    emit(Progress("merging", len(layers), len(layers), "layers"))


def _adapter_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    within = "\n"  # no module's name begins so
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(within):
            yield name, module
            if isinstance(module, AuxiliaryTrainingWrapper):
                within = f"{name}."  # what it has of peft's layers goes with it


def _merged(model: Any, name: str, layer: Any) -> Any:
    """The plain module that computes what ``layer`` does."""
    if hasattr(layer, "token_adapter"):
        return _with_tokens(layer)
    if not hasattr(layer, "get_base_layer"):
        whole = getattr(layer, "modules_to_save", {})
        return whole[layer.active_adapters[0]] if layer.active_adapters else layer.original_module
    base = layer.get_base_layer()
    acting = [key for key in layer.active_adapters if key in layer.scaling]
    if acting:
        _untie(model, name, base)
        dtype = base.weight.dtype
        base.float()
        layer.merge(safe_merge=True, adapter_names=acting)
        base.to(dtype)
    return base


def _with_tokens(layer: Any) -> Any:
    """The embedding (or the output layer tied to it) with the rows that were trained (trainable_token_indices)."""
    import torch

    base, acting = layer.original_module, layer.active_adapters
    if acting:
        weight = layer.token_adapter.get_merged_weights(acting).detach().to(base.weight.dtype)
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
    return base


def _untie(model: Any, name: str, base: Any) -> None:
    """Give a module weights of its own where another shares them: merging would change that one as well."""
    import torch

    shared = [other for other, p in model.named_parameters(remove_duplicate=False) if p is base.weight]
    if any(not other.startswith(f"{name}.") for other in shared):
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _note_untied(model: Any) -> None:
    """Let the configuration say so where the embedding and the output layer no longer share their weights."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _write(model: Any, order: MergeOrder, aside: Path, emit: Emit) -> None:
    from modules.worker.counting import counting

    with counting("Writing model shards", "writing the merged model", "files", emit):
        model.save_pretrained(str(aside), max_shard_size=order.max_shard_size)
    for file in Path(order.path).iterdir():  # the tokenizer, the chat template, Python code, the licence
        kept = file.suffix not in _WEIGHTS and not file.name.endswith(".index.json") and file.name[0] != "."
        if file.is_file() and kept and file.name not in _OWN_SETTINGS:
            shutil.copyfile(file, aside / file.name)


# --- checking ---


def _answers(model: Any, words: Any) -> Answers:
    import torch

    inputs = tuple(torch.tensor([words(prompt).input_ids], dtype=torch.long) for prompt in PROMPTS)
    outputs = tuple(
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_ANSWER_TOKENS,
            min_new_tokens=_ANSWER_TOKENS,  # an answer that ends at once would compare nothing
            do_sample=False,
            num_beams=1,
        )
        for ids in inputs
    )
    return Answers(inputs, outputs)


def _check_answers(model: Any, answers: Answers, order: MergeOrder) -> int:
    """How many tokens of ``answers`` the merged model would have chosen too, each after the same ones before it."""
    agreeing = total = 0
    for ids, output in zip(answers.inputs, answers.outputs, strict=True):
        chosen = _chosen(model, ids, output, order.task == "seq2seq")
        agreeing += int((chosen == output[0, -len(chosen) :]).sum())
        total += len(chosen)
    if agreeing < _AGREEING * total:
        raise WrongResult(
            f"The merged model agrees with {order.name} and its LoRAs on {agreeing} of {total} tokens only.",
            "Nothing was kept. Use the LoRAs without merging them.",
        )
    return agreeing


def _chosen(model: Any, ids: Any, output: Any, seq2seq: bool) -> torch.Tensor:
    """The likeliest token at each place of the answer in ``output``."""
    import torch

    with torch.no_grad():
        if seq2seq:
            return torch.as_tensor(model(input_ids=ids, decoder_input_ids=output[:, :-1]).logits[0].argmax(-1))
        logits = model(input_ids=output[:, :-1]).logits[0]
    return torch.as_tensor(logits[ids.shape[1] - 1 :].argmax(-1))


# --- the process ---


def _typed(error: Exception, order: MergeOrder) -> LoadstoneError:
    if isinstance(error, LoadstoneError):
        return error
    from modules.worker.failures import translate

    return translate(error, _load_order(order, order.path, ""))


def _ended(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)  # through every ``finally``: what was written aside goes


def main() -> int:
    """The exit status: 0 when the folder is there, 1 after Failed, 2 where stdin does not begin with an order."""
    stdin = process.claim_stdin()
    emit = process.claim_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the web process's to answer
    signal.signal(signal.SIGTERM, _ended)
    process.set_environment()
    process.offer_to_oom_killer()
    order = process.read_order(stdin, MergeOrder)
    if order is None:
        return 2
    process.end_with(stdin)
    try:
        emit(merge(order, emit))
    except Exception as error:
        emit(Failed(_typed(error, order)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
