"""GGUF headers: against the values that the package gguf reads, and files that are damaged or made up."""

from __future__ import annotations

import os
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.errors import BrokenCheckpoint, LoadstoneError, UnsupportedModel
from modules.library import Library, ModelFacts
from modules.library.gguf_header import GGML_TYPES, read_header
from tests import checkpoints


def facts(path: Path) -> ModelFacts:
    return Library([path.parent]).facts(path.name)


def write(path: Path, architecture: str, fill: Callable[[gguf.GGUFWriter], None], width: int = 64) -> Path:
    """A small GGUF file with one tensor, by the format's own writer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    fill(writer)
    writer.add_tensor("token_embd.weight", numpy.zeros((10, width), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_table_of_types_is_the_format_s() -> None:
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert dict(GGML_TYPES) == sizes


def test_every_value_of_a_real_file() -> None:
    path = checkpoints.gguf_file()
    header, reference = read_header(path), gguf.GGUFReader(str(path))
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert {*header.metadata, *header.arrays} == set(fields)
    for name, field in fields.items():
        if name in header.arrays:
            assert header.arrays[name] == len(field.data), name
        else:
            assert header.metadata[name] == field.contents(), name
    assert header.tensors == {
        tensor.name: (tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)))
        for tensor in reference.tensors
    }


def test_a_large_vocabulary_is_passed_over_quickly() -> None:
    path = checkpoints.gguf_file()

    def seconds(read: Callable[[str], object]) -> float:
        start = time.perf_counter()
        read(str(path))
        return time.perf_counter() - start

    ours = min(seconds(lambda name: read_header(Path(name))) for _ in range(3))
    assert ours < seconds(gguf.GGUFReader) / 5


def test_a_small_file_with_its_own_values(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(2048)
        writer.add_block_count(2)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv([2, 1])
        writer.add_rope_freq_base(5e5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_chat_template("{{ messages }}")
        writer.add_token_list([b"a", b"bc"])
        writer.add_bool("llama.odd", True)

    path = write(tmp_path / "small.gguf", "llama", fill)
    found = facts(path)
    assert (found.context_tokens, found.layers, found.kv_heads, found.head_dim) == (2048, 2, 2, 16)
    assert (found.has_rope, found.rope_theta, found.rope_scaling) == (True, 5e5, "yarn")
    assert found.has_chat_template
    assert found.quantization_detail == "F16"
    assert found.parameters == 640
    assert found.tensors["token_embd.weight"].shape == (10, 64)
    assert read_header(path).metadata["llama.odd"] is True
    assert read_header(path).arrays["tokenizer.ggml.tokens"] == 2


def test_arrays_in_arrays_and_long_ones(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_array("x.long", list(range(5000)))
        writer.add_array("x.short", [1, 2, 3])
        writer.add_array("x.nested", [[1, 2], [3, 4]])
        writer.add_string("x.after", "here")

    header = read_header(write(tmp_path / "arrays.gguf", "x", fill))
    assert header.metadata["x.short"] == (1, 2, 3)
    assert (header.arrays["x.long"], header.arrays["x.nested"]) == (5000, 2)
    assert "x.long" not in header.metadata
    assert header.metadata["x.after"] == "here"


def test_values_of_the_wrong_type_are_not_known(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_string("gpt2.context_length", "many")
        writer.add_float32("gpt2.block_count", float("nan"))

    found = facts(write(tmp_path / "odd.gguf", "gpt2", fill))
    assert (found.context_tokens, found.layers, found.has_rope, found.rope_theta) == (0, 0, False, 0.0)


def test_a_file_without_an_architecture(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedModel, match=r"general\.architecture"):
        facts(tmp_path / "x.gguf")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.018, 0.5, 0.999])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    whole = checkpoints.gguf_file()
    size = whole.stat().st_size
    path = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(int(size * share)))
    with pytest.raises(BrokenCheckpoint, match=r"cut\.gguf"):
        read_header(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGML" + bytes(30), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a name has"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 0, 1, 1, b"k", 99), "of type 99"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**62), "cut short"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 99, 1), "of type 99"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000, "too deep"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 1, 0, 1, b"t", 2**31), "dimensions"),
        (b"GGUF" + struct.pack("<IQQQsIQIQ", 3, 1, 0, 1, b"t", 1, 2**40, 0, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 0), "alignment"),
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match=words):
        read_header(tmp_path / "x.gguf")


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file that begins so and is so long, with nothing in the rest."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def test_of_a_long_text_the_beginning_is_read(tmp_path: Path) -> None:
    """What lies elsewhere has its true size here, and nothing but its beginning: a text may claim all of it."""
    key, text, after = b"general.name", 30 << 20, struct.pack("<Q5sIB", 5, b"after", 0, 7)
    head = b"GGUF" + struct.pack(f"<IQQQ{len(key)}sIQ", 3, 0, 2, len(key), key, 8, text)
    path = sparse(tmp_path / "x.gguf", head, len(head) + text)
    with path.open("ab") as file:
        file.write(after)
    tracemalloc.start()
    try:
        assert read_header(path).metadata["after"] == 7
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_a_header_is_read_up_to_a_limit(tmp_path: Path) -> None:
    key, far = b"general.name", 80_000_000
    head = b"GGUF" + struct.pack(f"<IQQQ{len(key)}sIQ", 3, 0, 2, len(key), key, 8, far)
    with pytest.raises(BrokenCheckpoint, match="its header is larger than"):
        read_header(sparse(tmp_path / "x.gguf", head, far + 1000))
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, far)
    with pytest.raises(BrokenCheckpoint, match="a name has 80,000,000 bytes"):
        read_header(sparse(tmp_path / "y.gguf", head, far + 1000))


def test_an_unknown_tensor_type_is_named_and_not_measured(tmp_path: Path) -> None:
    key, value = b"general.architecture", b"new"
    head = struct.pack("<IQQQ20sIQ3s", 3, 1, 1, len(key), key, 8, len(value), value)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + head + struct.pack("<QsIQIQ", 1, b"t", 1, 2**40, 77, 0))
    assert facts(tmp_path / "x.gguf").quantization_detail == "type 77"


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=120),
    start=st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0\1" + bytes(7)]),
)
def test_random_bytes(data: bytes, start: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.gguf")
        path.write_bytes(start + data)
        with suppress(LoadstoneError):  # and nothing else
            facts(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_real_header_with_a_few_bytes_changed(data: st.DataObject) -> None:
    with checkpoints.gguf_file().open("rb") as file:
        head = bytearray(file.read(1800))
    for position in data.draw(st.lists(st.integers(0, len(head) - 1), max_size=4)):
        head[position] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.gguf")
        path.write_bytes(head)
        with suppress(LoadstoneError):  # and nothing else
            facts(path)
