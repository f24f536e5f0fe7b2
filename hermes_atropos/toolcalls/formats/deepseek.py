"""DeepSeek V3 to V4, and R1.

::

    V3, R1:  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
             ```json
             {"x": 1}
             ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    V3.1:    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    V3.2 on: <｜DSML｜function_calls>                                                   (V4: tool_calls)
             <｜DSML｜invoke name="f">
             <｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
             </｜DSML｜invoke>
             </｜DSML｜function_calls>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, block_end, read_json, wrong_opening
from hermes_atropos.toolcalls.formats.pairs import Pairs
from hermes_atropos.toolcalls.strict_json import loads

HEAD = re.compile(r"(?P<name>[^<\n]*)<｜tool▁sep｜>(?:(?P<fenced>[^\n{<]*)\n```(?:json)?)?")
END = BlockEnd(
    "<｜tool▁call▁end｜>",
    re.compile(r"(?P<close>(?:```\s*)?<｜tool▁call▁end｜>)|<｜tool▁call▁begin｜>|<｜tool▁calls▁end｜>"),
)
DSML = Pairs(
    parameter=re.compile(r'<｜DSML｜parameter name="(?P<key>[^"<\n]*)" string="(?P<string>true|false)">'),
    closing="</｜DSML｜parameter>",
    behind=re.compile(r"</｜DSML｜parameter>\s*+(?=<｜DSML｜parameter |</｜DSML｜invoke>)"),
    last=re.compile(r"\s*</｜DSML｜invoke>"),
    end=block_end("</｜DSML｜invoke>", "<｜DSML｜invoke "),
    convert=lambda parameter, text, _: text if parameter["string"] == "true" else loads(text),
)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    if opening["name"] is not None:
        return DSML.read(scan, opening)
    if opening.group() != "<｜tool▁call▁begin｜>":
        return wrong_opening(scan, opening, DSML.end, 'name="…">')
    head = HEAD.match(scan.text, opening.end())
    if head is None:
        return wrong_opening(scan, opening, END, "a name and <｜tool▁sep｜>")
    name = head["name"] if head["fenced"] is None else head["fenced"]
    return read_json(scan, opening.start(), head.end(), END, name)


register(
    Format(
        name="deepseek",
        parse=Blocks(
            r'<｜tool▁call▁begin｜>|<｜DSML｜invoke (?:name="(?P<name>[^"<>\n]*)">)?',
            read,
            wrapper=r"<｜tool▁calls▁(?:begin|end)｜>|</?｜DSML｜(?:function_calls|tool_?calls)>",
        ).parse,
        mark="<｜tool▁call|<｜DSML｜",
        parsers=("deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4"),
    )
)
