"""Whether a model's files are complete, undamaged and safe to open: cheap checks on names, sizes and headers.

No tensor is read and no ML package is imported, so that the web process can say before loading what a worker
would find after a minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from modules.errors import AdapterError, BrokenCheckpoint, NotAModel, UnsafeCheckpoint, UnsupportedModel

# The names under which transformers looks for weights in a folder: one file, or the index of many.
WEIGHT_FILES: Mapping[str, tuple[str, str]] = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "pytorch": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
# The files of a LoRA, as peft saves it; the last is how older ones keep the weights.
LORA_CONFIG, LORA_WEIGHTS, LORA_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The kinds of adapters that can be mixed and weighed, by peft's names: those whose change can be scaled.
LORA_KINDS: Mapping[str, str] = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
# Ways to initialize that leave the base model alone; every other one starts from a changed copy of its weights.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal"})
_NEEDS_MORE = ("alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config")
# Weights that no loader takes, by the ending of their files.
OTHER_WEIGHTS: Mapping[str, str] = {
    ".h5": "TensorFlow weights", ".msgpack": "Flax weights", ".onnx": "ONNX weights", ".onnx_data": "ONNX weights",
    ".pth": "the original PyTorch weights", ".pt": "PyTorch weights", ".ckpt": "a training checkpoint",
    ".ot": "Rust weights", ".tflite": "TensorFlow Lite weights", ".mlmodel": "Core ML weights", ".npz": "MLX weights",
    ".mlpackage": "Core ML weights", ".nemo": "NeMo weights", ".exl2": "ExLlama weights",
}  # fmt: skip
# The quantizations that transformers 5.23 reads, as checkpoints name them (transformers/quantizers/auto.py,
# AUTO_QUANTIZATION_CONFIG_MAPPING, with one name for both of bitsandbytes).
QUANTIZATIONS = frozenset({
    "aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fouroversix",
    "fp8", "fp_quant", "gemma", "gguf", "gptq", "higgs", "hqq", "metal", "mxfp4", "mxfp8", "nvfp4", "quanto", "quark",
    "sinq", "spqr", "torchao", "vptq",
})  # fmt: skip
# Those that it does not read: what they are called, and what takes them.
OTHER_QUANTIZATIONS: Mapping[str, tuple[str, str]] = {
    "exl2": ("EXL2", "exllamav2, for example in TabbyAPI"),
    "exl3": ("EXL3", "exllamav3, for example in TabbyAPI"),
    "mlx": ("MLX", "mlx-lm, on Apple computers"),
    "modelopt": ("ModelOpt", "vLLM, SGLang or TensorRT-LLM"),
}
UNNAMED_QUANTIZATION = "unknown"
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_JSON_BYTES = 64 << 20  # the index of a thousand experts' tensors takes half of it
_MAX_DIGITS = 50  # of a whole number; the largest that is in use, the lowest float32, has 39
_MAX_CODE_BYTES = 64 << 20  # of all Python files of a model; those that are known take a hundredth
_MAX_DIMENSIONS = 16  # of a tensor; those of models have five
_MAX_LENGTH = 2**63  # of a dimension or a file: what eight bytes hold with a sign
_DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NAME_CODE = ("config.json", "tokenizer_config.json")
_GENERATE = "custom_generate/generate"  # which transformers runs where it is there, without being told to
SETTINGS_FILES = ("config.json", "generation_config.json")
_LFS_POINTER = b"version https://git-lfs"


def check_files(path: Path, file_format: str) -> None:
    """Check the files of the model at ``path`` (a folder, or a ``.gguf`` file) as ``file_format`` stores it.

    ``file_format`` is "safetensors", "pytorch" or "gguf". Raises NotAModel where there are no weights,
    UnsafeCheckpoint where an index names a file outside the folder, BrokenCheckpoint where something is
    missing, cut short or unreadable.
    """
    if file_format == "gguf":
        _check_gguf(path)
        return
    for file in weight_files(path, file_format):
        if file_format == "safetensors":
            safetensors_header(file)
        else:
            _check_pickle(file)


def refuse_quantization(name: str, method: str) -> None:
    """Raises UnsupportedModel where no loader takes a model quantized so; ``method`` is "" for plain weights."""
    if not method or method in QUANTIZATIONS:
        return
    other = "or get the model as plain safetensors, as GPTQ or AWQ, or as a .gguf file."
    if method in OTHER_QUANTIZATIONS:
        called, taken_by = OTHER_QUANTIZATIONS[method]
        raise UnsupportedModel(
            f"{name} is quantized as {called}, which no loader here takes.", f"It is for {taken_by}. Use that, {other}"
        )
    said = "in a way that its files do not name" if method == UNNAMED_QUANTIZATION else f"with {method!r}"
    raise UnsupportedModel(
        f"{name} is quantized {said}, which no loader here takes.", f"Use the program that it was made for, {other}"
    )


def weight_files(path: Path, file_format: str) -> list[Path]:
    """The files that hold the folder's weights, each there. Raises as :func:`check_files` does."""
    single, index = WEIGHT_FILES[file_format]
    if named := read_json(path / "config.json", absent=NotAModel).get("transformers_weights"):
        named = safe_name(path, "config.json", named)  # transformers takes this file instead
        if not (path / named).is_file():
            raise BrokenCheckpoint(f"{path.name} lacks {named}, which its config.json names.")
        single, index = ("", named) if named.endswith(".index.json") else (named, "")
    if (path / single).is_file():  # transformers takes the single file where there are both
        return [path / single]
    if not (path / index).is_file():
        raise NotAModel(f"{path.name} holds neither {single} nor {index}.")
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenCheckpoint(f"{index} in {path.name} names no weights (weight_map).")
    # Each name once: large mixtures have a hundred thousand tensors in some hundred files. What is no text is refused.
    named_files = {name if isinstance(name, str) else safe_name(path, index, name) for name in weight_map.values()}
    names = sorted(safe_name(path, index, name) for name in named_files)
    if missing := [name for name in names if not (path / name).is_file()]:
        raise BrokenCheckpoint(
            f"{len(missing)} of {len(names)} weight files of {path.name} are missing: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else '.'}"
        )
    files = [path / name for name in names]
    if file_format == "safetensors":
        _check_tensors_are_there(path / index, weight_map)
    return files


