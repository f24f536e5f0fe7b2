"""Mistral.

::

    up to tokenizer v7: [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]
    from v11 on:        [TOOL_CALLS]f[ARGS]{"x": 1}       one for each call; v11 with [CALL_ID]123456789 before [ARGS]
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.call import call_with_id, named_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import broken_json
from hermes_atropos.toolcalls.strict_json import BrokenJSON, value_at

OPENING = r"\[TOOL_CALLS\]"
NEXT = re.compile(OPENING)
HEAD = r"\s*(?P<name>[^\s\[\]{}]*)\s*(?:\[CALL_ID\](?P<id>[^\s\[\]{}]*))?\s*(?:\[ARGS\])?"


def read(scan: Scan, opening: re.Match[str]) -> Read:
    start, body, name = opening.start(), opening.end("head"), opening["name"]
    try:
        value, behind = value_at(scan.text, body)
    except BrokenJSON as error:
        return broken_json(scan, start, body, scan.search(NEXT, error.position), name=name)
    fields = scan.fields(start, behind)
    if name:
        return [named_call(name, value, sampled_id=opening["id"], **fields)], behind
    items = value if isinstance(value, list) and value else [value]
    return [call_with_id(item, **fields) for item in items], behind


register(
    Format(
        name="mistral",
        parse=Blocks(
            rf"{OPENING}(?=(?P<head>{HEAD}))", read, think=(r"\[THINK\]|<think>", r"\[/THINK\]|</think>")
        ).parse,
        mark=OPENING,
    )
)
