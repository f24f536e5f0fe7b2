"""Qwen3-Coder and Qwen3.5.

::

    <tool_call>
    <function=f>
    <parameter=x>
    1
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end, wrong_opening
from hermes_atropos.toolcalls.formats.pairs import read_pairs, tagged_pairs

END = block_end("</tool_call>", "<tool_call>")
END_WITHOUT_OPENING = block_end("</function>", "<tool_call>")
FUNCTION = re.compile(r"\s*<function=(?P<name>[^<>\n]*)>")
PAIRS = tagged_pairs(r"<parameter=(?P<key>[^<>\n]*)>", "</parameter>", r"</function>\s*</tool_call>", END)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    if opening.group() != "<tool_call>":
        return wrong_opening(scan, opening, END_WITHOUT_OPENING, "<tool_call>")
    function = FUNCTION.match(scan.text, opening.end())
    if function is None:
        return wrong_opening(scan, opening, END, "<function=name>")
    return read_pairs(scan, opening.start(), function.end(), function["name"], PAIRS)


register(
    Format(
        name="qwen3_coder",
        parse=Blocks(r"<tool_call>|^<function=(?=[^<>\n]*>)", read).parse,
        mark="<function=",
        parsers=("qwen3_xml",),
        json_arguments=False,
    )
)
