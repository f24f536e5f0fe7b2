"""``<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>``: Hermes 2 to 4, Qwen 2.5, Qwen 3, many finetunes."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

END = block_end("</tool_call>", "<tool_call>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END)


register(
    Format(
        name="hermes",
        parse=Blocks("<tool_call>", read).parse,
        mark="<tool_call>",
        arguments_key="arguments",
    )
)
