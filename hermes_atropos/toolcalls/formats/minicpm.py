"""``<function name="f"><param name="x">1</param></function>``: MiniCPM 5."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import read_pairs, tagged_pairs

END = block_end("</function>", "<function ")
PAIRS = tagged_pairs(r'<param name="(?P<key>[^"<>\n]*)">', "</param>", "</function>", END)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_pairs(scan, opening.start(), opening.end(), opening["name"], PAIRS)


register(
    Format(
        name="minicpm",
        parse=Blocks(r'<function name="(?P<name>[^"<>\n]*)">', read).parse,
        mark="<function name=",
        parsers=("minicpm5",),
        json_arguments=False,
    )
)
