"""The loaded model as blocks in the order of a forward pass, each of which lies on one device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from modules.library import config as reading
from modules.library.tensors import TensorInfo
from modules.planner.architectures import APPROXIMATE
from modules.planner.buffers import buffers, tower_buffers
from modules.planner.checkpoint import Checkpoint
from modules.planner.formats import Part
from modules.planner.names import Classifier, head_module, loaded_tensors, split_layer

_KEPT_LAYOUTS = 8
_SIDE = ("vision", "visual", "audio", "encoder", "projector", "patcher", "image")
_DTYPE_BYTES_UNKNOWN = 2
_COUNTED = frozenset({"", "awq", "bitsandbytes", "gptq"})  # how these lie in memory was measured


@dataclass(frozen=True)
class Block:
    """Modules that share a device: a layer, or what is tied together. ``layer``: the decoder's layer number, or -1."""

    modules: tuple[str, ...]  # keys of a device map
    parts: Mapping[Part, int]  # part → how many
    layer: int = -1
    head: bool = False

    @cached_property
    def signature(self) -> frozenset[tuple[Part, int]]:
        """Equal for blocks that take the same bytes in every format."""
        return frozenset(self.parts.items())


@dataclass(frozen=True, eq=False)
class Layout:
    """A model in blocks. ``exact``: headers tell all, by rules that are proven for the architecture."""

    blocks: tuple[Block, ...]
    text: Mapping[str, Any]  # the language model's part of config.json
    layers: int  # of the decoder
    exact: bool = True

    @cached_property
    def layer_ranks(self) -> dict[int, int]:
        """A decoder layer's number → how many come before it."""
        return {layer: rank for rank, layer in enumerate(sorted(b.layer for b in self.blocks if b.layer >= 0))}

    @cached_property
    def largest_tensor(self) -> int:
        """The most numbers that one tensor holds, after experts are fused."""
        return max((part.rows * part.columns for block in self.blocks for part in block.parts), default=0)

    @cached_property
    def largest_linear(self) -> int:
        """The most numbers that one linear layer's weight holds."""
        sizes = [p.rows * p.columns for block in self.blocks for p in block.parts if p.kind in ("linear", "packed")]
        return max(sizes, default=0)


@dataclass
class _Draft:
    """What is known while names are read."""

    layers: dict[str, Counter[Part]] = field(default_factory=dict)  # module of a layer → parts
    outside: dict[str, Counter[Part]] = field(default_factory=dict)  # tensor name → parts
    heads: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)

    def add(self, name: str, layer: str, part: Part) -> None:
        place, key = (self.layers, layer) if layer else (self.outside, name)
        place.setdefault(key, Counter())[part] += 1


_layouts: list[tuple[Checkpoint, Layout]] = []
_lock = threading.Lock()


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The checkpoint's layout; those of the last few checkpoints are kept."""
    with _lock:
        for known, layout in _layouts:
            if known is checkpoint:
                return layout
    made = build(checkpoint)
    with _lock:
        _layouts.insert(0, (checkpoint, made))
        del _layouts[_KEPT_LAYOUTS:]
    return made


def build(checkpoint: Checkpoint) -> Layout:
    """Read the layout from names, shapes and configuration."""
    if not checkpoint.tensors:
        return _guessed(checkpoint)
    text = reading.text_part(checkpoint.config)
    tensors = _without_duplicates(checkpoint, dict(loaded_tensors(checkpoint)))
    draft = _read(checkpoint, tensors)
    stack = _decoder_stack(checkpoint, draft, reading.attention(text)[0])
    layers = [name for name in draft.layers if name.rpartition(".")[0] == stack]
    for module, part in (*buffers(text, stack.rpartition(".")[0], len(layers)), *tower_buffers(tensors)):
        if module in draft.layers:
            draft.layers[module][part] += 1
        else:
            draft.outside.setdefault(f"{module}.buffer", Counter())[part] += 1
    blocks = _tied(checkpoint, draft, _blocks(draft, stack))
    in_order = tuple(sorted(blocks, key=lambda block: _order(block, stack)))
    return Layout(in_order, text, len(layers), _is_exact(checkpoint))


def _is_exact(checkpoint: Checkpoint) -> bool:
    """Whether the rules are proven for the architecture: custom code may do anything."""
    known = str(checkpoint.config.get("model_type", "")) not in APPROXIMATE
    known = known and (checkpoint.unpacked or checkpoint.quantization in _COUNTED)
    return known and "auto_map" not in checkpoint.config and checkpoint.file_format != "gguf"


