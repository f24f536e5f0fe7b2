"""OpenAI's Responses API over chat requests, as far as agents use it: stateless, with functions as tools.

Source: OpenAI's API reference, "Responses" and its streaming events.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hermes_atropos.messages import TURN_KEY
from hermes_atropos.proxy.wire import Refused, Said, event

__all__ = ["chat_request", "events", "response"]

#: What would need answers to be kept, or work to go on without a client.
UNSUPPORTED = ("background", "conversation", "previous_response_id", "prompt")

#: What is handed on, by the name that it has in a chat request.
SAMPLING = {"max_output_tokens": "max_tokens", "parallel_tool_calls": "parallel_tool_calls"} | {
    name: name for name in ("frequency_penalty", "presence_penalty", "seed", "stop", "temperature", "top_k", "top_p")
}

#: What an item has before its first delta.
EMPTY: dict[str, dict[str, Any]] = {"message": {"content": []}, "function_call": {"arguments": ""}}


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that asks the same.

    Raises:
        Refused: what is wrong with the body, or what it asks for and can't have.
    """
    for name in UNSUPPORTED:
        if body.get(name):
            raise Refused(400, f"{name} is not supported: send the whole input with each request", "unsupported")
    request = {chat: body[name] for name, chat in SAMPLING.items() if body.get(name) is not None}
    text = body.get("text")
    if isinstance(text, Mapping) and text.get("format"):
        request["response_format"] = text["format"]
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise Refused(400, "input must be a text or a list of items", "invalid_input")
    request["messages"] = _messages(items)
    if body.get("instructions"):
        request["messages"].insert(0, {"role": "system", "content": body["instructions"]})
    if body.get("tools"):
        request["tools"] = [_tool(tool) for tool in body["tools"]]
    return request | {"tool_choice": body.get("tool_choice"), "stream": body.get("stream")}


def _messages(items: list[Any]) -> list[dict[str, Any]]:
    """The items as messages: an answer's reasoning, text and calls, which are items of their own, as one."""
    messages: list[dict[str, Any]] = []

    def answer(*, anew: bool = False) -> dict[str, Any]:
        if anew or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    for place, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message" and item.get("role") == "assistant":
            begun = answer()
            spoken = begun["content"] is not None or "tool_calls" in begun
            answer(anew=spoken)["content"] = _content(item.get("content"))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            answer().setdefault("tool_calls", []).append(call)
        elif kind == "reasoning":
            parts = [*(item.get("content") or []), *(item.get("summary") or [])]
            answer(anew=True)["reasoning_content"] = "\n".join(part.get("text", "") for part in parts)
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise Refused(400, f"input[{place}] is of type {kind!r}, which is not supported", "unsupported_item")
    return messages


def _content(content: Any) -> Any:
    """A content; a single part of text as that text. What isn't text is refused where the messages are read."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and "text" in content[0]:
        return content[0]["text"]
    return content


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise Refused(400, f"a tool of type {kind!r} is not supported: only functions are", "unsupported_tool")
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key not in ("type", "strict")},
    }


def response(model: str, said: Said, usage: Mapping[str, int], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as a ``response``."""
    message, output = said.message, []
    ref = message[TURN_KEY]
    if thought := message.get("reasoning_content"):
        content = [{"type": "reasoning_text", "text": thought}]
        output.append({"type": "reasoning", "id": f"rs_{ref}", "summary": [], "content": content})
    if message["content"]:
        text = {"type": "output_text", "text": message["content"], "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{ref}", "role": "assistant", "status": "completed", "content": [text]}
        output.append(item)
    for place, call in enumerate(message.get("tool_calls", [])):
        function = {"call_id": call["id"], **call["function"], "status": "completed"}
        output.append({"type": "function_call", "id": f"fc_{ref}.{place}", **function})
    cut_off = said.finish_reason == "length"
    return {
        "id": f"resp_{ref}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if cut_off else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
        "error": None,
        "model": model,
        "output": output,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata") or {},
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "temperature": asked.get("temperature"),
        "top_p": asked.get("top_p"),
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": asked.get("tools") or [],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def events(body: Mapping[str, Any]) -> Iterator[bytes]:
    """The events of a stream that ends with this response."""
    numbers = itertools.count()

    def sent(kind: str, **data: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **data}, kind)

    begun = {**body, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield sent("response.created", response=begun)
    yield sent("response.in_progress", response=begun)
    for index, item in enumerate(body["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        empty = EMPTY.get(item["type"], {})
        status = {} if item["type"] == "reasoning" else {"status": "in_progress"}
        yield sent("response.output_item.added", output_index=index, item={**item, **empty, **status})
        if item["type"] == "message":
            part = item["content"][0]
            at_part = {**at, "content_index": 0}
            yield sent("response.content_part.added", **at_part, part={**part, "text": ""})
            yield sent("response.output_text.delta", **at_part, delta=part["text"], logprobs=[])
            yield sent("response.output_text.done", **at_part, text=part["text"], logprobs=[])
            yield sent("response.content_part.done", **at_part, part=part)
        elif item["type"] == "function_call":
            yield sent("response.function_call_arguments.delta", **at, delta=item["arguments"])
            yield sent("response.function_call_arguments.done", **at, arguments=item["arguments"], name=item["name"])
        yield sent("response.output_item.done", output_index=index, item=item)
    yield sent(f"response.{body['status']}", response=dict(body))
