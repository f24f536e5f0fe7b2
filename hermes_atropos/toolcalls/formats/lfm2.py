"""Calls as Python between tags: LFM2, MiniCPM 3 and 4, OLMo 3.

::

    LFM2:    <|tool_call_start|>[f(x=1), g()]<|tool_call_end|>
    MiniCPM: <|tool_call_start|>
             ```python
             f(x=1)
             g()
             ```
             <|tool_call_end|>
    OLMo:    <function_calls>
             f(x=1)
             g()
             </function_calls>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pythonic import read_tagged

ENDS = {
    "<|tool_call_start|>": block_end("<|tool_call_end|>", "<|tool_call_start|>"),
    "<function_calls>": block_end("</function_calls>", "<function_calls>"),
}


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_tagged(scan, opening, ENDS[opening.group()])


register(
    Format(
        name="lfm2",
        parse=Blocks(
            r"<\|tool_call_start\|>|<function_calls>",
            read,
            think=(r"<\|thought_start\|>|<think>", r"<\|thought_end\|>|</think>"),
        ).parse,
        mark=r"<\|tool_call_start\|>|<\|tool_list_start\|>|<function_calls>",
        parsers=("olmo3",),
        json_arguments=False,
    )
)
