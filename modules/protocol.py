"""The messages between the web process and a worker, as typed classes.

The web process starts ``python -m modules.worker`` and writes one line of JSON, a :class:`Hello`, to its
stdin, which then stays open: its end means that the web process is gone, and the worker exits. The worker
writes events, one line of JSON each, to its stdout. Commands go by HTTP to 127.0.0.1 on the port of
:class:`Listening`, with ``Authorization: Bearer <secret>``:

======================  ==========================  ==================================================
``POST /load``          :class:`LoadOrder`          202 at once; then Progress …, Ready or Failed events
``POST /generate``      :class:`GenerateOrder`      lines of JSON: Waiting …, Piece …, then one Done or
                                                    Failed;
                                                    closing the connection stops the generation
``POST /adapters``      :class:`AdaptersOrder`      :class:`AdaptersReport`, when they are active
``POST /count``         :class:`CountOrder`         ``{"tokens": n}``
``POST /encode``        :class:`EncodeOrder`        ``{"tokens": [id, …]}``
``POST /decode``        :class:`DecodeOrder`        ``{"text": …}``
``GET /memory``         –                           :class:`Memory`
======================  ==========================  ==================================================

A refused command answers with the error's status and its ``to_dict()``. Nothing here knows an engine.

``python -m modules.worker.merge`` is another process: it reads one line, a :class:`MergeOrder`, and writes
Progress …, then one :class:`Merged` or Failed. The end of its stdin ends it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from modules.errors import LoadstoneError, error_from_dict
from modules.options import GenerationOptions, LoadOptions
from modules.unicode import well_formed
from modules.units import counted

LOAD, GENERATE, COUNT, MEMORY = "/load", "/generate", "/count", "/memory"
ADAPTERS = "/adapters"
ENCODE, DECODE = "/encode", "/decode"
Task = Literal["causal", "seq2seq"]
FinishReason = Literal["stop", "length", "cancelled"]
# {"role": "system" | "user" | "assistant" | "tool", "content": …}; beside them what the model's template reads of tools
ChatMessages: TypeAlias = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Hello:
    """The first line to a worker. ``secret`` never stands in an argument or in the environment."""

    secret: str
    imports: bool = True  # import the ML packages now, so that a later load need not


@dataclass(frozen=True)
class AdapterChoice:
    """One LoRA of a set, and how much of it: 1 is as it was trained, 0 nothing, below 0 the opposite."""

    name: str
    path: str  # its folder, absolute
    weight: float = 1.0


# Tokens of a prompt that a model reads at once, if it answers many at once; fewer where attention keeps all scores.
READ_AT_ONCE, READ_AT_ONCE_EAGER = 2048, 512
HEAP_LIMIT_BYTES = 32 * 2**20  # what a worker frees of smaller pieces stays with it: glibc's limit, set so after a load


@dataclass(frozen=True)
class Expected:
    """What a plan says that a load takes on one kind of device, GPUs together; all in bytes.

    ``kind`` tells apart loads that differ by different amounts: ``4bit (bfloat16) from a copy on RAM``.
    ``context_bytes``: the KV cache and working memory at the full context. ``loading_bytes``: the most while loading.
    ``correction_bytes`` is in all of these: what earlier loads have taught.
    """

    kind: str
    steady_bytes: int  # weights and the process
    context_bytes: int
    loading_bytes: int
    correction_bytes: int = 0

    def peak_bytes(self, used_share: float = 1.0) -> int:
        """The worst moment where ``used_share`` of the context has been used."""
        return max(self.loading_bytes, self.steady_bytes + int(self.context_bytes * min(1.0, used_share)))


@dataclass(frozen=True)
class LoadOrder:
    """Everything a worker needs to load one model. Paths are absolute; bytes are bytes."""

    name: str
    path: str  # the folder, or the .gguf file
    file_format: str  # "safetensors", "pytorch" or "gguf"
    task: Task
    quantization: str  # as the checkpoint stores it; "" = plain weights
    options: LoadOptions
    ctx_tokens: int
    offload_dir: str
    cache_dir: str  # for what is worth keeping between loads (a converted tokenizer)
    custom_code_allowed: bool = False
    code_hashes: dict[str, str] = field(default_factory=dict)  # allowed are these Python files alone: name → SHA-256
    device_map: dict[str, str] = field(default_factory=dict)  # module → "cpu", "disk", GPU number; {}: no plan
    quantized_cache: bool = False  # read and keep quantized copies under cache_dir
    notes: tuple[str, ...] = ()  # what was left out or has no effect; the report's notes begin with them
    adapters: tuple[AdapterChoice, ...] = ()  # applied before the model is ready; one that cannot be fails the load
    expected: tuple[Expected, ...] = ()  # what the plan says it will take


@dataclass(frozen=True)
class Shape:
    """What one answer is held to, and what is told about it, beyond the sampling options.

    ``presence_penalty`` and ``frequency_penalty`` are OpenAI's: taken off a token's logit once, and for each time it
    stands in the answer. ``json_schema``: the text is JSON of that schema; ``{}`` is any object.
    """

    stops: tuple[str, ...] = ()  # texts that end the answer, and are not part of it
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = field(default_factory=dict)  # token id → what is added to its logit
    logprobs: int | None = None  # tell each token's log probability, and that many likeliest ones'
    json_schema: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()  # functions, as OpenAI describes them, for the model's chat template
    tool_choice: str = "auto"  # "auto", "required", or "function:" and the name of the one that is to be called
    template_values: dict[str, Any] = field(default_factory=dict)  # what the chat template reads beside the messages
    split: bool = False  # tell reasoning and tool calls apart from the text, where the model's template marks them


@dataclass(frozen=True)
class GenerateOrder:
    """One answer to generate: ``messages`` through the model's chat template, or ``prompt`` as it stands."""

    options: GenerationOptions
    messages: ChatMessages = ()
    prompt: str = ""
    continue_last: bool = False  # go on with the last message, an assistant's, instead of answering it
    adapters: tuple[AdapterChoice, ...] | None = None  # None: the active set; (): the base; else these, this once
    prompt_ids: tuple[int, ...] = ()  # token ids instead of a prompt's text
    whole: bool = False  # refuse a prompt that does not fit, instead of leaving out its front
    shape: Shape = Shape()
    user: str = ""  # whose answer it is: where many wait, users take turns


