"""``<|tools_prefix|>[{"f": {"x": 1}}]<|tools_suffix|>``: Apertus; its reasoning stands in ``<|inner_prefix|>``."""

from __future__ import annotations

import re
from typing import Any

from hermes_atropos.toolcalls.call import ToolCall, named_call, object_call
from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, read_json

#: The tag at the end is where the model stops.
END = BlockEnd("<|tools_suffix|>", re.compile(r"(?P<close><\|tools_suffix\|>)|<\|tools_prefix\|>"), optional=True)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END, build=calls_by_name)


def calls_by_name(value: Any, **fields: Any) -> list[ToolCall]:
    """Objects whose one key is the name and whose value is the arguments."""
    items = value if isinstance(value, list) and value else [value]
    return [
        named_call(*next(iter(item.items())), **fields)
        if isinstance(item, dict) and len(item) == 1
        else object_call(item, **fields)
        for item in items
    ]


register(
    Format(
        name="apertus",
        parse=Blocks(
            r"<\|tools_prefix\|>", read, think=(r"<\|inner_prefix\|>|<think>", r"<\|inner_suffix\|>|</think>")
        ).parse,
        mark=r"<\|tools_prefix\|>",
    )
)
