"""Granite 3 and Phi-4-mini.

::

    Granite: <|tool_call|>[{"name": "f", "arguments": {"x": 1}}]
    Phi:     <|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, listed_calls, read_json

END = BlockEnd("<|/tool_call|>", re.compile(r"(?P<close><\|/tool_call\|>)|<\|tool_call\|>"), optional=True)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END, build=listed_calls)


register(
    Format(
        name="granite",
        parse=Blocks(r"<\|tool_call\|>", read).parse,
        mark=r"<\|tool_call\|>",
        parsers=("phi4_mini_json",),
        arguments_key="arguments",
    )
)
