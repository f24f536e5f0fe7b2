"""Gemma 4 and FunctionGemma.

::

    Gemma 4:       <|tool_call>call:f{x:1,s:<|"|>text<|"|>}<tool_call|>
    FunctionGemma: <start_function_call>call:f{x:1,s:<escape>text<escape>}<end_function_call>

Objects and lists are nested as in JSON, keys without quotes. Reasoning stands in ``<|channel>thought``.
"""

from __future__ import annotations

import re
from typing import Any

from hermes_atropos.toolcalls.call import ParseStatus, failed_call, named_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end, wrong_opening
from hermes_atropos.toolcalls.strict_json import MAX_DEPTH, TOO_DEEP, BrokenJSON, loads

ENDS = {
    "<|tool_call>": block_end("<tool_call|>", "<|tool_call>"),
    "<start_function_call>": block_end("<end_function_call>", "<start_function_call>"),
}
HEAD = re.compile(r"\s*call:(?P<name>[^{}\s<]*)\s*(?=\{)")
QUOTED = re.compile(r'<\|"\|>(?P<new>.*?)<\|"\|>|<escape>(?P<old>.*?)<escape>', re.DOTALL)
KEY = re.compile(rf"\s*+(?:{QUOTED.pattern}|(?P<bare>[^\s:{{}}\[\],<\"][^:{{}}\[\],<\"]*))\s*:", re.DOTALL)
BARE = re.compile(r"[^,{}\[\]<>]+")
NEXT = re.compile(r"\s*([,}\]])")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    end = ENDS[opening.group()]
    head = HEAD.match(scan.text, opening.end())
    if head is None:
        return wrong_opening(scan, opening, end, "call:name{")
    try:
        value, behind = value_at(scan.text, head.end())
    except BrokenJSON as error:
        closed, stop = end.find(scan, error.position)
        status = ParseStatus.INVALID_JSON if closed else ParseStatus.UNCLOSED_BLOCK
        sentence = f"The arguments of {head['name'][:80]!r} cannot be read: {error}."
        return [failed_call(status, sentence, name=head["name"], **scan.fields(opening.start(), stop))], stop
    tag = scan.search(end.pattern, behind)
    if tag is None or tag["close"] is None or scan.text[behind : tag.start()].strip():
        stop = behind if tag is None else tag.start() if tag["close"] is None else tag.end()
        sentence = f"The call is not closed: {end.tag} is missing behind its arguments."
        fields = scan.fields(opening.start(), stop)
        return [failed_call(ParseStatus.UNCLOSED_BLOCK, sentence, name=head["name"], **fields)], stop
    return [named_call(head["name"], value, **scan.fields(opening.start(), tag.end()))], tag.end()


def value_at(text: str, position: int, depth: int = 0) -> tuple[Any, int]:
    """The value that begins at ``position``, and the place behind it.

    Raises:
        BrokenJSON: there is none.
    """
    if depth > MAX_DEPTH:
        raise BrokenJSON(TOO_DEEP, position=position)
    while position < len(text) and text[position].isspace():
        position += 1
    if quoted := QUOTED.match(text, position):
        return unquoted(quoted), quoted.end()
    if text[position : position + 1] in ("{", "["):
        return items_at(text, position, depth)
    bare = BARE.match(text, position)
    if bare is None:
        raise BrokenJSON(f"expected a value, found {text[position : position + 20]!r}", position=position)
    try:
        # Its template writes None as Python does.
        return None if bare.group().strip() == "None" else loads(bare.group()), bare.end()
    except BrokenJSON:
        message = f"expected JSON or a string in its quotes, found {bare.group()[:20]!r}"
        raise BrokenJSON(message, position=bare.end()) from None


def unquoted(quoted: re.Match[str]) -> str:
    return quoted["new"] if quoted["new"] is not None else quoted["old"]


def items_at(text: str, position: int, depth: int) -> tuple[Any, int]:
    """The object or the list that begins at ``position``, and the place behind it."""
    named, closing = text[position] == "{", {"{": "}", "[": "]"}[text[position]]
    pairs: list[tuple[str, Any]] = []
    position += 1
    if (end := NEXT.match(text, position)) and end[1] == closing:
        return ({} if named else []), end.end()
    while True:
        name = ""
        if named:
            key = KEY.match(text, position)
            if key is None:
                raise BrokenJSON(f"expected a name, found {text[position : position + 20]!r}", position=position)
            name = key["bare"].strip() if key["bare"] else unquoted(key)
            position = key.end()
        value, position = value_at(text, position, depth + 1)
        pairs.append((name, value))
        after = NEXT.match(text, position)
        if after is None or after[1] not in (",", closing):
            found = text[position : position + 20]
            raise BrokenJSON(f"expected ',' or {closing!r}, found {found!r}", position=position)
        position = after.end()
        if after[1] == closing:
            return (dict(pairs) if named else [value for _, value in pairs]), position


register(
    Format(
        name="gemma",
        parse=Blocks(
            r"<\|tool_call>|<start_function_call>",
            read,
            around=r"<\|tool_response>",
            think=(r"<\|channel>thought\b|<think>", r"<channel\|>|</think>"),
        ).parse,
        mark=r"<\|tool_call>|<start_function_call>",
        parsers=("gemma4", "functiongemma"),
        json_arguments=False,
    )
)
