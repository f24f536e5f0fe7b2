"""OpenAI's shapes: what a request may ask for, and what an answer, a stream and an error look like.

Source: OpenAI's API reference, "Chat Completions" and "Errors".
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from hermes_atropos.errors import (
    BackendError,
    BackendTimeoutError,
    ConfigurationError,
    ContextLengthError,
    HermesAtroposError,
    TokenFidelityError,
)
from hermes_atropos.listening import Delta
from hermes_atropos.messages import TURN_KEY, Message, Tool, call_function

__all__ = ["Ask", "Chunks", "Refused", "Said", "completion", "error_body", "event", "read_request", "refusal_of"]

ROLES = {"system", "developer", "user", "assistant", "tool"}

#: What is read here. Everything else of a body is a sampling parameter, which the backend looks at.
READ = {
    "logprobs",
    "messages",
    "model",
    "n",
    "stop",
    "stream",
    "stream_options",
    "tool_choice",
    "tools",
}

#: The first delta of an answer.
OPENING = {"role": "assistant", "content": ""}

#: What would change the prompt or the distribution, and can't be had over token calls.
UNSUPPORTED = (
    "chat_template_kwargs",
    "function_call",
    "functions",
    "top_logprobs",
    "audio",
    "modalities",
    "prediction",
)


class Refused(Exception):
    """A request that is answered with an error in OpenAI's shape.

    Attributes:
        status: of HTTP.
        code: OpenAI's, by which harnesses tell errors apart.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def refusal_of(error: BaseException) -> Refused:
    """What a client is told of a failure. 4xx ends its request; 5xx and 429 are asked again by OpenAI's clients."""
    match error:
        case Refused():
            return error
        case HTTPException():
            return Refused(error.status_code, str(error.detail))
        case ContextLengthError():
            return Refused(400, f"This model's maximum context length is exceeded: {error}", "context_length_exceeded")
        case ConfigurationError():
            return Refused(400, str(error), "invalid_request")
        case BackendTimeoutError():
            return Refused(504, str(error), "server_timeout")
        case BackendError(status=int() as status) if 400 <= status < 500:
            return Refused(status, str(error), "server_refused")
        case BackendError():
            return Refused(502, str(error), "server_failed")
        case TokenFidelityError():
            return Refused(502, str(error), "tokens_do_not_fit")
        case HermesAtroposError():
            return Refused(500, str(error), "internal_error")
    return Refused(500, f"{type(error).__name__}: {error}", "internal_error")


def error_body(refused: Refused) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    return {
        "error": {"message": str(refused), "type": kind, "param": None, "code": refused.code or str(refused.status)}
    }


@dataclass(slots=True)
class Ask:
    """A chat request.

    Attributes:
        messages: OpenAI messages; each has a known role, and contents are text or parts of text.
        tools: what is offered; None if nothing is.
        calls: whether the answer may hold tool calls (``tool_choice`` is not ``none``).
        demanded: the tools of which ``tool_choice`` demands a call; empty if it demands none.
        n: how many answers.
        stop: texts at which the answer's text ends.
        sampling: everything else.
        logprobs: whether the answer tells them.
        stream, usage: whether the answer is a stream, and whether that ends with the usage.
    """

    messages: list[Message]
    tools: list[Tool] | None
    calls: bool
    demanded: frozenset[str]
    n: int
    stop: list[str]
    sampling: dict[str, Any]
    logprobs: bool = False
    stream: bool = False
    usage: bool = False

    @property
    def in_pieces(self) -> bool:
        """Whether what is sampled is the beginning of what the client gets, and can be told at once."""
        return self.n == 1 and not (self.stop or self.logprobs or self.demanded)


