"""Tool calls: what a model wrote, whether it can be run, and what to tell the model if not.

``parse_text`` takes an answer apart, ``validate`` checks its calls against the tools, ``error_result`` words the answer
to those that failed. ``call`` says what a call is, ``formats`` how each model family writes one.
"""

from hermes_atropos.toolcalls.call import ParsedText, ParseStatus, ToolCall, from_openai
from hermes_atropos.toolcalls.formats import FORMATS, parse_text
from hermes_atropos.toolcalls.prompts import error_result, tool_response, tools_prompt
from hermes_atropos.toolcalls.schema import validate

__all__ = [
    "FORMATS",
    "ParseStatus",
    "ParsedText",
    "ToolCall",
    "error_result",
    "from_openai",
    "parse_text",
    "tool_response",
    "tools_prompt",
    "validate",
]
