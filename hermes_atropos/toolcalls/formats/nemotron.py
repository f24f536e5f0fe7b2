"""``<TOOLCALL>[{"name": "f", "arguments": {"x": 1}}]</TOOLCALL>``: Nemotron Nano v2, Llama Nemotron."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, listed_calls, read_json

END = block_end("</TOOLCALL>", "<TOOLCALL>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END, build=listed_calls)


register(
    Format(
        name="nemotron",
        parse=Blocks("<TOOLCALL>", read).parse,
        mark="<TOOLCALL>",
        parsers=("nemotron_json",),
        arguments_key="arguments",
    )
)
