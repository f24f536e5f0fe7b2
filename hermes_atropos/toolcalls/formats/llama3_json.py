"""``{"name": "f", "parameters": {"x": 1}}``: Llama 3.1 to 3.3.

Several are separated by ";" or new lines, sometimes after <|python_tag|>. Without the tag, an object is a call only
where a line begins with it, and it with a name and parameters: an answer may well contain JSON.
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.call import ToolCall, object_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import broken_json
from hermes_atropos.toolcalls.strict_json import BrokenJSON, value_at

CALL = r'\{\s*+(?:"type"\s*+:\s*+"function"\s*+,\s*+)?"name"\s*+:\s*+"[^"\n]*"\s*+,\s*+"(?:parameters|arguments)"\s*+:'
#: A call that ends before its arguments begin.
CUT = r'\{\s*+(?:"type"\s*+:\s*+"function"\s*+,\s*+)?"name"\s*+:\s*+"[^"\n]*+(?:"\s*+(?:,\s*+(?:"[a-z]*+"?\s*+)?)?)?\Z'
OPENING = rf"<\|python_tag\|>|(?:^|(?<=</think>))[ \t]*(?={CALL}|{CUT})"
NEXT = re.compile(OPENING, re.MULTILINE)
MORE = re.compile(rf"\s*+;?\s*+(?={CALL})")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    start, position = opening.span()
    calls: list[ToolCall] = []
    while True:
        try:
            value, behind = value_at(scan.text, position)
        except BrokenJSON as error:
            found, behind = broken_json(scan, start, position, scan.search(NEXT, max(error.position, position + 1)))
            return [*calls, *found], behind
        calls.append(object_call(value, **scan.fields(start, behind)))
        more = MORE.match(scan.text, behind)
        if more is None:
            return calls, behind
        start = position = more.end()


register(
    Format(
        name="llama3_json",
        parse=Blocks(OPENING, read).parse,
        mark=r"<\|python_tag\|>",
        parsers=("llama4_json",),
        arguments_key="parameters",
    )
)
