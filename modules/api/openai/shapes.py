"""The parts of OpenAI's answers that chat and completions share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from modules.protocol import Done


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer, and every event of a stream, begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(ends: Iterable[Done], choices_a_prompt: int) -> dict[str, int]:
    """The tokens of prompts, each counted once, and of answers."""
    ends = list(ends)
    prompt = sum(end.prompt_tokens for end in ends[::choices_a_prompt])
    answer = sum(end.completion_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def finish_reason(end: Done) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if end.tool_calls else end.finish_reason


def token_bytes(token: str) -> list[int] | None:
    """The bytes of a token's text; None for one that is a part of a character."""
    return None if "\ufffd" in token else list(token.encode("utf-8", "replace"))
