"""GLM 4.5 to 4.7.

::

    <tool_call>f
    <arg_key>x</arg_key>
    <arg_value>1</arg_value>
    </tool_call>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import Pairs, read_pairs, typed

PAIRS = Pairs(
    parameter=re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>"),
    closing="</arg_value>",
    behind=re.compile(r"</arg_value>\s*+(?=<arg_key>|</tool_call>)"),
    last=re.compile(r"\s*</tool_call>"),
    end=block_end("</tool_call>", "<tool_call>"),
    convert=lambda _, text, types: typed(text, types),
)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    name, behind = opening["name"].strip(), opening.end("name")
    return read_pairs(scan, opening.start(), behind, name, PAIRS, opening.end())


register(
    Format(
        name="glm",
        parse=Blocks(r"<tool_call>(?=\s*(?P<name>[^<>\n{]*))", read).parse,
        mark="<arg_key>",
        parsers=("glm45", "glm47"),
        json_arguments=False,
    )
)
