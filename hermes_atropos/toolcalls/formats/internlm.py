"""``<|action_start|><|plugin|>{"name": "f", "parameters": {"x": 1}}<|action_end|>``: InternLM 2 and 3."""

from __future__ import annotations

import re

from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

END = block_end("<|action_end|>", "<|action_start|>")


def read(scan: Scan, opening: re.Match[str]) -> Read:
    return read_json(scan, opening.start(), opening.end(), END)


register(
    Format(
        name="internlm",
        parse=Blocks(r"<\|action_start\|>\s*<\|plugin\|>", read).parse,
        mark=r"<\|action_start\|>",
        arguments_key="parameters",
    )
)
