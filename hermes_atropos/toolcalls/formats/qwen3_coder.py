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

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, wrong_opening
from hermes_atropos.toolcalls.formats.pairs import Pairs, read_pairs, typed

END = block_end("</tool_call>", "<tool_call>")
END_WITHOUT_OPENING = block_end("</function>", "<tool_call>")
FUNCTION = re.compile(r"\s*<function=(?P<name>[^<>\n]*)>")
PAIRS = Pairs(
    parameter=re.compile(r"\s*<parameter=(?P<key>[^<>\n]*)>"),
    closing="</parameter>",
    behind=re.compile(r"</parameter>\s*+(?=<parameter=|</function>)"),
    last=re.compile(r"\s*</function>\s*</tool_call>"),
    end=END,
    convert=lambda _, text, schema: typed(text.removeprefix("\n").removesuffix("\n"), schema),
)


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
