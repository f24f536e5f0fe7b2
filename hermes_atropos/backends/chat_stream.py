"""A chat completion that is heard piece by piece, and put together to what would have come at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openai.types.chat import ChatCompletion

from hermes_atropos.backends.hearing import Hearing
from hermes_atropos.errors import BackendConnectionError
from hermes_atropos.listening import Delta
from hermes_atropos.servers import OpenAIEndpoint
from hermes_atropos.servers.failures import url_of

__all__ = ["ChatHearing", "answered"]


class ChatHearing(Hearing):
    """Tells a listener of a message that grows."""

    def grown(self, message: Mapping[str, Any]) -> None:
        self.so_far(message)
        for call in (message.get("tool_calls") or [])[self._calls :]:
            if name := call["function"]["name"]:
                self._tell(Delta("call", name))
                self._calls += 1


async def answered(server: Any, request: dict[str, Any], listener: ChatHearing | None) -> Any:
    """The completion, as the server's chat wrapper gives it; as a stream, where somebody hears it.

    Raises:
        BackendConnectionError: a stream that broke off.
        BackendError: as the server raises it.
    """
    client = getattr(server, "openai", None)
    if listener is None or not (client or isinstance(server, OpenAIEndpoint)):
        return await server._chat_completion_wrapper(**request)
    whole: dict[str, Any] = {}
    request |= {"stream": True, "stream_options": {"include_usage": True}}

    def hear(chunk: Mapping[str, Any]) -> None:
        add(whole, chunk)
        if whole.get("choices"):
            listener.grown(whole["choices"][0]["message"])

    if client is None:
        extra = request.pop("extra_body", {})
        await server.stream(f"{server.base_url}/chat/completions", request | extra, hear)
    else:
        async with await client.chat.completions.create(**request) as stream:
            async for chunk in stream:
                hear(chunk.model_dump())
    if not whole.get("choices") or not whole["choices"][0]["finish_reason"]:
        raise BackendConnectionError("the answer ended before its end", url=url_of(server))
    return ChatCompletion.construct(**whole)


def add(whole: dict[str, Any], chunk: Mapping[str, Any]) -> None:
    """Add a chunk to the completion so far: https://platform.openai.com/docs/api-reference/chat-streaming."""
    whole |= {key: value for key, value in chunk.items() if key != "choices" and value is not None}
    whole["object"] = "chat.completion"
    for piece in chunk.get("choices") or []:
        delta = piece.get("delta") or piece.get("message") or {}  # a server that does not stream
        if not whole.get("choices"):
            whole["choices"] = [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": None}]
        [choice] = whole["choices"]
        choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
        for key, value in delta.items():
            if key == "tool_calls":
                for call in value or []:
                    _add_call(choice["message"].setdefault("tool_calls", []), call)
            elif isinstance(value, str) and key != "role":
                choice["message"][key] = (choice["message"].get(key) or "") + value
            elif isinstance(value, list):
                choice["message"].setdefault(key, []).extend(value)


def _add_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    """Add to the last call of that index; an id of its own begins another, as Ollama gives them all the index 0."""
    index, call_id, function = piece.get("index"), piece.get("id"), piece.get("function") or {}
    call = next((known for known in reversed(calls) if index is None or known["index"] == index), None)
    if call is None or (call_id and call["id"] and call_id != call["id"]):
        call = {"index": index, "id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    call["id"] = call_id or call["id"]
    # Some servers repeat the name with each piece.
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""
