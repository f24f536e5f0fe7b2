"""``<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>``: Hermes 2 to 4, Qwen 2.5, Qwen 3, many finetunes."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("</tool_call>", "<tool_call>")

register(
    Format(
        name="hermes",
        parse=Blocks("<tool_call>", json_reader(END)).parse,
        mark="<tool_call>",
        arguments_key="arguments",
    )
)
