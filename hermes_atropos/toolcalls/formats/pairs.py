"""Blocks that hold the arguments as tagged pairs: qwen3_coder, glm, and DeepSeek from V3.2 on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hermes_atropos.toolcalls.call import ParseStatus, failed_call, named_call
from hermes_atropos.toolcalls.formats.blocks import Read, Scan
from hermes_atropos.toolcalls.formats.json_block import BlockEnd
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads

__all__ = ["Pairs", "read_pairs", "typed"]


class Pairs(NamedTuple):
    """How names and values are written.

    Attributes:
        parameter: up to the beginning of a value; group ``key``.
        closing: the tag that closes a value.
        behind: that tag and what follows it, when it is really the end and not part of the value, which is not escaped.
        last: what ends the call after the last value.
        end: the end of the block.
        convert: the value from the match of ``parameter``, the text and the parameter's schema; raises ``BrokenJSON``.
    """

    parameter: re.Pattern[str]
    closing: str
    behind: re.Pattern[str]
    last: re.Pattern[str]
    end: BlockEnd
    convert: Callable[[re.Match[str], str, Any], Any]


def read_pairs(scan: Scan, start: int, position: int, name: str, pairs: Pairs) -> Read:
    """A block from ``start`` whose parameters begin at ``position``."""
    text, arguments, status = scan.text, {}, ParseStatus.MALFORMED
    properties = _properties(scan, name)
    fault = None
    while fault is None and (parameter := pairs.parameter.match(text, position)):
        key, position = parameter["key"], parameter.end()
        closing = scan.search(pairs.behind, position)
        if closing is None:
            fault = f"The value of {key[:80]!r} is not closed by {pairs.closing}."
            break
        value, position = text[position : closing.start()], closing.end()
        try:
            arguments[key] = pairs.convert(parameter, value, properties.get(key))
        except BrokenJSON as error:
            status, fault = ParseStatus.INVALID_JSON, f"The value of {key[:80]!r} is not valid JSON: {error}."
    last = pairs.last.match(text, position)
    if fault is None and last:
        return [named_call(name, arguments, **scan.fields(start, last.end()))], last.end()
    tag = scan.search(pairs.end.pattern, position)
    if tag is None or tag["close"] is None:
        stop = tag.start() if tag else len(text)
        status, sentence = ParseStatus.UNCLOSED_BLOCK, f"The call is not closed: {pairs.end.tag} is missing."
    else:
        stop = tag.end()
        sentence = fault or f"The call cannot be read after {text[max(start, position - 20) : position]!r}."
    return [failed_call(status, sentence, name=name.strip(), **scan.fields(start, stop))], stop


def _properties(scan: Scan, name: str) -> Mapping[str, Any]:
    parameters = scan.functions.get(name, {}).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: the text itself, or the JSON that it holds if that is not a string."""
    if _only_strings(schema):
        return text
    try:
        value = loads(text)
    except BrokenJSON:
        return text
    return text if isinstance(value, str) else value


def _only_strings(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    if "type" in schema:
        return schema["type"] in ("string", ["string"])
    if isinstance(schema.get("enum"), list):
        return all(isinstance(value, str) for value in schema["enum"])
    options = schema.get("anyOf") or schema.get("oneOf")
    return isinstance(options, list) and all(_only_strings(option) for option in options)
