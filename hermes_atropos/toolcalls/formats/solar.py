"""Solar Open.

::

    <|tool_calls|><|tool_call:begin|>1<|tool_call:name|>f<|tool_call:args|>{"x": 1}<|tool_call:end|>
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

HEAD = r"\s*(?P<id>[^<\s]+)?\s*<\|tool_call:name\|>\s*(?P<name>[^<\s]*)\s*<\|tool_call:args\|>"
END = block_end("<|tool_call:end|>", "<|tool_call:begin|>")

register(
    Format(
        name="solar",
        parse=Blocks(
            rf"<\|tool_call:begin\|>(?:{HEAD})?",
            json_reader(END, expected="an id, <|tool_call:name|>, a name and <|tool_call:args|>"),
            wrapper=r"<\|tool_calls\|>",
        ).parse,
        mark=r"<\|tool_call:begin\|>",
        parsers=("solar_open2",),
    )
)
