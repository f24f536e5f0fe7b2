"""Seed-OSS; its reasoning stands in ``<seed:think>``.

::

    <seed:tool_call>
    <function=f>
    <parameter=x>1</parameter>
    </function>
    </seed:tool_call>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end, wrong_opening
from hermes_atropos.toolcalls.formats.pairs import tagged_pairs

END = block_end("</seed:tool_call>", "<seed:tool_call>")
OPENING = r"<seed:tool_call>(?:\s*<function=(?P<name>[^<>\n]*)>)?"
PAIRS = tagged_pairs(
    r"<parameter=(?P<key>[^<>\n]*)>", "</parameter>", r"</function>\s*</seed:tool_call>", END, on_lines=True
)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    if opening["name"] is None:
        return wrong_opening(scan, opening, END, "<function=name>")
    return PAIRS.read(scan, opening)


register(
    Format(
        name="seed_oss",
        parse=Blocks(OPENING, read, think=("<seed:think>|<think>", "</seed:think>|</think>")).parse,
        mark="<seed:tool_call>",
        json_arguments=False,
    )
)
