"""How an answer is taken apart: content, reasoning, and the blocks in which calls stand."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText, ParseStatus, ToolCall, failed_call
from hermes_atropos.toolcalls.schema import functions_of

__all__ = ["REASONING_TAGS", "Blocks", "Read", "Scan", "is_mentioned", "joined"]

#: What most models write around their reasoning.
REASONING_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Scan:
    """A text that is read from its start to its end, and what reading calls needs to know."""

    text: str
    format: str
    tools: Sequence[Tool] | None = None
    reasoning_tags: tuple[str, str] = REASONING_TAGS
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


class Marks(NamedTuple):
    """What is looked for in content and in reasoning, and what ends the latter."""

    in_content: re.Pattern[str]
    in_reasoning: re.Pattern[str]
    close: re.Pattern[str]


@functools.lru_cache(maxsize=256)
def _compiled(tags: str, opens: str, closes: str) -> Marks:
    return Marks(
        re.compile(f"{tags}|(?P<think>{opens})|(?P<close>{closes})", re.MULTILINE),
        re.compile(f"{tags}|(?P<close>{closes})", re.MULTILINE),
        re.compile(closes),
    )


class Blocks:
    """A format whose calls stand in blocks between other text.

    Args:
        opening: regular expression for what begins a call.
        read: reads the calls at an opening.
        wrapper: regular expression for tags around calls; they are left out of the content, and a text that has them
            and no call has one that was begun.
        around: regular expression for tags around the content, which are left out of it.
        think: regular expressions for the tags around reasoning, beside those of the scan.
    """

    def __init__(
        self,
        opening: str,
        read: Callable[[Scan, re.Match[str]], Read],
        *,
        wrapper: str = r"(?!)",
        around: str = r"(?!)",
        think: tuple[str, str] = REASONING_TAGS,
    ) -> None:
        self._read = read
        self._tags = f"(?P<opening>{opening})|(?P<wrapper>{wrapper})|(?P<around>{around})"
        self._calls = re.compile(self._tags, re.MULTILINE)
        self._think = think

    def parse(self, scan: Scan, thinking: bool) -> ParsedText:
        """Content, reasoning and calls; ``thinking``: the text begins within reasoning."""
        text, position = scan.text, 0
        marks = self._marks(scan.reasoning_tags)
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCall] = []
        begun: tuple[re.Match[str], int] | None = None
        while position < len(text):
            if thinking:
                close = self._end_of_reasoning(scan, marks, position)
                reasoning.append(text[position : close.start() if close else len(text)])
                position, thinking = (close.end() if close else len(text)), False
                continue
            mark = scan.search(marks.in_content, position)
            content.append(text[position : mark.start() if mark else len(text)])
            if mark is None:
                break
            position = mark.end()
            if mark.lastgroup == "opening":
                found, position = self._read(scan, mark)
                calls += found
                if not found:
                    content.append(text[mark.start() : position])
            elif mark.lastgroup == "wrapper" and begun is None:
                begun = mark, len(content)
            elif mark.lastgroup == "think":
                thinking = True
            elif mark.lastgroup == "close" and not reasoning and not calls:
                # Nothing opened it here, so the prompt did.
                reasoning, content = ["".join(content)], []
            elif mark.lastgroup == "close":
                content.append(mark.group())
        if begun and not calls:
            tag, kept = begun
            if is_mentioned(scan, *tag.span(), closed=True):
                content.insert(kept, tag.group())
            else:
                content = content[:kept]
                error = f"The answer begins a tool call with {tag.group()}, and does not come to it."
                calls = [failed_call(ParseStatus.UNCLOSED_BLOCK, error, **scan.fields(tag.start(), len(text)))]
        if not calls and not "".join(content).strip():
            reasoning, calls = self._take_calls(scan, reasoning)
        return ParsedText(joined(content), joined(reasoning, "\n"), calls)

    def _marks(self, tags: tuple[str, str]) -> Marks:
        opens, closes = (f"{own}|{re.escape(tag)}" for own, tag in zip(self._think, tags, strict=True))
        return _compiled(self._tags, opens, closes)

    def _end_of_reasoning(self, scan: Scan, marks: Marks, position: int) -> re.Match[str] | None:
        """The tag that closes it: the first that is not within a well-formed call.

        A draft that is not well-formed, or seems to hold another call, proves nothing: then it is the first tag.
        """
        while (mark := scan.search(marks.in_reasoning, position)) and mark.lastgroup != "close":
            position = mark.end()
            if mark.lastgroup == "opening":
                found, end = self._read(scan, mark)
                if not all(call.ok for call in found) or self._calls.search(scan.text, position, end):
                    return marks.close.search(scan.text, position)
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


QUOTES = {"`": "`", "'": "'", '"': '"', "“": "”", "‘": "’", "«": "»", "(": ")"}


def is_mentioned(scan: Scan, start: int, end: int, *, closed: bool) -> bool:
    """Whether the tag in ``[start, end)``, behind which no call begins, is spoken of: prose has it within a line.

    It is if it stands in quotes, or is not ``closed`` and something else follows it.
    """
    text = scan.text
    before = text[max(0, start - 200) : start].rpartition("\n")[2].rstrip(" \t")
    if not before or before.endswith((">", "]")):
        return False
    quoted = start > 0 and end < len(text) and QUOTES.get(text[start - 1]) == text[end]
    return quoted or (not closed and bool(text[end : end + 200].strip()))


def joined(pieces: Sequence[str], separator: str = "") -> str | None:
    """The pieces as one stripped text; None if nothing is left. Around a separator, each is stripped."""
    if separator:
        pieces = [stripped for piece in pieces if (stripped := piece.strip())]
    return separator.join(pieces).strip() or None
