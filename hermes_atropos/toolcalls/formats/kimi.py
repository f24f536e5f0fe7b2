"""Kimi K2.

::

    <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>
    <|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json, wrong_opening

HEAD = re.compile(r"\s*+(?P<id>(?:functions\.)?(?P<name>[^<\s]*?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>")
END = block_end("<|tool_call_end|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    head = HEAD.match(scan.text, opening.end())
    if head is None:
        return wrong_opening(scan, opening, END, "functions.name:0 and <|tool_call_argument_begin|>")
    return read_json(scan, opening.start(), head.end(), END, head["name"], sampled_id=head["id"])


register(
    Format(
        name="kimi",
        parse=Blocks(r"<\|tool_call_begin\|>", read, wrapper=r"<\|tool_calls_section_(?:begin|end)\|>").parse,
        mark=r"<\|tool_call_argument_begin\|>",
        parsers=("kimi_k2",),
    )
)
