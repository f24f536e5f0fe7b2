"""Solar Open.

::

    <|tool_calls|><|tool_call:begin|>1<|tool_call:name|>f<|tool_call:args|>{"x": 1}<|tool_call:end|>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json, wrong_opening

HEAD = re.compile(r"\s*(?P<id>[^<\s]*)\s*<\|tool_call:name\|>\s*(?P<name>[^<\s]*)\s*<\|tool_call:args\|>")
END = block_end("<|tool_call:end|>", "<|tool_call:begin|>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    head = HEAD.match(scan.text, opening.end())
    if head is None:
        return wrong_opening(scan, opening, END, "an id, <|tool_call:name|>, a name and <|tool_call:args|>")
    return read_json(scan, opening.start(), head.end(), END, head["name"], sampled_id=head["id"] or None)


register(
    Format(
        name="solar",
        parse=Blocks(r"<\|tool_call:begin\|>", read, wrapper=r"<\|tool_calls\|>").parse,
        mark=r"<\|tool_call:begin\|>",
        parsers=("solar_open2",),
    )
)
