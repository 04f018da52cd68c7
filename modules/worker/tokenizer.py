"""The tokenizer of a model: fast, or the SentencePiece or Python one; a slow-only folder is converted once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from modules.errors import BrokenCheckpoint
from modules.protocol import LoadOrder, Progress

logger = logging.getLogger(__name__)

FAST_FILE = "tokenizer.json"
SPACE = "▁"  # what SentencePiece writes for a space
_VOCABULARIES = (FAST_FILE, "*.model", "vocab*", "*vocab.*", "tekken.json", "*.tiktoken")
# Files that decide what a tokenizer does; a change in one makes a kept conversion stale.
_SOURCES = (*_VOCABULARIES, "config.json", "merges.txt", "tokenizer*", "special_tokens_map.json",
            "added_tokens.json", "chat_template*")  # fmt: skip
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces, a\nnew line and 1,234.5 numbers",
    "Größe, naïve, 東京, emoji 🙂",
)


@dataclass(frozen=True)
class LoadedTokenizer:
    tokenizer: Any
    notes: tuple[str, ...] = ()


def load(order: LoadOrder, config: Any, progress: Callable[[Progress], None]) -> LoadedTokenizer:
    """The tokenizer of the ordered model; ``config`` is the model's configuration.

    With ``use_fast`` a folder that has only a slow form is converted, and the result is kept under
    ``order.cache_dir`` until the source files change. Raises what transformers raises.
    """
    progress(Progress("loading the tokenizer"))
    path = Path(order.path)
    trust = {"local_files_only": True, "trust_remote_code": order.custom_code_allowed}
    if order.file_format == "gguf":
        return LoadedTokenizer(AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, **trust))
    fast = _fast(order, config, trust, progress)
    if fast.is_fast and not _has_vocabulary(path):
        # transformers 5.23 makes a tokenizer of three tokens where the vocabulary is missing, and says nothing.
        raise BrokenCheckpoint(
            f"{order.name} has no tokenizer: no {FAST_FILE}, SentencePiece model or vocabulary file.",
            "Download the tokenizer's files into the model's folder.",
        )
    if order.options.use_fast or not fast.is_fast:
        return LoadedTokenizer(fast)
    return _slow(path, fast)


def _has_vocabulary(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


def _fast(order: LoadOrder, config: Any, trust: dict[str, Any], progress: Callable[[Progress], None]) -> Any:
    path = Path(order.path)
    if (path / FAST_FILE).exists():
        return AutoTokenizer.from_pretrained(str(path), config=config, **trust)
    kept = Path(order.cache_dir) / "tokenizers" / identity(path)
    if kept.is_dir():
        return AutoTokenizer.from_pretrained(str(kept), config=config, **trust)
    progress(Progress("converting the tokenizer"))
    converted = AutoTokenizer.from_pretrained(str(path), config=config, **trust)
    # A tokenizer with code of its own finds that code in its own folder only.
    if converted.is_fast and type(converted).__module__.startswith("transformers."):
        try:
            _keep(converted, kept)
        except OSError as error:
            logger.warning("The converted tokenizer of %s is not kept: %s", order.name, error)
    return converted


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save under another name first, so that a folder of the right name is a whole one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(str(partial))
        if not folder.exists():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def identity(folder: Path) -> str:
    """A name for the folder's tokenizer files as they are now, under this transformers."""
    files = sorted({file for pattern in _SOURCES for file in folder.glob(pattern) if file.is_file()})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(folder.resolve()), transformers.__version__, facts)).encode()).hexdigest()[:20]


class SentencePieceTokenizer(SentencePieceBackend):  # type: ignore[misc]  # transformers is untyped here
    """SentencePiece itself, around any file name.

    Does what transformers 5.23 leaves out of its base class: a prefix space at the start of a text alone, and
    pieces that stand for bytes decoded as bytes (the base class prints ``<0xF0>``).
    """

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of ``text``."""
        if self.legacy or not self.init_kwargs.get("add_prefix_space", True):
            return list(super().tokenize(text, **kwargs))
        pieces = list(super().tokenize(SPACE + text.replace(SPACE, " "), **kwargs))
        before_special = len(pieces) > 1 and pieces[0] == SPACE and pieces[1] in self.all_special_tokens
        return pieces[1:] if before_special else pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces, special tokens written out."""
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in self.added_tokens_encoder:
                text, run = text + self.sp_model.decode(run) + token, []
            else:
                run.append(token)
        return str(text + self.sp_model.decode(run))


def sentencepiece_file(folder: Path) -> Path | None:
    """The folder's SentencePiece model, told from a tiktoken file of the same name by trying; None without one."""
    import sentencepiece

    for file in sorted(folder.glob("*.model")):
        try:
            sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError:
            continue
        return file
    return None


def _slow(path: Path, fast: Any) -> LoadedTokenizer:
    file = sentencepiece_file(path)
    if file is None:
        return LoadedTokenizer(fast, ("use_fast is off, but the model has only the fast form of its tokenizer.",))
    slow = _sentencepiece(file, fast)
    moved = _moved(slow, fast)
    if moved:
        return LoadedTokenizer(
            fast,
            (f"use_fast is off, but {file.name} numbers its pieces unlike the model ({moved!r}): kept the fast form.",),
        )
    differing = sum(slow(text).input_ids != fast(text).input_ids for text in _PROBES)
    note = f"The SentencePiece tokenizer splits {differing} of {len(_PROBES)} probe texts unlike the fast one."
    return LoadedTokenizer(slow, (note,) if differing else ())


def _sentencepiece(file: Path, fast: Any) -> Any:
    """A SentencePiece tokenizer that has the fast one's special tokens, added tokens and chat template."""
    plain = fast("x", add_special_tokens=False).input_ids
    framed = fast("x").input_ids
    starts = fast.bos_token_id is not None and framed[:1] == [fast.bos_token_id] and plain[:1] != framed[:1]
    ends = fast.eos_token_id is not None and framed[-1:] == [fast.eos_token_id] and plain[-1:] != framed[-1:]
    pattern = {(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}.get((starts, ends), "none")
    return SentencePieceTokenizer(
        vocab_file=str(file),
        legacy=getattr(fast, "legacy", True),
        added_tokens_decoder=dict(fast.added_tokens_decoder),
        special_tokens_pattern=pattern,
        add_prefix_space=getattr(fast, "add_prefix_space", True) is not False,
        chat_template=fast.chat_template,
        padding_side=fast.padding_side,
        model_max_length=fast.model_max_length,
        clean_up_tokenization_spaces=False,
        **fast.special_tokens_map,
    )


def _moved(slow: Any, fast: Any) -> str:
    """A piece that has another id in the slow tokenizer than in the fast one; "" where there is none."""
    numbers = fast.get_vocab()
    for token, number in slow.get_vocab().items():
        if numbers.get(token, number) != number:
            return str(token)
    return ""
