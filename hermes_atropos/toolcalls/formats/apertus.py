"""``<|tools_prefix|>[{"f": {"x": 1}}]<|tools_suffix|>``: Apertus; its reasoning stands in ``<|inner_prefix|>``."""

from __future__ import annotations

from typing import Any

from hermes_atropos.toolcalls.call import ToolCall, named_call, object_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, register
from hermes_atropos.toolcalls.formats.json_block import block_end, json_reader

#: The tag at the end is where the model stops.
END = block_end("<|tools_suffix|>", "<|tools_prefix|>", optional=True)


def call_by_name(item: Any, **fields: Any) -> ToolCall:
    """A call from an object whose one key is the name and whose value is the arguments."""
    if isinstance(item, dict) and len(item) == 1:
        return named_call(*next(iter(item.items())), **fields)
    return object_call(item, **fields)


register(
    Format(
        name="apertus",
        parse=Blocks(
            r"<\|tools_prefix\|>",
            json_reader(END, listed=True, call=call_by_name),
            think=(r"<\|inner_prefix\|>|<think>", r"<\|inner_suffix\|>|</think>"),
        ).parse,
        mark=r"<\|tools_prefix\|>",
    )
)
