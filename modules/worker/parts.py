"""An answer's text as it grows, told apart: reasoning, text, calls of tools."""

from __future__ import annotations

from collections.abc import Collection

from modules.worker.decoding import overlap
from modules.worker.tools import ToolFormat, read_call

# What templates mark reasoning with. Marks that are special tokens do not show in an answer's text.
_REASONING = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


def reasoning_marks(template: str) -> tuple[str, str] | None:
    """The marks that this chat template knows; None for a model that does not think aloud."""
    return next((marks for marks in _REASONING if marks[1] in template), None)


class Parts:
    """Sorts text as it comes. ``thinking``: the prompt has opened the reasoning already. ``offered``: the functions
    that may be called, in the form ``tools``."""

    def __init__(
        self,
        marks: tuple[str, str] | None,
        *,
        thinking: bool = False,
        tools: ToolFormat | None,
        offered: Collection[str] = (),
    ) -> None:
        self._marks = marks
        self.tools = tools
        self._offered = offered
        self._state = "reasoning" if thinking and marks else "text"
        self._held = ""  # text that may be the beginning of a mark
        self._call = ""
        self._fresh = True  # nothing but blanks since the part began
        self._after_mark = False
        self.calls: list[dict[str, str]] = []

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state == "reasoning"

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, text) that is certain by now."""
        self._held += text
        out = {"reasoning": "", "text": "", "call": ""}
        while self._held and self._step(out):
            pass
        return out["reasoning"], out["text"]

    def _step(self, out: dict[str, str]) -> bool:
        """Move as much as is certain; whether there may be more to move."""
        exits = self._exits()
        found = [(at, mark, state) for mark, state in exits if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark, state = min(found)
            self._move(self._held[:at], out)
            self._held = self._held[at + len(mark) :]
            self._enter(state, out)
            return True
        keep = max((overlap(self._held, mark) for mark, _ in exits), default=0)
        self._move(self._held[: len(self._held) - keep], out)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _exits(self) -> list[tuple[str, str]]:
        """The marks that end the part under way, and what begins behind each."""
        if self._state == "reasoning" and self._marks:
            return [(self._marks[1], "text")]
        if self._state == "call" and self.tools:
            return [(self.tools.end, "text")] if self.tools.end else []
        exits = [(self._marks[0], "reasoning")] if self._marks else []
        return [*exits, (self.tools.begin, "call")] if self.tools and self.tools.begin else exits

    def _move(self, text: str, out: dict[str, str]) -> None:
        if self._fresh and self._after_mark:
            text = text.lstrip()  # blanks that set a part apart
        if self._fresh and self._may_be_call(text):
            self._state = "call"
        self._fresh = self._fresh and not text.strip()
        if self._state == "call":
            self._call += text
        else:
            out[self._state] += text

    def _may_be_call(self, text: str) -> bool:
        """Whether an answer that begins so may as a whole be a call, in a form without tags."""
        return self._state == "text" and self.tools is not None and not self.tools.begin and text.lstrip()[:1] == "{"

    def _enter(self, state: str, out: dict[str, str]) -> None:
        if self._state == "call":
            self._end_call(out, self.tools.end if self.tools else "")
        self._state, self._fresh, self._after_mark = state, True, True

    def _end_call(self, out: dict[str, str], end: str) -> None:
        if self.tools is None:
            return
        call = read_call(self._call, self.tools, self._offered)
        if call is not None:
            self.calls.append(call)
        else:
            out["text"] += f"{self.tools.begin}{self._call}{end}"
        self._call = ""

    def finish(self) -> tuple[str, str]:
        """(reasoning, text) that was held back; what looked like a call and is none is text."""
        out = {"reasoning": "", "text": "", "call": ""}
        self._move(self._held, out)
        self._held = ""
        if self._state == "call":
            self._end_call(out, "")
        return out["reasoning"], out["text"]
