"""``<function=f>{"x": 1}</function>``: Functionary 3.1, and Llama 3.1 with functions of a user's own."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("</function>", "<function=")

register(
    Format(
        name="functionary",
        parse=Blocks(r"<function=(?P<name>[^<>\n]*)>", json_reader(END)).parse,
        mark=r"<function=[^<>\n]*>\{",
    )
)
