"""The harmony format of gpt-oss; without the line break, and the prompt ends with ``<|start|>assistant``.

::

    <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>commentary to=functions.f
    <|constrain|>json<|message|>{"x": 1}<|call|>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.call import ParsedText, ToolCall
from hermes_atropos.toolcalls.formats.blocks import Scan, joined
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, read_json

HEAD = re.compile(r"<\|start\|>[^<]*(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>")
RECIPIENT = re.compile(r"\bto=(?:functions\.)?(?P<name>[^\s<]+)")
END = BlockEnd("<|call|>", re.compile(r"(?P<close><\|(?:call|end|return)\|>)|<\|start\|>"), optional=True)


def parse(scan: Scan, thinking: bool) -> ParsedText:
    prompt = "<|start|>assistant<|channel|>analysis<|message|>" if thinking else "<|start|>assistant"
    if not thinking and scan.text.startswith("<|start|>"):
        prompt = ""
    scan = Scan(prompt + scan.text, scan.format, scan.tools)
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while head := scan.search(HEAD, position):
        content.append(scan.text[position : head.start()])
        recipient = RECIPIENT.search(head.group())
        if recipient:
            found, position = read_json(scan, head.start(), head.end(), END, recipient["name"])
            calls += [call.model_copy(update={"raw": call.raw.removeprefix(prompt)}) for call in found]
            continue
        tag = scan.search(END.pattern, head.end())
        stop = tag.start() if tag else len(scan.text)
        channel = (head["channel"] or "").strip()
        (reasoning if channel.startswith("analysis") else content).append(scan.text[head.end() : stop])
        position = tag.end() if tag and tag["close"] else stop
    content.append(scan.text[position:] if position else scan.text.removeprefix(prompt))
    return ParsedText(joined(content, "\n"), joined(reasoning, "\n"), calls)


register(
    Format(
        name="gpt_oss",
        parse=parse,
        mark=r"<\|channel\|>",
        parsers=("openai",),
    )
)
