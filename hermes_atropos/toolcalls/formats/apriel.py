"""``<tool_calls>[{"name": "f", "arguments": {"x": 1}}]</tool_calls>``: Apriel, Jamba, Hunyuan A13B."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, listed_calls, read_json

END = block_end("</tool_calls>", "<tool_calls>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END, build=listed_calls)


register(
    Format(
        name="apriel",
        parse=Blocks("<tool_calls>", read, around=r"\[END FINAL RESPONSE\]").parse,
        mark="<tool_calls>",
        parsers=("jamba", "hunyuan_a13b"),
        arguments_key="arguments",
    )
)