def identity_of(path: Path, file_format: str) -> list[list[Any]]:
    """What tells a model's files from others, without reading their weights: of each its name, bytes, mtime in ns and
    the SHA-256 of what is small (settings, index, safetensors header). Raises as :func:`check_files` does."""
    if file_format == "gguf":
        return [_facts(path, path.parent, b"")]
    weights = weight_files(path, file_format)
    beside = sorted({*WEIGHT_FILES[file_format], *SETTINGS_FILES} - {file.name for file in weights})
    settings = [path / name for name in beside if name.endswith(".json") and (path / name).is_file()]
    headers = [_header(file) if file_format == "safetensors" else b"" for file in weights]
    return [
        *(_facts(file, path, header) for file, header in zip(weights, headers, strict=True)),
        *(_facts(file, path, file.read_bytes()) for file in settings),
    ]


def _facts(file: Path, folder: Path, start: bytes) -> list[Any]:
    stat = file.stat()
    digest = hashlib.sha256(start).hexdigest() if start else ""
    return [str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns, digest]


def _header(file: Path) -> bytes:
    """The header of a safetensors file, whose size check_files has found sane."""
    with file.open("rb") as stream:
        start = stream.read(8)
        return start + stream.read(int.from_bytes(start, "little"))


def safe_name(folder: Path, source: str, name: object) -> str:
    """``name`` where it stays inside ``folder``; raises UnsafeCheckpoint where ``source`` names one that does not.

    The name alone decides: files of a download cache are links to other folders, and are meant.
    """
    text = name if isinstance(name, str) else ""
    if not text or "\0" in text or _leaves(PurePosixPath(text)) or _leaves(PureWindowsPath(text)):
        raise UnsafeCheckpoint(f"{source} in {folder.name} names a file outside the model's folder: {name!r}.")
    return text


