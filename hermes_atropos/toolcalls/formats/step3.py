"""Step 3.

::

    <｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f">
    <steptml:parameter name="x">1</steptml:parameter></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import tagged_pairs

END = block_end("</steptml:invoke>", "<steptml:invoke ", "<｜tool_call_end｜>")
PAIRS = tagged_pairs(r'<steptml:parameter name="(?P<key>[^"<>\n]*)">', "</steptml:parameter>", "</steptml:invoke>", END)

register(
    Format(
        name="step3",
        parse=Blocks(
            r'<steptml:invoke name="(?P<name>[^"<>\n]*)">',
            PAIRS.read,
            wrapper=r"<｜tool_calls_(?:begin|end)｜>|<｜tool_call_begin｜>(?:function<｜tool_sep｜>)?|<｜tool_call_end｜>",
        ).parse,
        mark="<steptml:invoke",
        json_arguments=False,
    )
)
