"""GigaChat 3: a call at the end of an answer, behind a tag (3.1) or as a message of its own (3).

::

    3:   function call<|role_sep|>
         {"name": "f", "arguments": {"x": 1}}
    3.1: <|function_call|>{"name": "f", "arguments": {"x": 1}}
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, read_json

OPENING = r"function call<\|role_sep\|>|<\|function_call\|>"
END = BlockEnd("<|message_sep|>", re.compile(rf"(?P<close><\|message_sep\|>)|{OPENING}"), optional=True)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END)


register(
    Format(
        name="gigachat",
        parse=Blocks(OPENING, read, around=r"<\|message_sep\|>").parse,
        mark=OPENING,
        parsers=("gigachat3",),
        arguments_key="arguments",
    )
)