def _read(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> _Draft:
    draft = _Draft()
    classifier = Classifier(checkpoint, tensors)
    for name, tensor in tensors.items():
        layer, rest = split_layer(name)
        if (part := classifier.part(name, rest, tensor)) is None:
            continue
        draft.add(name, layer, part)
        if not layer and part.kind == "head" and len(tensor.shape) == 2:
            draft.heads.append(name.rpartition(".")[0])
        elif not layer and part.kind == "embeddings":
            draft.embeddings.append(name.rpartition(".")[0])
    return draft


def _without_duplicates(checkpoint: Checkpoint, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Without what is tied to another tensor, which files of older versions hold twice."""
    config = checkpoint.config
    shared = [name for name in tensors if name.endswith("shared.weight") and name.count(".") <= 2]
    for source in shared:
        prefix = source.removesuffix("shared.weight")
        for side in ("encoder", "decoder"):
            tensors.pop(f"{prefix}{side}.embed_tokens.weight", None)
    ties = config.get("tie_word_embeddings", reading.text_part(config).get("tie_word_embeddings"))
    head = f"{head_module(checkpoint)}.weight"
    # T5 says that it ties, for the sake of its two embeddings, and unties a head that its files hold.
    if ties and head in tensors and "scale_decoder_outputs" not in config:
        same = [name for name, other in tensors.items() if other.shape == tensors[head].shape and "embed" in name]
        if same or shared:
            del tensors[head]
    return tensors


def _decoder_stack(checkpoint: Checkpoint, draft: _Draft, layers: int) -> str:
    """The list of the language model's layers (``model.layers``), where the KV cache belongs; "" = none."""
    sizes: Counter[str] = Counter()
    for name, parts in draft.layers.items():
        stack = name.rpartition(".")[0]
        sizes[stack] += sum(count * part.rows * part.columns for part, count in parts.items())
    lengths = Counter(name.rpartition(".")[0] for name in draft.layers)

    def rank(stack: str) -> tuple[bool, bool, int]:
        side = any(word in stack for word in _SIDE) and "decoder" not in stack
        return (
            "decoder" in stack if checkpoint.task == "seq2seq" else not side,
            lengths[stack] == layers,
            sizes[stack],
        )

    return max(sizes, key=rank, default="")


def _blocks(draft: _Draft, stack: str) -> list[Block]:
    """A block for each layer, and one for each module outside that holds tensors."""
    blocks = []
    for name, parts in draft.layers.items():
        parent, _, index = name.rpartition(".")
        blocks.append(Block((name,), parts, int(index) if parent == stack else -1))
    containers = {name.rpartition(".")[0] for name in draft.layers}
    outside: dict[str, Counter[Part]] = {}
    for name, parts in draft.outside.items():
        owner = name.rpartition(".")[0]
        holds_layers = not owner or any(c == owner or c.startswith(owner + ".") for c in containers)
        outside.setdefault(name if holds_layers else owner, Counter()).update(parts)
    for name in sorted(outside, key=len):
        parents = [other for other in outside if name.startswith(other + ".")]
        if parents:  # inside a module that is placed as a whole
            outside[min(parents, key=len)].update(outside.pop(name))
    blocks += [Block((name,), parts, head=_is_head(parts)) for name, parts in outside.items()]
    return blocks


def _is_head(parts: Mapping[Part, int]) -> bool:
    return any(part.kind == "head" and part.columns * part.rows > 1 for part in parts)


def _tied(checkpoint: Checkpoint, draft: _Draft, blocks: list[Block]) -> list[Block]:
    """The blocks, those joined whose weights are tied, and with the names of modules that no file holds."""
    if not draft.embeddings:
        return blocks
    source = next((name for name in draft.embeddings if name.endswith("shared")), "")
    names = []
    if source:
        prefix = source.removesuffix("shared")
        sides = ("text_encoder", "text_decoder") if "seamless" in checkpoint.name else ("encoder", "decoder")
        names = [f"{prefix}{side}.embed_tokens" for side in sides]
    if not draft.heads:
        names.append(head_module(checkpoint))
        source = source or next((n for n in draft.embeddings if "position" not in n and "wpe" not in n), "")
    if not names or not source:
        return blocks
    joined = [b for b in blocks if any(_within(n, m) for n in (source, *names) for m in b.modules)]
    modules = [module for block in joined for module in block.modules]
    modules += [name for name in names if not any(_within(name, module) for module in modules)]
    parts: Counter[Part] = Counter()
    for block in joined:
        parts.update(block.parts)
    rest = [block for block in blocks if block not in joined]
    return [Block(tuple(modules), parts), *rest]


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _order(block: Block, stack: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Where the block stands in a forward pass: embeddings, towers and encoder, layers, norms, head."""
    natural: list[tuple[int, int | str]] = [
        (0, int(word)) if word.isdigit() else (1, word) for word in block.modules[0].split(".")
    ]
    name = block.modules[0]
    if block.layer >= 0:
        return 4, natural
    if block.head:
        return 6, natural
    if any(part.kind == "embeddings" for part in block.parts) or name.endswith("rotary_emb"):
        return 0, natural
    if any(word in name for word in _SIDE) and not name.startswith(stack.rpartition(".")[0] + ".norm"):
        return (2 if name.rpartition(".")[2].isdigit() else 3), natural
    return 5, natural


def _guessed(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint without headers (``.bin``): even layers, by the files' size and the configuration."""
    text = reading.text_part(checkpoint.config)
    layers = reading.attention(text)[0]
    hidden = max(1, reading.number(text, "hidden_size", "n_embd", "d_model"))
    item = {"float32": 4}.get(checkpoint.stored_dtype, _DTYPE_BYTES_UNKNOWN)
    numbers = checkpoint.size_bytes // item
    embedding = min(numbers, reading.number(text, "vocab_size") * hidden)
    tied = checkpoint.config.get("tie_word_embeddings") is not False
    rest = max(0, numbers - embedding * (1 if tied else 2))
    names = ("model.embed_tokens", head_module(checkpoint))
    blocks = [Block(names if tied else names[:1], {Part("embeddings", embedding): 1})]
    for index in range(layers):
        rows = rest // layers // hidden
        blocks.append(Block((f"model.layers.{index}",), {Part("linear", rows, hidden): 1}, index))
    if not tied:
        blocks.append(Block(names[1:], {Part("head", embedding): 1}, head=True))
    return Layout(tuple(blocks), text, layers, exact=False)
