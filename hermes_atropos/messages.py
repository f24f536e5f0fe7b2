"""OpenAI messages: their types, the key that refers to a turn, the text of a content, and ``<tool_call>`` blocks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["SAMPLED_KEY", "TURN_KEY", "Message", "Tool", "call_function", "text_of", "tool_call_block"]

#: A message as it is read: ``role``, ``content`` and what belongs to the role. What is built is a plain dict.
Message = Mapping[str, Any]

#: An OpenAI tool definition.
Tool = Mapping[str, Any]

#: Key of a stored assistant message that refers to its turn in the ledger. It has no leading underscore because
#: Hermes drops such keys before it sends messages on.
TURN_KEY = "atropos_turn"

#: Key of a call, in the ``tool_calls`` of a message that is rendered, whose value is the text that the model sampled:
#: empty where the call stands in the block of the one before it.
SAMPLED_KEY = "sampled"


def text_of(content: Any) -> str | None:
    """The text of a content: a string, a list of OpenAI text parts, or nothing; None if there is more in it."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return None if None in texts else "\n".join(str(text) for text in texts)


def call_function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name and arguments of an entry of ``tool_calls``, with or without the ``{"type": "function"}`` envelope."""
    return call.get("function") or call


def tool_call_block(name: Any, arguments: Any) -> str:
    """A call as Hermes and Qwen models write it; ``arguments`` are an object, or its JSON text."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what the model wrote in place of JSON is shown as it is
            arguments = json.loads(arguments)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, default=str)
    return f"<tool_call>\n{call}\n</tool_call>"