@dataclass(frozen=True)
class AdaptersOrder:
    """The whole set that is to be active from now on; empty removes all."""

    adapters: tuple[AdapterChoice, ...] = ()
    wait_s: float = 60.0  # for answers that were asked for earlier; then the order is refused as Busy


@dataclass(frozen=True)
class AdaptersReport:
    """What is active now, and how far that moves the model: see :func:`modules.worker.adapters.proof.moved_nats`."""

    adapters: tuple[AdapterChoice, ...]
    moved_nats: float | None  # KL divergence from the base on a fixed prompt; None for an empty set
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeOrder:
    """Everything that is needed to write a model and LoRAs as one new checkpoint. Paths are absolute."""

    name: str
    path: str  # the model's folder, plain 16- or 32-bit weights
    file_format: str  # "safetensors" or "pytorch"
    task: Task
    adapters: tuple[AdapterChoice, ...]
    out: str  # the folder to make, which appears when it is whole
    max_shard_size: str = "5GB"
    custom_code_allowed: bool = False
    code_hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """The merged checkpoint is there. ``tokens``: of greedy answers that it and the unmerged pair agree on."""

    path: str
    size_bytes: int
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CountOrder:
    messages: ChatMessages = ()
    prompt: str = ""


@dataclass(frozen=True)
class EncodeOrder:
    """The token ids of a text, as it stands."""

    text: str


