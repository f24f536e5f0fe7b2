"""Cohere's Command.

::

    R7B, A: <|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"x": 1}}]<|END_ACTION|>
    R, R+:  Action: ```json
            [{"tool_name": "f", "parameters": {"x": 1}}]
            ```
"""

from __future__ import annotations

import re
from typing import Any

from hermes_atropos.toolcalls.call import ToolCall, object_call
from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

END = block_end("<|END_ACTION|>", "<|START_ACTION|>")
FENCE_END = block_end("```", "Action:")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    end = END if opening.group().startswith("<|") else FENCE_END
    return read_json(scan, opening.start(), opening.end(), end, build=actions)


def actions(value: Any, **fields: Any) -> list[ToolCall]:
    items = value if isinstance(value, list) and value else [value]
    return [action(item, **fields) for item in items]


def action(item: Any, **fields: Any) -> ToolCall:
    if not isinstance(item, dict):
        return object_call(item, **fields)
    own = item.get("tool_call_id")
    call = {"name": item.get("tool_name"), "parameters": item.get("parameters")}
    return object_call(call, sampled_id=own if isinstance(own, str) and own else None, **fields)


register(
    Format(
        name="command_r",
        parse=Blocks(
            r"<\|START_ACTION\|>|(?:^|(?<=</think>))Action:\s*```json",
            read,
            around=r"<\|(?:START|END)_(?:RESPONSE|TEXT)\|>",
            think=(r"<\|START_THINKING\|>|<think>", r"<\|END_THINKING\|>|</think>"),
        ).parse,
        mark=r"<\|START_ACTION\|>|'Action:'",
        parsers=("cohere_command3", "cohere_command4"),
        arguments_key="parameters",
    )
)
