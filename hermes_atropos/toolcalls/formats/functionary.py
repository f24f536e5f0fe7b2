"""``<function=f>{"x": 1}</function>``: Functionary 3.1, and Llama 3.1 with functions of a user's own."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

END = block_end("</function>", "<function=")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END, opening["name"])


register(
    Format(
        name="functionary",
        parse=Blocks(r"<function=(?P<name>[^<>\n]*)>", read).parse,
        mark=r"<function=[^<>\n]*>\{",
    )
)
