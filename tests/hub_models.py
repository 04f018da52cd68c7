"""Repositories for the Hub of the tests: small, made of bytes, with the files that real ones hold."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from modules.hub.asking import parse
from modules.hub.choosing import RemoteFile, choose
from modules.hub.job import Order
from modules.hub.placing import partial_folder
from modules.hub.queue import key_of
from modules.hub.remote import Hub as Remote
from tests.hub_server import Content, Hub

WIDTH, VOCABULARY = 64, 512


def weights(seed: int = 0, rows: int = VOCABULARY) -> bytes:
    """A safetensors file of one bfloat16 matrix, 64 kB in its standard size."""
    data = random.Random(seed).randbytes(2 * rows * WIDTH)
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [rows, WIDTH], "data_offsets": [0, len(data)]}}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def config() -> bytes:
    """A Llama's, of one layer."""
    return json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCABULARY,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 256,
        "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }).encode()  # fmt: skip


def tiny_files(seed: int = 0) -> dict[str, Content]:
    """A whole model with what is beside it in many repositories."""
    return {
        ".gitattributes": b"* text",
        "README.md": b"# A model\n",
        "config.json": config(),
        "tokenizer.json": b"{}" + b" " * 5000,
        "tokenizer_config.json": b"{}",
        "model.safetensors": weights(seed),
    }


def order_for(hub: Hub, root: Path, text: str = "user/model", pattern: str = "", **more: object) -> Order:
    """The order for what ``text`` names on ``hub``, as the service makes it."""
    ask = parse(text, pattern)
    repository = Remote(hub.url).repository(ask)
    choice = choose(repository.name, repository.files, pattern)
    order = Order(
        repository.name, ask.revision, repository.commit, choice.kind, choice.wanted,
        str(root / ask.folder), str(partial_folder(root, "x")), hub.url, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return Order(**{**vars(order), "partial": str(partial_folder(root, key_of(order)))})


def names_in(folder: Path) -> set[str]:
    """The files in a folder, hidden ones left out."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")}  # fmt: skip


def remote(name: str, content: bytes = b"x") -> RemoteFile:
    """A file of a list, whose content does not matter."""
    return RemoteFile(name, len(content), blob="b")