def _leaves(name: PurePosixPath | PureWindowsPath) -> bool:
    return bool(name.anchor) or ".." in name.parts


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor name → ``{"dtype", "shape", "data_offsets"}``.

    Reads the header alone and compares the offsets with the file's size in bytes. Raises BrokenCheckpoint.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        _refuse_lfs_pointer(path, start, size)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
            raise BrokenCheckpoint(f"{path.name} is not a safetensors file ({size:,} bytes).")
        if size < 8 + length:
            raise _cut_short(path, size, 8 + length)
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [_tensor_end(entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenCheckpoint(f"The header of {path.name} is damaged.") from None
    if size < (expected := 8 + length + max(ends, default=0)):
        raise _cut_short(path, size, expected)
    return dict(header)


def _tensor_end(entry: Mapping[str, Any]) -> int:
    """Where a tensor's bytes end after the header. Raises ValueError where its type, shape and offsets make no sense.

    They are looked at before they are multiplied: a text as a length would make one of a thousand million letters.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if type(entry["dtype"]) is not str or type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise ValueError
    if not all(type(number) is int and 0 <= number < _MAX_LENGTH for number in (*shape, begin, end)):
        raise ValueError
    bits = _DTYPE_BITS.get(entry["dtype"])
    if begin > end or (bits is not None and math.prod(shape) * bits != (end - begin) * 8):
        raise ValueError
    return int(end)


def read_json(path: Path, absent: type[BrokenCheckpoint] = BrokenCheckpoint) -> dict[str, Any]:
    """The object in a JSON file. Raises ``absent`` where there is no file, BrokenCheckpoint where it is not JSON."""
    name = f"{path.name} in {path.parent.name}"
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_JSON_BYTES:
                raise BrokenCheckpoint(f"{name} has {size:,} bytes; {_MAX_JSON_BYTES:,} are the most that is read.")
            data = json.loads(file.read(size), parse_int=_whole_number)
    except FileNotFoundError:
        raise absent(f"{path.parent.name} has no {path.name}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BrokenCheckpoint(f"{name} is not JSON: {error}.") from None
    except RecursionError:
        raise BrokenCheckpoint(f"{name} is damaged: it is nested too deep.") from None
    if not isinstance(data, dict):
        raise BrokenCheckpoint(f"{name} holds no JSON object.")
    return data


def _whole_number(digits: str) -> int:
    """Raises ValueError for one so long that computing with it ends in an error."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def python_files(folder: Path) -> Iterator[Path]:
    """The Python files of a model's folder, in order, without those of hidden folders (caches)."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if name.endswith(".py"))


def code_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each Python file of a model's folder, by its name in there. Raises OSError, and BrokenCheckpoint
    for files too large to be code.
    """
    files = list(python_files(folder))
    if (size := sum(path.stat().st_size for path in files)) > _MAX_CODE_BYTES:
        raise BrokenCheckpoint(
            f"The Python files of {folder.name} have {size:,} bytes; {_MAX_CODE_BYTES:,} are the most that is read.",
            "Remove those that the model does not need.",
        )
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def code_references(folder: Path, read: Callable[[Path], Mapping[str, Any]] | None = None) -> dict[str, list[str]]:
    """The Python classes that a model's configurations name (auto_map), by file, for those that name any.

    ``module.Class`` of the folder, or ``org/name--module.Class`` of another repository. ``read`` reads one file;
    without it a damaged one raises BrokenCheckpoint.
    """
    read = read or read_json
    # Where config.json lists config.5.0.0.json, transformers takes the newest of those that it is new enough for.
    files = [*(folder / name for name in _NAME_CODE), *sorted(folder.glob("config.*.json"))]
    auto_maps = {file.name: read(file).get("auto_map") for file in files if file.exists()}
    return {name: sorted(_texts(auto_map)) for name, auto_map in auto_maps.items() if auto_map}


def _texts(value: object, depth: int = 3) -> set[str]:
    """The texts of an auto_map: it names a class, or of a tokenizer two, or of an image processor one a package."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return {text for item in inner for text in _texts(item, depth - 1)} if depth else set()


def refuse_hidden_code(folder: Path, references: Mapping[str, Sequence[str]], shown: Collection[str]) -> None:
    """Raise UnsafeCheckpoint for Python code that would run and is not among the files ``shown``.

    transformers takes any path for a module. One that leads out of the folder, or through a link or a hidden folder,
    names code that nobody saw. Where there is no such file nothing can run, and a model may do without.
    """
    named = [("transformers", _GENERATE), *((s, r.rpartition(".")[0]) for s, many in references.items() for r in many)]
    for source, module in named:
        file = f"{module}.py"
        if "--" in module or file in shown:  # that of another repository is shown as such
            continue
        if _leaves(PurePosixPath(file)) or _leaves(PureWindowsPath(file)) or os.path.lexists(folder / file):
            raise UnsafeCheckpoint(
                f"{source} takes Python code of {folder.name} that is not among its files: {file}.",
                "Put the file into the model's folder itself, not behind a link, and mend auto_map.",
            )


def _check_tensors_are_there(index: Path, weight_map: Mapping[str, str]) -> None:
    held = {file: set(safetensors_header(index.parent / file)) for file in set(weight_map.values())}
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            raise BrokenCheckpoint(f"{file} lacks {tensor}, which {index.name} says is in it.")


def _check_pickle(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    _refuse_lfs_pointer(path, start, size)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise BrokenCheckpoint(f"{path.name} is not a PyTorch file ({size:,} bytes).")
    if start.startswith(b"PK") and not _has_zip_end(path):
        raise BrokenCheckpoint(f"{path.name} is cut short: it ends after {size:,} bytes, without its directory.")


def _has_zip_end(path: Path) -> bool:
    """Whether a zip archive's end record is there; a download that stopped lacks it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 66_000))
        return b"PK\x05\x06" in file.read()


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise NotAModel(f"{path.name} is not a .gguf file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    _refuse_lfs_pointer(path, start, size)
    if not start.startswith(b"GGUF") or size < 24:
        raise BrokenCheckpoint(f"{path.name} is not a GGUF file ({size:,} bytes).")


def _refuse_lfs_pointer(path: Path, start: bytes, size: int) -> None:
    if start.startswith(_LFS_POINTER):
        raise BrokenCheckpoint(
            f"{path.name} is a Git LFS pointer of {size} bytes, not the file itself.",
            "Run `git lfs pull` in the model's folder, or download the model again.",
        )


def _cut_short(path: Path, size: int, expected: int) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path.name} is cut short: {size:,} bytes of {expected:,}.")


def check_lora_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise AdapterError for an adapter that cannot be attached and taken off again, by its adapter_config.json."""
    if config.get("peft_type") not in LORA_KINDS:
        raise AdapterError(
            f"{name} is an adapter of kind {config.get('peft_type')!r}.",
            f"These kinds can be applied: {', '.join(LORA_KINDS.values())}, DoRA and rsLoRA.",
        )
    if (bias := config.get("bias", "none")) not in ("none", False, None):
        raise AdapterError(
            f"{name} changes the base model's biases (bias={bias!r}), which could not be taken back.",
            'Train it with bias="none".',
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        raise AdapterError(
            f"{name} starts from changed base weights (init_lora_weights={init!r}), which could not be taken back.",
            "Convert it to a plain LoRA: peft's save_pretrained does with path_initial_model_for_weight_conversion.",
        )
    if config.get("layer_replication"):
        raise AdapterError(
            f"{name} repeats layers of the base model (layer_replication), which could not be taken back.",
            "Merge it with peft into a model of its own.",
        )
    if more := [key for key in _NEEDS_MORE if config.get(key)]:
        raise AdapterError(f"{name} needs a special way to generate ({more[0]}), which there is none of here.")
