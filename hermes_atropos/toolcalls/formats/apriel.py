"""``<tool_calls>[{"name": "f", "arguments": {"x": 1}}]</tool_calls>``: Apriel, Jamba, Hunyuan A13B."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("</tool_calls>", "<tool_calls>")

register(
    Format(
        name="apriel",
        parse=Blocks("<tool_calls>", json_reader(END, listed=True), around=r"\[END FINAL RESPONSE\]").parse,
        mark="<tool_calls>",
        parsers=("jamba", "hunyuan_a13b"),
        arguments_key="arguments",
    )
)
