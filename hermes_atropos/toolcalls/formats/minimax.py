"""MiniMax-M2.

::

    <minimax:tool_call>
    <invoke name="f">
    <parameter name="x">1</parameter>
    </invoke>
    </minimax:tool_call>
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import tagged_pairs

END = block_end("</invoke>", "<invoke ", "</minimax:tool_call>")
PAIRS = tagged_pairs(r'<parameter name="(?P<key>[^"<>\n]*)">', "</parameter>", "</invoke>", END)

register(
    Format(
        name="minimax",
        parse=Blocks(r'<invoke name="(?P<name>[^"<>\n]*)">', PAIRS.read, wrapper="</?minimax:tool_call>").parse,
        mark="<minimax:tool_call>",
        parsers=("minimax_m2",),
        json_arguments=False,
    )
)
