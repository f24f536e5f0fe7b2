"""Kimi K2.

::

    <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>
    <|tool_calls_section_end|>
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

HEAD = r"\s*+(?P<id>(?:functions\.)?(?P<name>[^<\s]*?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"
END = block_end("<|tool_call_end|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>")

register(
    Format(
        name="kimi",
        parse=Blocks(
            rf"<\|tool_call_begin\|>(?:{HEAD})?",
            json_reader(END, expected="functions.name:0 and <|tool_call_argument_begin|>"),
            wrapper=r"<\|tool_calls_section_(?:begin|end)\|>",
        ).parse,
        mark=r"<\|tool_call_argument_begin\|>",
        parsers=("kimi_k2",),
    )
)
