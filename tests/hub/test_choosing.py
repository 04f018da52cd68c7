"""Which files are fetched of repositories as they are on the Hub."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from modules.errors import NotOnHub, UnsafeCheckpoint, UserError
from modules.hub import choose, choose_again
from modules.hub.words import pattern_of
from tests.hub_models import remote

BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def chosen(*names: str, pattern: str = "") -> set[str]:
    return {file.name for file in choose("user/model", [remote(name) for name in names], pattern).wanted}


@pytest.mark.parametrize(
    ("wanted", "needless"),
    [
        (["model.safetensors"], ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"]),
        (["model.safetensors"], ["onnx/model.onnx", "onnx/model_q4.onnx", "coreml/weights.mlmodel"]),
        (["model.safetensors"], ["model.fp16.safetensors", "pytorch_model.fp16.bin"]),
        (["model.safetensors"], ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
        (["model.safetensors"], ["optimizer.pt", "training_args.bin", "checkpoint-5/model.safetensors"]),
        (["model.safetensors"], ["model-Q4_K_M.gguf", "preview.png"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["original/consolidated.00.pth", "original/params.json", "consolidated.safetensors",
             "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
        (["pytorch_model.bin"], ["tf_model.h5"]),
        (["model.fp16.safetensors"], []),
        (["model.safetensors", "modeling_own.py", "configuration_own.py", "chat_template.jinja", "LICENSE"], []),
        (["model.safetensors", "tokenizer.model", "vocab.json", "merges.txt", "README.md"], [".gitattributes"]),
    ],
)  # fmt: skip
def test_one_whole_set_of_weights_and_what_belongs_to_it(wanted: list[str], needless: list[str]) -> None:
    assert chosen(*BESIDE, *wanted, *needless) == {*BESIDE, *wanted}


def test_each_file_left_out_has_its_reason() -> None:
    files = [remote(name) for name in ("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx")]
    left_out = choose("user/model", files).left_out
    assert left_out == {
        "pytorch_model.bin": "a duplicate of the safetensors",
        "onnx/model.onnx": "ONNX weights, which no loader takes",
    }


def test_a_lora_is_told_from_a_model() -> None:
    lora = ["adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"]
    choice = choose("user/lora", [remote(n) for n in (*lora, "adapter_model.bin", "checkpoint-9/adapter_model.bin")])
    assert (choice.kind, {file.name for file in choice.wanted}) == ("lora", set(lora))
    merged = choose("user/lora", [remote(name) for name in (*lora, "config.json", "model.safetensors")])
    assert {file.name for file in merged.wanted} == {*lora, "config.json"}


def test_one_gguf_is_asked_for_not_all() -> None:
    choice = choose("user/gguf", [remote(name) for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "README.md")])
    assert not choice.wanted
    assert "2 GGUF files" in choice.question
    assert chosen("a-Q4_0.gguf", "a-Q8_0.gguf", pattern="*Q8*") == {"a-Q8_0.gguf"}
    assert chosen("only.gguf", "mmproj-only.gguf", "README.md") == {"only.gguf", "README.md"}


def test_what_is_left_out_can_be_had() -> None:
    assert chosen("model.safetensors", "onnx/model.onnx", pattern="*") == {"model.safetensors", "onnx/model.onnx"}
    assert chosen("model.safetensors", "a.bin", "b.bin", pattern="a.bin, b.bin") == {"a.bin", "b.bin"}
    odd = ["model[1].gguf", "model*.gguf", "model1.gguf"]
    assert chosen(*odd, pattern=pattern_of(odd[:2])) == set(odd[:2])


def test_a_file_that_is_not_there_is_named_with_its_neighbours() -> None:
    with pytest.raises(NotOnHub, match=r"no file '\*q4\*'.*Did you mean a-Q4_0\.gguf"):
        choose("user/gguf", [remote("a-Q4_0.gguf")], "*q4*")


def test_a_repository_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="holds no weights that Loadstone loads"):
        choose("user/data", [remote("README.md"), remote("tf_model.h5")])


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a/../../x", "..\\x", "C:/x", "a\0b", ""])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match="list of files"):
        choose("user/model", [remote("model.safetensors"), remote(name)])


@pytest.mark.parametrize(
    "name",
    [
        lambda n: f"checkpoint-{n}/trainer_state.json",
        lambda n: f"part-{n}.bin",
        lambda n: f"model.fp16-{n}.safetensors",
        lambda n: f"a[{n}]*.gguf",
    ],
    ids=["checkpoints", "pickles", "second precisions", "odd names"],
)
def test_a_list_of_very_many_files_takes_no_minutes(name: Callable[[int], str]) -> None:
    """Time that grew with the square of their number would be minutes; it is half a second."""
    files = [remote(name(number)) for number in range(20_000)] + [remote("model.bin")]
    begun = time.process_time()
    choose("user/many", files)
    assert choose("user/many", files, pattern_of(file.name for file in files[:10_000])).wanted == tuple(files[:10_000])
    assert time.process_time() - begun < 15


def again(had: list[str], before: list[str], now: list[str]) -> set[str]:
    files = [[remote(name) for name in names] for names in (now, before)]
    return {file.name for file in choose_again("user/model", files[0], had, files[1]).wanted}


SMALL = ["config.json", "README.md"]


@pytest.mark.parametrize(
    ("had", "before", "now", "wanted"),
    [
        (["model.safetensors"], [], ["model.safetensors", "new.json"], ["model.safetensors", "new.json"]),
        (["model.bin"], [], ["model.safetensors", "model.bin"], ["model.safetensors"]),
        (["model.safetensors"], ["model.bin"], ["model-00001-of-00001.safetensors", "model.bin"],
         ["model-00001-of-00001.safetensors"]),
        (["model.fp16.safetensors"], ["model.safetensors"], ["model.safetensors", "model.fp16.safetensors", "new.json"],
         ["model.fp16.safetensors", "new.json"]),
        (["model.safetensors", "onnx/a.onnx"], [], ["model.safetensors", "onnx/a.onnx"],
         ["model.safetensors", "onnx/a.onnx"]),
        ([], ["model.safetensors"], ["model.safetensors"], []),
        (["a.gguf"], [], ["a.gguf", "b.gguf", "new.json"], ["a.gguf"]),
        (["a.gguf"], [], ["a.gguf", "new.json"], ["a.gguf", "new.json"]),
        (["a.gguf"], ["b.gguf"], ["a.gguf", "b.gguf", "new.json"], ["a.gguf"]),
    ],
)  # fmt: skip
def test_an_update_brings_what_was_chosen(had: list[str], before: list[str], now: list[str], wanted: list[str]) -> None:
    """``before``: what the older commit holds beside what is had."""
    assert again([*SMALL, *had], [*SMALL, *had, *before], [*SMALL, *now]) == {*SMALL, *wanted}


def test_an_update_without_the_older_list_keeps_what_is_had() -> None:
    now = ["model.safetensors", "model.fp16.safetensors", "new.json"]
    assert again(["model.fp16.safetensors"], [], now) == {"model.fp16.safetensors", "new.json"}
    assert again(["README.md"], [], ["README.md"]) == {"README.md"}


def test_an_update_to_a_commit_without_the_weights_is_refused() -> None:
    had = ["config.json", "model.fp16.safetensors"]
    with pytest.raises(NotOnHub, match=r"no model\.fp16\.safetensors any more"):
        again(had, [*had, "model.safetensors"], ["config.json", "model.safetensors"])
    with pytest.raises(NotOnHub, match=r"no README\.md any more"):
        again(["README.md"], ["README.md"], ["model.safetensors"])
