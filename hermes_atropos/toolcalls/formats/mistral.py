"""Mistral.

::

    up to tokenizer v7: [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]
    from v11 on:        [TOOL_CALLS]f[ARGS]{"x": 1}       one for each call; v11 with [CALL_ID]123456789 before [ARGS]
"""

from __future__ import annotations

import re
from typing import Any

from hermes_atropos.toolcalls.call import named_call, object_call
from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import broken_json
from hermes_atropos.toolcalls.strict_json import BrokenJSON, value_at

OPENING = r"\[TOOL_CALLS\]"
NEXT = re.compile(OPENING)
HEAD = re.compile(r"\s*(?P<name>[^\s\[\]{}]*)\s*(?:\[CALL_ID\](?P<id>[^\s\[\]{}]*))?\s*(?:\[ARGS\])?")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    start, head = opening.start(), HEAD.match(scan.text, opening.end())
    name, body = (head["name"], head.end()) if head else ("", opening.end())
    try:
        value, behind = value_at(scan.text, body)
    except BrokenJSON as error:
        return broken_json(scan, start, body, scan.search(NEXT, error.position), name=name)
    fields = scan.fields(start, behind)
    if name and head:
        return [named_call(name, value, sampled_id=head["id"], **fields)], behind
    items = value if isinstance(value, list) and value else [value]
    return [object_call(item, sampled_id=_own_id(item), **fields) for item in items], behind


def _own_id(item: Any) -> str | None:
    own = item.get("id") if isinstance(item, dict) else None
    return own if isinstance(own, str) and own else None


register(
    Format(
        name="mistral",
        parse=Blocks(OPENING, read, think=(r"\[THINK\]|<think>", r"\[/THINK\]|</think>")).parse,
        mark=OPENING,
    )
)
