"""``<TOOLCALL>[{"name": "f", "arguments": {"x": 1}}]</TOOLCALL>``: Nemotron Nano v2, Llama Nemotron."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("</TOOLCALL>", "<TOOLCALL>")

register(
    Format(
        name="nemotron",
        parse=Blocks("<TOOLCALL>", json_reader(END, listed=True)).parse,
        mark="<TOOLCALL>",
        parsers=("nemotron_json",),
        arguments_key="arguments",
    )
)
