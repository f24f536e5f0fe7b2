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

from hermes_atropos.toolcalls.call import ToolCall, call_with_id
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

END = block_end("<|END_ACTION|>", "<|START_ACTION|>")
FENCE_END = block_end("```", "Action:")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    end = END if opening.group().startswith("<|") else FENCE_END
    return read_json(scan, opening.start(), opening.end(), end, listed=True, call=action)


def action(item: Any, **fields: Any) -> ToolCall:
    if isinstance(item, dict):
        item = {"name": item.get("tool_name"), "parameters": item.get("parameters"), "id": item.get("tool_call_id")}
    return call_with_id(item, **fields)


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
