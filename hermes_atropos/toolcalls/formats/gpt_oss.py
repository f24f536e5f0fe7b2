"""The harmony format of gpt-oss; without the line break, and the prompt ends with ``<|start|>assistant``.

::

    <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>commentary to=functions.f
    <|constrain|>json<|message|>{"x": 1}<|call|>
"""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.call import ParsedText, ParseStatus, ToolCall, failed_call
from hermes_atropos.toolcalls.formats.format import Format, Scan, joined, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd, read_json

HEAD = re.compile(r"<\|start\|>[^<]*(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>")
#: What is begun as a header, and goes on to the end of the text without a message.
CUT_HEADER = re.compile(r"<\|start\|>(?:assistant)?(?=\s*<\|channel\|>|\s+to=).*", re.DOTALL)
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
    cut = scan.search(CUT_HEADER, position)
    content.append(scan.text[position : cut.start() if cut else len(scan.text)].removeprefix(prompt))
    if cut and (recipient := RECIPIENT.search(cut.group())):
        name = recipient["name"]
        error = f"The header of the call to {name[:80]!r} does not come to <|message|> and the arguments."
        raw = cut.group().removeprefix(prompt)
        calls.append(failed_call(ParseStatus.UNCLOSED_BLOCK, error, name=name, raw=raw, format=scan.format))
    return ParsedText(joined(content, "\n"), joined(reasoning, "\n"), calls)


register(
    Format(
        name="gpt_oss",
        parse=parse,
        mark=r"<\|channel\|>",
        parsers=("openai",),
    )
)
