"""Blocks that hold the arguments as tagged pairs: qwen3_coder, glm, and DeepSeek from V3.2 on."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from hermes_atropos.toolcalls.call import ParseStatus, failed_call, named_call
from hermes_atropos.toolcalls.formats.format import Read, Scan, is_mentioned
from hermes_atropos.toolcalls.formats.json_block import BlockEnd
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads

__all__ = ["Pairs", "read_pairs", "resolved", "tagged_pairs", "typed", "types_of"]

SPACE = re.compile(r"\s*+")


class Pairs(NamedTuple):
    """How names and values are written.

    Attributes:
        parameter: up to the beginning of a value, white space before it aside; group ``key``.
        closing: the tag that closes a value.
        behind: that tag and what follows it, when it is really the end and not part of the value, which is not escaped.
        last: what ends the call after the last value.
        end: the end of the block.
        convert: the value from the match of ``parameter``, the text and the types that the schema allows (as ``typed``
            takes them); raises ``BrokenJSON``.
    """

    parameter: re.Pattern[str]
    closing: str
    behind: re.Pattern[str]
    last: re.Pattern[str]
    end: BlockEnd
    convert: Callable[[re.Match[str], str, Set[str]], Any]

    def read(self, scan: Scan, opening: re.Match[str]) -> Read:
        """A block whose opening names the tool, in a group ``name``."""
        return read_pairs(scan, opening.start(), opening.end(), opening["name"], self)


def tagged_pairs(parameter: str, closing: str, last: str, end: BlockEnd, *, on_lines: bool = False) -> Pairs:
    """Pairs that ``parameter``, a regular expression, opens and ``closing`` closes, in a call that ``last`` ends.

    The type of a value is the schema's.

    Args:
        on_lines: values stand on lines of their own, so that a new line at either end is not part of them.
    """

    def convert(_: re.Match[str], text: str, types: Set[str]) -> Any:
        return typed(text.removeprefix("\n").removesuffix("\n") if on_lines else text, types)

    return Pairs(
        parameter=re.compile(parameter),
        closing=closing,
        behind=re.compile(rf"{re.escape(closing)}\s*+(?={parameter.replace('?P<key>', '')}|{last})"),
        last=re.compile(rf"\s*{last}"),
        end=end,
        convert=convert,
    )


def read_pairs(scan: Scan, start: int, position: int, name: str, pairs: Pairs, tag_end: int | None = None) -> Read:
    """A block from ``start`` whose parameters begin at ``position``; its tag ends at ``tag_end``, there by default."""
    text, arguments, status = scan.text, {}, ParseStatus.MALFORMED
    parameters = scan.functions.get(name, {}).get("parameters")
    properties = _properties(parameters)
    opened = position if tag_end is None else tag_end
    fault = None
    while fault is None and (parameter := pairs.parameter.match(text, _after_space(text, position))):
        key, position = parameter["key"], parameter.end()
        closing = scan.search(pairs.behind, position)
        if closing is None:
            fault = f"The value of {key[:80]!r} is not closed by {pairs.closing}."
            break
        value, position = text[position : closing.start()], closing.end()
        if (inner := _unclosed(value, pairs, properties)) is not None:
            fault = f"The value of {key[:80]!r} is not closed by {pairs.closing} where that of {inner[:80]!r} begins."
            break
        try:
            arguments[key] = pairs.convert(parameter, value, types_of(properties.get(key), parameters))
        except BrokenJSON as error:
            status, fault = ParseStatus.INVALID_JSON, f"The value of {key[:80]!r} is not valid JSON: {error}."
    last = None if fault else pairs.last.match(text, position)
    closed, stop = (True, last.end()) if last else pairs.end.find(scan, position)
    if not arguments and is_mentioned(scan, start, opened, closed=closed):
        return [], opened
    if last:
        return [named_call(name, arguments, **scan.fields(start, stop))], stop
    if closed:
        sentence = fault or f"The call cannot be read after {text[max(start, position - 20) : position]!r}."
    else:
        status, sentence = ParseStatus.UNCLOSED_BLOCK, f"The call is not closed: {pairs.end.tag} is missing."
    return [failed_call(status, sentence, name=name.strip(), **scan.fields(start, stop))], stop


def _after_space(text: str, position: int) -> int:
    space = SPACE.match(text, position)
    return space.end() if space else position


def _unclosed(value: str, pairs: Pairs, properties: Mapping[str, Any]) -> str | None:
    """The parameter that begins within another's value and is closed by that one's tag; None if there is none."""
    begun = [inner for inner in pairs.parameter.finditer(value) if not properties or inner["key"] in properties]
    return begun[-1]["key"] if begun and pairs.closing not in value[begun[-1].end() :] else None


def _properties(parameters: Any) -> Mapping[str, Any]:
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def typed(text: str, types: Set[str]) -> Any:
    """A value that was written without quotes: the JSON that it holds, unless it has to be a string.

    Where a string is one of several types, what reads as another of them is of that one. A string in quotes stays as it
    was written.

    Args:
        types: those of JSON that the value may have; none, where it is not known.
    """
    if types == {"string"}:
        return text
    try:
        value = loads(text)
    except BrokenJSON:
        return _python(text) if types & {"object", "array"} else text
    other = "string" in types and not types & _types_of_value(value)
    return text if other or isinstance(value, str) else value


def _python(text: str) -> Any:
    """An object or a list as Python writes it, which some templates do (Seed-OSS); the text if it is neither."""
    try:
        value = ast.literal_eval(text.strip())
        return loads(json.dumps(value)) if isinstance(value, dict | list) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _types_of_value(value: Any) -> set[str]:
    names = {str: "string", type(None): "null", bool: "boolean", dict: "object", list: "array"}
    return {names[type(value)]} if type(value) in names else {"number", "integer"} if type(value) is int else {"number"}


def resolved(schema: Any, root: Any) -> Any:
    """What a schema within ``root`` says, or what it refers to."""
    for _ in range(8):  # a reference may lead to another
        if not (isinstance(schema, Mapping) and str(schema.get("$ref", "")).startswith("#/")):
            break
        target = root
        for key in schema["$ref"][2:].split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        schema = target
    return schema


def types_of(schema: Any, root: Any) -> set[str]:
    """The types of JSON that a schema within ``root`` allows, by its values or options too; empty if unknown."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return set()
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {name for name in named if isinstance(name, str)}
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return set().union(*map(_types_of_value, values))
    options = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    return set().union(*(types_of(option, root) for option in options)) if isinstance(options, list) else set()
