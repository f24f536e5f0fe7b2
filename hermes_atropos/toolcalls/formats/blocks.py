"""How an answer is taken apart: content, reasoning, and the blocks in which calls stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText, ToolCall
from hermes_atropos.toolcalls.schema import functions_of

__all__ = ["Blocks", "Read", "Scan", "joined"]


@dataclass(frozen=True)
class Scan:
    """A text that is read from its start to its end, and what reading calls needs to know."""

    text: str
    format: str
    tools: Sequence[Tool] | None = None
    _absent: dict[re.Pattern[str], int] = field(default_factory=dict)

    def search(self, pattern: re.Pattern[str], start: int) -> re.Match[str] | None:
        """``pattern.search``, which does not look again for what it did not find, so that reading takes linear time."""
        if start >= self._absent.get(pattern, len(self.text) + 1):
            return None
        match = pattern.search(self.text, start)
        if match is None:
            self._absent[pattern] = start
        return match

    def fields(self, start: int, end: int) -> dict[str, Any]:
        """What every call says of itself: its text and its format."""
        return {"raw": self.text[start:end], "format": self.format}

    @cached_property
    def functions(self) -> dict[str, Mapping[str, Any]]:
        return functions_of(self.tools)


#: The calls at an opening, and the place behind them. Without calls, all of it stays in the content.
Read = tuple[list[ToolCall], int]


class Blocks:
    """A format whose calls stand in blocks between other text.

    Args:
        opening: regular expression for what begins a call.
        read: reads the calls at an opening.
        wrapper: regular expression for tags around calls; they are left out of the content.
        think: regular expressions for the tags around reasoning.
    """

    def __init__(
        self,
        opening: str,
        read: Callable[[Scan, re.Match[str]], Read],
        *,
        wrapper: str = r"(?!)",
        think: tuple[str, str] = ("<think>", "</think>"),
    ) -> None:
        calls = f"(?P<opening>{opening})|(?P<wrapper>{wrapper})"
        opens, closes = think
        self._read = read
        self._in_content = re.compile(f"{calls}|(?P<think>{opens})|(?P<close>{closes})", re.MULTILINE)
        self._in_reasoning = re.compile(f"{calls}|(?P<close>{closes})", re.MULTILINE)
        self._calls = re.compile(calls, re.MULTILINE)
        self._close = re.compile(closes)

    def parse(self, scan: Scan, thinking: bool) -> ParsedText:
        """Content, reasoning and calls; ``thinking``: the text begins within reasoning."""
        text, position = scan.text, 0
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCall] = []
        while position < len(text):
            if thinking:
                close = self._end_of_reasoning(scan, position)
                reasoning.append(text[position : close.start() if close else len(text)])
                position, thinking = (close.end() if close else len(text)), False
                continue
            mark = scan.search(self._in_content, position)
            content.append(text[position : mark.start() if mark else len(text)])
            if mark is None:
                break
            position = mark.end()
            if mark.lastgroup == "opening":
                found, position = self._read(scan, mark)
                calls += found
                if not found:
                    content.append(text[mark.start() : position])
            elif mark.lastgroup == "think":
                thinking = True
            elif mark.lastgroup == "close" and not reasoning and not calls:
                # Nothing opened it here, so the prompt did.
                reasoning, content = ["".join(content)], []
            elif mark.lastgroup == "close":
                content.append(mark.group())
        if not calls and not "".join(content).strip():
            reasoning, calls = self._take_calls(scan, reasoning)
        return ParsedText(joined(content), joined(reasoning, "\n"), calls)

    def _end_of_reasoning(self, scan: Scan, position: int) -> re.Match[str] | None:
        """The tag that closes it: the first that is not within a well-formed call.

        A draft that is not well-formed, or seems to hold another call, proves nothing: then it is the first tag.
        """
        while (mark := scan.search(self._in_reasoning, position)) and mark.lastgroup != "close":
            position = mark.end()
            if mark.lastgroup == "opening":
                found, end = self._read(scan, mark)
                if not all(call.ok for call in found) or self._calls.search(scan.text, position, end):
                    return self._close.search(scan.text, position)
                position = end
        return mark

    def _take_calls(self, scan: Scan, pieces: Sequence[str]) -> tuple[list[str], list[ToolCall]]:
        """The pieces without their calls, and the calls."""
        rest: list[str] = []
        calls: list[ToolCall] = []
        for piece in pieces:
            inner, position, kept = Scan(piece, scan.format, scan.tools), 0, []
            while mark := inner.search(self._calls, position):
                kept.append(piece[position : mark.start()])
                position = mark.end()
                if mark.lastgroup == "opening":
                    found, position = self._read(inner, mark)
                    calls += found
                    if not found:
                        kept.append(piece[mark.start() : position])
            rest.append("".join(kept) + piece[position:])
        return rest, calls


def joined(pieces: Sequence[str], separator: str = "") -> str | None:
    """The pieces as one stripped text; None if nothing is left. Around a separator, each is stripped."""
    if separator:
        pieces = [stripped for piece in pieces if (stripped := piece.strip())]
    return separator.join(pieces).strip() or None
