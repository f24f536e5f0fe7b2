"""What a tool call is, however it was written."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, Field

from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads, type_name

__all__ = ["ParseStatus", "ParsedText", "ToolCall", "from_openai"]


class ParseStatus(StrEnum):
    """What became of one attempt to call a tool."""

    #: Well formed; after ``validate``, also known and with arguments that fit.
    OK = "ok"
    #: The call's JSON, or a pythonic call's Python, cannot be read.
    INVALID_JSON = "invalid_json"
    #: The call was begun and not ended: usually a turn cut off by ``max_tokens``, sometimes a forgotten tag.
    UNCLOSED_BLOCK = "unclosed_block"
    #: A call that does not say which tool.
    MISSING_NAME = "missing_name"
    #: Readable, but not a call: an array, arguments that are not an object, a parameter that is not closed.
    MALFORMED = "malformed"
    #: The tool does not exist.
    UNKNOWN_TOOL = "unknown_tool"
    #: The tool exists, and its schema refuses the arguments.
    INVALID_ARGUMENTS = "invalid_arguments"


#: Not the shared generator: a tool that seeds that one would make ids come twice.
_random = random.Random()


def _new_id() -> str:
    return f"call_{_random.getrandbits(96):024x}"


class ToolCall(BaseModel):
    """One attempt of the model to call a tool.

    Attributes:
        id: unique; made here, because models write none, or the same one twice.
        name: the tool's name; empty where it could not be read.
        arguments: the decoded arguments; empty where they could not be read.
        status: what became of the attempt.
        error: one sentence that names the fault; None while the status is OK.
        raw: the text as sampled, tags included; of a native call, its arguments as they came.
        format: one of ``FORMATS``, or ``openai`` for a native call.
        sampled_id: the id that the model itself wrote (Kimi, Mistral), which its template shows beside the result.
    """

    id: str = Field(default_factory=_new_id)
    name: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    status: ParseStatus = ParseStatus.OK
    error: str | None = None
    raw: str = ""
    format: str = "hermes"
    sampled_id: str | None = None

    @property
    def ok(self) -> bool:
        return self.status is ParseStatus.OK

    @classmethod
    def parse_from_text(cls, text: str) -> list[ToolCall]:
        """Every call in a model's answer, in Hermes' format; ``parse_text`` knows the others. Never raises."""
        return cls.read_text(text).calls

    #: Reads a whole answer in Hermes' format. The formats, which stand above this module, set it.
    read_text: ClassVar[Callable[[str], ParsedText]]

    def to_openai(self) -> dict[str, Any]:
        """The call as it stands in an OpenAI message: id, type, and a function with its arguments as JSON text.

        That text is the server's own for a native call, unless the arguments were fitted to their schema.
        """
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        with contextlib.suppress(ValueError):
            if self.format == "openai" and json.loads(self.raw) == self.arguments:
                arguments = self.raw
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ParsedText(NamedTuple):
    """A model's answer, taken apart.

    Attributes:
        content: the visible text around the calls, stripped at both ends; None if there is none. Blocks of
            invalid calls are left out too: they can be read in ``calls[].raw``.
        reasoning: what stood between thinking tags, stripped; None if there is none.
        calls: every attempt, in the order of the text.
    """

    content: str | None
    reasoning: str | None
    calls: list[ToolCall]


def from_openai(tool_calls: Iterable[Any] | None) -> list[ToolCall]:
    """Native tool calls, as dicts or as objects of the ``openai`` package, in their order.

    Arguments may be JSON text or an object. Text that is not JSON makes an ``INVALID_JSON`` call. A server's id is
    kept unless it is empty or stands twice in the list: Hermes would lose the second call.
    """
    calls: list[ToolCall] = []
    seen: set[str] = set()
    for item in tool_calls or []:
        function = _get(item, "function")
        arguments = _get(function, "arguments")
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        call = named_call(_get(function, "name"), arguments, raw=encodable(raw), format="openai")
        server_id = _get(item, "id")
        if isinstance(server_id, str) and server_id and server_id not in seen:
            call.id = server_id
        seen.add(call.id)
        calls.append(call)
    return calls


def _get(item: Any, key: str) -> Any:
    return item.get(key) if isinstance(item, Mapping) else getattr(item, key, None)


def named_call(name: Any, arguments: Any, **fields: Any) -> ToolCall:
    """A call from what stood in the places of the name and the arguments, whatever that is."""
    if not isinstance(name, str) or not name.strip():
        return failed_call(
            ParseStatus.MISSING_NAME, "The call does not name a tool: its name must be a string.", **fields
        )
    name = name.strip()
    what = f"The arguments of {name[:80]!r}"
    try:
        arguments = parsed_arguments(arguments)
    except BrokenJSON as error:
        return failed_call(ParseStatus.INVALID_JSON, f"{what} are not valid JSON: {error}.", name=name, **fields)
    if not isinstance(arguments, Mapping):
        found = type_name(arguments)
        return failed_call(ParseStatus.MALFORMED, f"{what} must be a JSON object, not {found}.", name=name, **fields)
    return ToolCall(name=name, arguments=dict(arguments), **fields)


def parsed_arguments(arguments: Any) -> Any:
    """What stood in the place of the arguments, JSON text read; nothing, or ``null``, is an empty object.

    Raises:
        BrokenJSON: the text is not JSON.
    """
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else None
    return {} if arguments is None else arguments


def object_call(value: Any, **fields: Any) -> ToolCall:
    """A call from ``{"name": …, "arguments": …}``; ``parameters`` is taken where there are no ``arguments``."""
    if not isinstance(value, dict):
        error = f"The call must be a JSON object with a name and arguments, not {type_name(value)}."
        return failed_call(ParseStatus.MALFORMED, error, **fields)
    arguments = value["arguments"] if "arguments" in value else value.get("parameters")
    return named_call(value.get("name"), arguments, **fields)


def call_with_id(value: Any, **fields: Any) -> ToolCall:
    """A call that may have an ``id`` of the model's own."""
    own = value.get("id") if isinstance(value, dict) else None
    return object_call(value, sampled_id=own if isinstance(own, str) and own else None, **fields)


def failed_call(status: ParseStatus, error: str, **fields: Any) -> ToolCall:
    return ToolCall(status=status, error=error, **fields)


def encodable(text: str) -> str:
    """The text without lone surrogates, which neither pydantic nor UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()
