"""What a tool-call format is, and the table of those that are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText
from hermes_atropos.toolcalls.formats.blocks import REASONING_TAGS, Scan

__all__ = ["FORMATS", "Format", "format_marked", "format_named", "format_reading", "register"]


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
