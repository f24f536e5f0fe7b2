"""``<|action_start|><|plugin|>{"name": "f", "parameters": {"x": 1}}<|action_end|>``: InternLM 2 and 3."""

from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

END = block_end("<|action_end|>", "<|action_start|>")

register(
    Format(
        name="internlm",
        parse=Blocks(r"<\|action_start\|>\s*<\|plugin\|>", json_reader(END)).parse,
        mark=r"<\|action_start\|>",
        arguments_key="parameters",
    )
)
