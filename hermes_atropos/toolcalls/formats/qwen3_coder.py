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
from hermes_atropos.toolcalls.formats.pairs import tagged_pairs

END = block_end("</tool_call>", "<tool_call>")
END_WITHOUT_OPENING = block_end("</function>", "<tool_call>")
OPENING = r"<tool_call>(?:\s*<function=(?P<name>[^<>\n]*)>)?|^<function=(?=[^<>\n]*>)"
PAIRS = tagged_pairs(
    r"<parameter=(?P<key>[^<>\n]*)>", "</parameter>", r"</function>\s*</tool_call>", END, on_lines=True
)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    if opening["name"] is not None:
        return PAIRS.read(scan, opening)
    if opening.group() != "<tool_call>":
        return wrong_opening(scan, opening, END_WITHOUT_OPENING, "<tool_call>")
    return wrong_opening(scan, opening, END, "<function=name>")


register(
    Format(
        name="qwen3_coder",
        parse=Blocks(OPENING, read).parse,
        mark="<function=",
        parsers=("qwen3_xml",),
        json_arguments=False,
    )
)
