"""GigaChat 3: a call at the end of an answer, behind a tag (3.1) or as a message of its own (3).

::

    3:   function call<|role_sep|>
         {"name": "f", "arguments": {"x": 1}}
    3.1: <|function_call|>{"name": "f", "arguments": {"x": 1}}
"""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

OPENING = r"function call<\|role_sep\|>|<\|function_call\|>"
END = block_end("<|message_sep|>", "function call<|role_sep|>", "<|function_call|>", optional=True)

register(
    Format(
        name="gigachat",
        parse=Blocks(OPENING, json_reader(END), around=r"<\|message_sep\|>").parse,
        mark=OPENING,
        parsers=("gigachat3",),
        arguments_key="arguments",
    )
)
