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
from hermes_atropos.toolcalls.formats.pairs import read_pairs, tagged_pairs

END = block_end("</seed:tool_call>", "<seed:tool_call>")
FUNCTION = re.compile(r"\s*<function=(?P<name>[^<>\n]*)>")
PAIRS = tagged_pairs(r"<parameter=(?P<key>[^<>\n]*)>", "</parameter>", r"</function>\s*</seed:tool_call>", END)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    function = FUNCTION.match(scan.text, opening.end())
    if function is None:
        return wrong_opening(scan, opening, END, "<function=name>")
    return read_pairs(scan, opening.start(), function.end(), function["name"], PAIRS, opening.end())


register(
    Format(
        name="seed_oss",
        parse=Blocks("<seed:tool_call>", read, think=("<seed:think>|<think>", "</seed:think>|</think>")).parse,
        mark="<seed:tool_call>",
        json_arguments=False,
    )
)