def read_request(body: Mapping[str, Any]) -> Ask:
    """A request's body, looked at.

    Raises:
        Refused: what is wrong with it, or what it asks for and can't have.
    """
    for name in UNSUPPORTED:
        if body.get(name):
            raise Refused(
                400, f"{name} is not supported: answers are sampled by token calls; leave it out", "unsupported"
            )
    tools, choice = body.get("tools") or None, body.get("tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise Refused(400, "tools must be a list of functions with names", "invalid_tools")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
        raise Refused(400, "stop must be a text or a list of texts", "invalid_stop")
    n = 1 if body.get("n") is None else body["n"]
    if type(n) is not int or not 1 <= n <= 128:
        raise Refused(400, "n must be a whole number from 1 to 128", "invalid_n")
    options = body.get("stream_options") or {}
    return Ask(
        messages=read_messages(body.get("messages")),
        tools=tools,
        calls=tools is not None and choice != "none",
        demanded=_demanded(choice, tools),
        n=n,
        stop=stop,
        sampling={key: value for key, value in body.items() if key not in READ} | ({"stop": stop} if stop else {}),
        logprobs=bool(body.get("logprobs")),
        stream=bool(body.get("stream")),
        usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
    )


def _demanded(choice: Any, tools: list[Tool] | None) -> frozenset[str]:
    """The tools, one of which must be called.

    Raises:
        Refused: there is no such choice, or no such tool.
    """
    if choice is None or choice in ("auto", "none"):
        return frozenset()
    offered = frozenset(str(call_function(tool)["name"]) for tool in tools or ())
    if choice == "required":
        named = offered
    elif isinstance(choice, Mapping) and choice.get("type") == "function":
        named = frozenset({str(call_function(choice).get("name"))})
    else:
        raise Refused(
            400, f"tool_choice is {choice!r}: give auto, none, required or a function's name", "invalid_tool_choice"
        )
    if not named or not named <= offered:
        raise Refused(
            400, f"tool_choice demands a call of {sorted(named)}, tools are {sorted(offered)}", "invalid_tool_choice"
        )
    return named


def read_messages(messages: Any) -> list[Message]:
    """The messages of a body.

    Raises:
        Refused: they are not messages, or hold what can't be sent as tokens.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list with at least one message", "invalid_messages")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise Refused(400, f"{where} must be an object whose role is one of {sorted(ROLES)}", "invalid_messages")
        _check_content(message.get("content"), where)
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            raise Refused(400, f"{where}.tool_calls must be a list of function calls with names", "invalid_messages")
    return messages


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise Refused(400, f"{where}.content must be a text, a list of parts or null", "invalid_messages")
    for part in content:
        if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Refused(
                400,
                f"{where}.content has a part of type {kind!r}: the model is asked by token ids, which carry text; "
                "send text in its place",
                "unsupported_content",
            )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _is_tool(tool: Any) -> bool:
    return _is_call(tool) and tool.get("type", "function") == "function"


@dataclass(slots=True)
class Said:
    """One answer as the client gets it.

    Attributes:
        message: the assistant's.
        finish_reason: ``stop``, ``length`` or ``tool_calls``.
        tokens: ids, texts and logprobs of what was sampled, where they were asked for.
    """

    message: dict[str, Any]
    finish_reason: str
    tokens: list[tuple[int, str, float]] | None = None

    @property
    def logprobs(self) -> dict[str, Any] | None:
        if self.tokens is None:
            return None
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": [], "token_id": token}
            for token, text, logprob in self.tokens
        ]
        return {"content": content, "refusal": None}


def completion(model: str, said: Sequence[Said], usage: Mapping[str, int]) -> dict[str, Any]:
    """The answer as a ``chat.completion``."""
    choices = []
    for index, answer in enumerate(said):
        choice = {"index": index, "message": answer.message, "finish_reason": answer.finish_reason}
        choices.append(choice if answer.tokens is None else choice | {"logprobs": answer.logprobs})
    return {
        "id": f"chatcmpl-{said[0].message[TURN_KEY]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }


class Chunks:
    """A stream of ``chat.completion.chunk``s: pieces of the first answer while it is sampled, and then what is left.

    Args:
        usage: whether the last chunk has it.
    """

    def __init__(self, model: str, *, usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = usage
        self._told = {"content": "", "reasoning_content": ""}

    def piece(self, delta: Delta) -> Iterator[bytes]:
        """A further piece of a text; calls come when they are whole."""
        if delta.kind == "call":
            return
        if not any(self._told.values()):
            yield self._chunk(0, OPENING)
        key = "content" if delta.kind == "content" else "reasoning_content"
        self._told[key] += delta.text
        yield self._chunk(0, {key: delta.text})

    def rest(self, said: Sequence[Said], usage: Mapping[str, int]) -> Iterator[bytes]:
        """What the answers say beyond the pieces.

        Raises:
            Refused: the first answer does not begin with the pieces: the server failed in it, and gave another one.
        """
        texts = {key: said[0].message.get(key) or "" for key in self._told}
        if not all(texts[key].startswith(told) for key, told in self._told.items()):
            raise Refused(
                502, "the server failed in its answer, of which this stream has told; ask again", "broken_off"
            )
        for index, answer in enumerate(said):
            message = dict(answer.message)
            if index > 0 or not any(self._told.values()):
                yield self._chunk(index, OPENING)
            for key in ("reasoning_content", "content"):
                text = (message.pop(key, None) or "")[len(self._told[key]) if index == 0 else 0 :]
                if text:
                    yield self._chunk(index, {key: text}, logprobs=answer.logprobs if key == "content" else None)
            for place, call in enumerate(message.pop("tool_calls", [])):
                yield self._chunk(index, {"tool_calls": [{"index": place, **call}]})
            del message["role"]
            yield self._chunk(index, message, answer.finish_reason)
        if self._usage:
            yield event(self._head | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return event(self._head | {"choices": [choice]})


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"
