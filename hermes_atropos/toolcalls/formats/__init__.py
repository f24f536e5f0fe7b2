"""The text formats in which models write tool calls: each has a module that shows it, reads it and registers it.

They are those of the families' chat templates on the Hugging Face hub (gpt-oss: the harmony format). Common to all:
a tag within an argument is data, neither the end of a call nor the beginning of another; a broken call ends where the
next may begin; what was read is not read again, so that time is linear in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParsedText, ToolCall, encodable
from hermes_atropos.toolcalls.formats.format import (
    FORMATS,
    REASONING_TAGS,
    Blocks,
    Format,
    Read,
    Scan,
    format_named,
    format_reading,
    register,
)
from hermes_atropos.toolcalls.formats.json_block import block_end, read_json
from hermes_atropos.toolcalls.schema import functions_of

# Each registers its format. A template's call may be read by several: the last registered is tried first.
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
from hermes_atropos.toolcalls.formats import functionary as functionary
from hermes_atropos.toolcalls.formats import granite as granite
from hermes_atropos.toolcalls.formats import apriel as apriel
from hermes_atropos.toolcalls.formats import nemotron as nemotron
from hermes_atropos.toolcalls.formats import gigachat as gigachat
from hermes_atropos.toolcalls.formats import apertus as apertus
from hermes_atropos.toolcalls.formats import command_r as command_r
from hermes_atropos.toolcalls.formats import internlm as internlm
from hermes_atropos.toolcalls.formats import minimax as minimax
from hermes_atropos.toolcalls.formats import minimax_m3 as minimax_m3
from hermes_atropos.toolcalls.formats import seed_oss as seed_oss
from hermes_atropos.toolcalls.formats import minicpm as minicpm
from hermes_atropos.toolcalls.formats import solar as solar
from hermes_atropos.toolcalls.formats import step3 as step3
from hermes_atropos.toolcalls.formats import lfm2 as lfm2
from hermes_atropos.toolcalls.formats import gemma as gemma
# isort: on

__all__ = [
    "FORMATS",
    "Blocks",
    "Format",
    "Read",
    "Scan",
    "block_end",
    "format_in",
    "format_named",
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
    reasoning_tags: tuple[str, str] = REASONING_TAGS,
) -> ParsedText:
    """Take a model's answer apart into content, reasoning and tool calls. No text makes it raise.

    Calls count in the content; where that is empty, and has none, those in the reasoning do. Reasoning that is not
    closed goes on to the end. A closing tag that nothing opened, before any call, ends reasoning that the prompt began.

    Args:
        text: the answer, special tokens included, the stop token at its end removed.
        format: one of ``FORMATS``, or the name of vLLM's parser.
        thinking_open: the generation prompt already opened the reasoning.
        tools: OpenAI tool definitions, for formats that write arguments without their types (``qwen3_coder``, ``glm``):
            a parameter that may be a string stays as it was written, another is read as JSON where it can be.
        reasoning_tags: what opens and what closes reasoning, beside those that the format has itself.

    Raises:
        ConfigurationError: an unknown format.
    """
    known = format_named(format)
    return known.parse(Scan(encodable(text), known.name, tools, reasoning_tags), thinking_open)


def format_in(text: str, tools: Sequence[Tool]) -> str | None:
    """The format in which a text calls one of these tools; None if it calls none."""
    names = [name for name in functions_of(tools) if name in text]
    if not names:
        return None
    format = format_reading(text, lambda read: any(call.ok and call.name in names for call in read.calls), tools)
    return format.name if format else None


ToolCall.read_text = parse_text
