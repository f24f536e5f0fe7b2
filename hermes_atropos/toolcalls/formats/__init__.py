"""The text formats in which models write tool calls: each has a module that shows it, reads it and registers it.

They are those of the families' chat templates on the Hugging Face hub (gpt-oss: the harmony format). Common to all:
a tag within an argument is data, neither the end of a call nor the beginning of another; a broken call ends where the
next may begin; what was read is not read again, so that time is linear in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText, ToolCall, encodable
from hermes_atropos.toolcalls.formats.blocks import Blocks, Read, Scan
from hermes_atropos.toolcalls.formats.format import FORMATS, Format, format_named, format_of, register
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json

# Each registers its format. A template's call may bear the marks of several: the last registered is tried first.
# isort: off
from hermes_atropos.toolcalls.formats import pythonic as pythonic
from hermes_atropos.toolcalls.formats import llama3_json as llama3_json
from hermes_atropos.toolcalls.formats import hermes as hermes
from hermes_atropos.toolcalls.formats import qwen3_coder as qwen3_coder
from hermes_atropos.toolcalls.formats import glm as glm
from hermes_atropos.toolcalls.formats import gpt_oss as gpt_oss
from hermes_atropos.toolcalls.formats import mistral as mistral
from hermes_atropos.toolcalls.formats import deepseek as deepseek
from hermes_atropos.toolcalls.formats import kimi as kimi
# isort: on

__all__ = [
    "FORMATS",
    "Blocks",
    "Format",
    "Read",
    "Scan",
    "block_end",
    "format_named",
    "format_of",
    "parse_text",
    "read_json",
    "register",
]


def parse_text(
    text: str,
    *,
    format: str = "hermes",
    thinking_open: bool = False,
    tools: Sequence[Tool] | None = None,
) -> ParsedText:
    """Take a model's answer apart into content, reasoning and tool calls. No text makes it raise.

    Calls count in the content; where that is empty, and has none, those in the reasoning do. Reasoning that is not
    closed goes on to the end. A closing tag that nothing opened, before any call, ends reasoning that the prompt began.

    Args:
        text: the answer, special tokens included, the stop token at its end removed.
        format: one of ``FORMATS``, or the name of vLLM's parser.
        thinking_open: the generation prompt already opened the reasoning.
        tools: OpenAI tool definitions, for formats that write arguments without their types (``qwen3_coder``, ``glm``):
            a parameter declared as a string stays as it was written, another is read as JSON where it can be.

    Raises:
        ConfigurationError: an unknown format.
    """
    known = format_named(format)
    return known.parse(Scan(encodable(text), known.name, tools), thinking_open)


ToolCall.read_text = parse_text
