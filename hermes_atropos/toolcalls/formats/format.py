"""What a tool-call format is, the table of those that are known, and how an answer is taken apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText, ParseStatus, ToolCall, failed_call
from hermes_atropos.toolcalls.schema import functions_of

__all__ = [
    "FORMATS",
    "REASONING_TAGS",
    "Blocks",
    "Format",
    "Read",
    "Scan",
    "format_marked",
    "format_named",
    "format_reading",
    "is_mentioned",
    "joined",
    "register",
]

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


@dataclass(frozen=True)
class Format:
    """How a family of models writes tool calls.

    Attributes:
        name: what ``tool_format`` calls it.
        parse: takes an answer apart; ``True`` says that the answer begins within reasoning. It never raises.
            ``Blocks(…).parse`` is one, for calls that stand in blocks between other text.
        mark: regular expression for what only this format has. A chat template that writes no calls itself is
            recognised by it, in what it says of the tools.
        parsers: further names by which ``tool_format`` finds it: those of vLLM's tool parsers for these models.
        arguments_key: where a call is one JSON object, the key of its arguments. A model whose call failed is shown
            the schema of that object, else that of the arguments alone.
        json_arguments: the arguments are JSON; else that is not asked of a model whose call failed.
    """

    name: str
    parse: Callable[[Scan, bool], ParsedText]
    mark: str
    parsers: tuple[str, ...] = ()
    arguments_key: str | None = None
    json_arguments: bool = True


#: Name → format.
FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make a format known to ``parse_text``, to the renderers and to whatever has a ``tool_format``.

    Raises:
        ConfigurationError: another format has one of its names.
    """
    for name in (format.name, *format.parsers):
        if _find(name):
            raise ConfigurationError(f"There is already a tool-call format named {name!r}")
    FORMATS[format.name] = format


def format_named(name: str) -> Format:
    """The format of that name, or the one that vLLM's tool parser of that name reads.

    Raises:
        ConfigurationError: there is none.
    """
    format = _find(name)
    if format is None:
        raise ConfigurationError(f"Unknown tool-call format {name!r}: use one of {', '.join(sorted(FORMATS))}")
    return format


def _find(name: str) -> Format | None:
    return FORMATS.get(name) or next((format for format in FORMATS.values() if name in format.parsers), None)


def format_reading(
    text: str,
    fits: Callable[[ParsedText], bool],
    tools: Sequence[Tool] | None = None,
    reasoning_tags: tuple[str, str] = REASONING_TAGS,
) -> Format | None:
    """The format in which a text's calls are read so that it fits; of several, the one that was registered last."""
    for format in reversed(FORMATS.values()):
        if fits(format.parse(Scan(text, format.name, tools, reasoning_tags), False)):
            return format
    return None


def format_marked(text: str) -> Format | None:
    """The format whose mark stands in a text; of several, the one that was registered last."""
    return next((format for format in reversed(FORMATS.values()) if re.search(format.mark, text)), None)


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
        opens, closes = (f"{own}|{re.escape(tag)}" for own, tag in zip(self._think, scan.reasoning_tags, strict=True))
        marks = re.compile(f"{self._tags}|(?P<think>{opens})|(?P<close>{closes})", re.MULTILINE)
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCall] = []
        begun: tuple[re.Match[str], int] | None = None
        while position < len(text):
            if thinking:
                close = self._end_of_reasoning(scan, closes, position)
                reasoning.append(text[position : close.start() if close else len(text)])
                position, thinking = (close.end() if close else len(text)), False
                continue
            mark = scan.search(marks, position)
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

    def _end_of_reasoning(self, scan: Scan, closes: str, position: int) -> re.Match[str] | None:
        """The tag that closes it: the first that is not within a well-formed call.

        A draft that is not well-formed, or seems to hold another call, proves nothing: then it is the first tag.
        """
        marks = re.compile(f"{self._tags}|(?P<close>{closes})", re.MULTILINE)
        while (mark := scan.search(marks, position)) and mark.lastgroup != "close":
            position = mark.end()
            if mark.lastgroup == "opening":
                found, end = self._read(scan, mark)
                if not all(call.ok for call in found) or self._calls.search(scan.text, position, end):
                    return re.compile(closes).search(scan.text, position)
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
