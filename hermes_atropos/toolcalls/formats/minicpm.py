"""``<function name="f"><param name="x">1</param></function>``: MiniCPM 5."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import tagged_pairs

END = block_end("</function>", "<function ")
PAIRS = tagged_pairs(r'<param name="(?P<key>[^"<>\n]*)">', "</param>", "</function>", END)

register(
    Format(
        name="minicpm",
        parse=Blocks(r'<function name="(?P<name>[^"<>\n]*)">', PAIRS.read).parse,
        mark="<function name=",
        parsers=("minicpm5",),
        json_arguments=False,
    )
)