@dataclass(frozen=True)
class DecodeOrder:
    """The text of token ids, special tokens included."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """What the worker holds, and at most held. ``gpu_…`` by GPU in the order that the machine lists them: what
    torch has reserved, without the context of 0.3 to 0.5 GiB. ``pid``: the worker's; 0: not told."""

    rss_bytes: int
    peak_rss_bytes: int
    gpu_bytes: tuple[int, ...] = ()
    gpu_peak_bytes: tuple[int, ...] = ()
    pid: int = 0


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, as counted on the model that is there, not as asked for."""

    architecture: str
    parameters: int
    footprint_bytes: int  # parameters and buffers, wherever they are
    device_bytes: dict[str, int]  # the same by device: "cpu", "cuda:0", "disk"
    dtype: str  # of the parameters that are not quantized: "bfloat16"
    layer_classes: dict[str, int]  # count of linear layers by class: {"Linear4bit": 210, "Linear": 1}
    device_map: dict[str, str]  # module → "cpu", "disk", "0"; {"": "cpu"} where all is on one device
    context_limit: int  # in tokens, after the RoPE options; 0 = not known
    tokenizer_class: str
    tokenizer_is_fast: bool
    has_chat_template: bool
    attn_implementation: str
    kwargs: dict[str, str]  # of from_pretrained, as logged
    load_seconds: float
    notes: tuple[str, ...] = ()
    from_copy: bool = False  # a quantized copy was read


@dataclass(frozen=True)
class Listening:
    pid: int
    port: int


@dataclass(frozen=True)
class Warm:
    """The ML packages are imported."""

    seconds: float


@dataclass(frozen=True)
class Progress:
    """``stage`` in words; ``total`` 0 where it is not known."""

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""


@dataclass(frozen=True)
class Ready:
    report: LoadReport
    memory: Memory
    adapters: AdaptersReport | None = None  # None where the order named none


@dataclass(frozen=True)
class Failed:
    error: LoadstoneError


@dataclass(frozen=True)
class Piece:
    """More text of an answer. ``tokens``: how many have been generated so far.

    ``logprobs``: of each token since the last piece, ``{"token": text, "logprob": x, "top": {text: x, …}}``.
    """

    text: str
    tokens: int
    reasoning: str = ""  # text that comes before ``text`` and that the model's template marks as thinking
    logprobs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Waiting:
    """The answer has not begun. ``place``: in the line, 1 for the next one; told again when it changes."""

    place: int


@dataclass(frozen=True)
class Done:
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float  # from the first token to the last
    dropped_messages: int = 0  # left out of the front so that the prompt fits the context
    tool_calls: tuple[dict[str, str], ...] = ()  # {"name": …, "arguments": JSON}, in order
    held_tokens: int = 0  # the most that there was memory for at a time since the load, of all answers together
    dropped_tokens: int = 0  # cut from the front of a raw prompt for the same; of a long text in hundreds

    @property
    def left_out(self) -> str:
        """What of the prompt did not fit the context, in words; "" where all did."""
        if self.dropped_messages:
            return f"of the oldest, {counted(self.dropped_messages, 'message')} did not fit"
        return f"of the front, {counted(self.dropped_tokens, 'token')} did not fit" if self.dropped_tokens else ""


Event: TypeAlias = Listening | Warm | Progress | Ready | Failed
Chunk: TypeAlias = Waiting | Piece | Done | Failed

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Hello, LoadOrder, GenerateOrder, CountOrder, EncodeOrder, DecodeOrder, AdaptersOrder, AdaptersReport,
        MergeOrder, Merged, Memory, Listening, Warm, Progress, Ready, Failed, Waiting, Piece, Done,
    )
}  # fmt: skip
_NESTED: dict[str, Mapping[str, type[Any]]] = {
    "LoadOrder": {"options": LoadOptions, "adapters": AdapterChoice},
    "GenerateOrder": {"options": GenerationOptions, "shape": Shape, "adapters": AdapterChoice},
    "AdaptersOrder": {"adapters": AdapterChoice},
    "AdaptersReport": {"adapters": AdapterChoice},
    "MergeOrder": {"adapters": AdapterChoice},
    "Ready": {"report": LoadReport, "memory": Memory, "adapters": AdaptersReport},
}


M = TypeVar("M", bound=type)


def message(**nested: type[Any]) -> Callable[[M], M]:
    """For messages that stand in a module of their own: :func:`decode` knows the class. ``nested``: the fields that
    hold other classes."""

    def known(cls: M) -> M:
        _CLASSES[cls.__name__], _NESTED[cls.__name__] = cls, nested
        return cls

    return known


def encode(message: Any) -> bytes:
    """One line of JSON, newline included, that :func:`decode` turns into an equal message."""
    if isinstance(message, Failed):
        body: dict[str, Any] = {"error": message.error.to_dict()}
    else:
        body = _fields(message)
    return json.dumps({"is": type(message).__name__, **body}, separators=(",", ":"), default=_fields).encode() + b"\n"


def _fields(message: Any) -> dict[str, Any]:
    """Those of a dataclass, not copied, as ``dataclasses.asdict`` would: it takes longer than all the rest."""
    return {item.name: getattr(message, item.name) for item in dataclasses.fields(message)}


def decode(line: bytes | str) -> Any:
    """The message of one line; its texts are Unicode. Raises ValueError for what is none."""
    text = line if isinstance(line, str) else line.decode()
    data = json.loads(text)
    if "\\ud" in text:  # as :func:`encode` writes halves of characters, and emoji
        data = well_formed(data)
    if not isinstance(data, dict) or data.get("is") not in _CLASSES:
        raise ValueError(f"not a message: {line[:200]!r}")
    name = data.pop("is")
    if name == "Failed":
        return Failed(error_from_dict(data["error"]))
    return _build(_CLASSES[name], data)


def _build(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """An instance of ``cls``; JSON's lists become the tuples that frozen classes hold."""
    known = {item.name for item in dataclasses.fields(cls)}
    if unknown := set(data) - known:
        raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    nested = _NESTED.get(cls.__name__, {})
    return cls(**{key: _value(nested.get(key), value) for key, value in data.items()})


def _value(cls: type[Any] | None, value: Any) -> Any:
    """A field's value: one instance of ``cls``, a tuple of them, or plain data where there is no ``cls``."""
    if isinstance(value, list):
        return tuple(_value(cls, item) for item in value) if cls else tuple(value)
    return _build(cls, value) if cls and value is not None else value
