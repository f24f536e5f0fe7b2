"""What the model reads about tools: which there are, what they answered, and what was wrong with a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ToolCall
from hermes_atropos.toolcalls.formats import FORMATS
from hermes_atropos.toolcalls.schema import functions_of
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads

__all__ = ["error_result", "tool_response", "tools_prompt"]


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def tools_prompt(tools: Sequence[Tool], example: str | None = None) -> str:
    """What the system prompt says of the tools where the chat template has no place for them.

    The tools stand between ``<tools>`` tags, one JSON object a line, schemas in full; then follows how to call them: as
    in ``example``, where the template writes calls in a format of its own, else between the tags of a Hermes call, with
    a call's own schema. Empty without tools.
    """
    functions = functions_of(tools)
    if not functions:
        return ""
    lines = "\n".join(_dumps({"type": "function", "function": function}) for function in functions.values())
    head = (
        "# Tools\n\n"
        "You can call the functions below. Each line between <tools> and </tools> is one function with the JSON schema"
        " of its parameters.\n"
        f"<tools>\n{lines}\n</tools>\n\n"
    )
    if example is not None:
        return f"{head}To call a function, write:\n{example}\nAfter your calls, stop: then you get their results."
    return (
        f"{head}To call a function, write a JSON object between <tool_call> and </tool_call>:\n"
        '<tool_call>\n{"name": "function name", "arguments": {"parameter": "value"}}\n</tool_call>\n'
        f"The object fits this schema: {_dumps(call_schema())}\n"
        "Write valid JSON: double quotes, newlines within strings as \\n. You may think between <think> and </think>"
        " before a call. Several calls are several blocks. After your calls, stop: each result comes back between"
        " <tool_response> and </tool_response>."
    )


def call_schema(name: str | None = None, parameters: Any = None, key: str = "arguments") -> dict[str, Any]:
    """The JSON schema of a call: of any, or of one tool's; ``key`` is where its arguments stand."""
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string"} if name is None else {"const": name},
            key: parameters or {"type": "object"},
        },
        "required": ["name", key],
    }


def error_result(call: ToolCall, tools: Sequence[Tool] | None) -> str:
    """The answer to a call that could not be run: its fault, and the schema that the next try has to fit."""
    fault = call.error or "The call could not be read."
    function = functions_of(tools).get(call.name)
    name, parameters = (call.name, function.get("parameters")) if function else (None, None)
    format = FORMATS.get(call.format)
    if format and format.arguments_key:
        what = f"valid JSON that fits this schema: {_dumps(call_schema(name, parameters, format.arguments_key))}"
    else:
        arguments = "arguments" if format and not format.json_arguments else "arguments as valid JSON"
        what = f"{arguments} that fit this schema: {_dumps(parameters or {'type': 'object'})}"
    return f"Error: {fault} The tool was not run. Call again with {what}"


def tool_response(name: str, content: str, duration_s: float | None = None) -> str:
    """A ``<tool_response>`` block with name, duration in seconds and result, for templates without a tool role.

    A result that is a JSON object or array stands as such, anything else as a string. A closing tag within the result
    is escaped, so that a tool's output cannot end the block.
    """
    body: dict[str, Any] = {"name": name}
    if duration_s is not None:
        body["duration_s"] = round(duration_s, 3)
    body["result"] = _structured(content)
    text = _dumps(body).replace("</tool_response", r"<\/tool_response")
    return f"<tool_response>\n{text}\n</tool_response>"


def _structured(content: str) -> Any:
    if not content.lstrip().startswith(("{", "[")):
        return content
    try:
        return loads(content)
    except BrokenJSON:
        return content
