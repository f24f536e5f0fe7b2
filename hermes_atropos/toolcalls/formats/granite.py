"""Granite 3 and Phi-4-mini.

::

    Granite: <|tool_call|>[{"name": "f", "arguments": {"x": 1}}]
    Phi:     <|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("<|/tool_call|>", "<|tool_call|>", optional=True)

register(
    Format(
        name="granite",
        parse=Blocks(r"<\|tool_call\|>", json_reader(END, listed=True)).parse,
        mark=r"<\|tool_call\|>",
        parsers=("phi4_mini_json",),
        arguments_key="arguments",
    )
)
