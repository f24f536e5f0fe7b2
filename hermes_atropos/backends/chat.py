"""OpenAI-compatible chat: native tool calls where the server has them, and no tokens.

What is answered here can serve evaluation and SFT data, never training on tokens: ``tracks_tokens`` is False, and every
turn's ``ref`` is None.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from weakref import WeakKeyDictionary

import openai
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.chat_stream import ChatHearing, answered
from hermes_atropos.backends.pool import Pool
from hermes_atropos.backends.tracked import warn_of_another_format
from hermes_atropos.errors import BackendResponseError
from hermes_atropos.listening import text_listener
from hermes_atropos.messages import Message, Tool
from hermes_atropos.rendering.dialect import Dialect
from hermes_atropos.toolcalls import ParsedText, from_openai, parse_text

__all__ = ["ChatBackend"]

logger = logging.getLogger(__name__)

#: What the method of the ``openai`` client takes; other parameters travel in ``extra_body``.
OPENAI_PARAMETERS = CompletionCreateParamsNonStreaming.__annotations__.keys() | {
    "extra_body",
    "extra_headers",
    "extra_query",
    "timeout",
}


class ChatBackend:
    """Answers through the chat endpoint of an atroposlib server.

    Args:
        server: a ``ServerManager``, whose healthy server with the most room answers and whose others stand in for it
            when it fails, or one ``APIServer``.
        tool_format: how calls are written in text, for servers that hand over text; ``auto`` is ``hermes``.
        native_tools: whether the server takes ``tools`` and returns ``tool_calls``. None finds out: after the first
            refusal the tools are described in the system prompt, and calls and results travel as text.
        chat_template_kwargs: further arguments of the chat template, sent with each call: vLLM and SGLang know them.
        patience_s: seconds for which a failing call is retried.

    Calls are made through the server's own chat wrapper within its semaphore, past the nested retries of atroposlib and
    of its ``openai`` client, and without atroposlib's health check, which is a completion every second.

    Raises:
        NoServerError: a ``ServerManager`` without servers.
    """

    tracks_tokens = False

    def __init__(
        self,
        server: Any,
        *,
        tool_format: str = "auto",
        native_tools: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.server = server
        self._pool = Pool(server, patience_s=patience_s, checks_health=False)
        self.tool_format = "hermes" if tool_format == "auto" else tool_format
        self.native_tools = native_tools
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def fresh(self) -> Self:
        """The same for another rollout: this very backend, as it records nothing."""
        return self

    async def sample(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **sampling: Any
    ) -> ModelTurn:
        """Ask for one answer.

        Args:
            messages: OpenAI messages; keys that no chat endpoint knows are left out.
            tools: OpenAI tool definitions.
            sampling: ``temperature``, ``max_tokens``, …; what the OpenAI API does not know travels in the request's
                body all the same. ``split="eval"`` takes the servers' evaluation slots.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            BackendError: the last failure, after retries of lost connections, timeouts, 429 and 5xx.
        """
        sampling.pop("train_skewed", None)  # nothing is trained
        tell = text_listener.get()
        heard = None if tell is None else ChatHearing(tell, tools, functools.partial(self._read, tools=tools))
        turn = await self._sample(messages, tools, sampling, heard)
        if heard is not None:
            heard.end(ParsedText(turn.content, turn.reasoning, turn.calls))
        if tools and not turn.calls:
            await warn_of_another_format(turn.raw, self.tool_format, tools)
        return turn

    async def _sample(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        sampling: dict[str, Any],
        heard: ChatHearing | None,
    ) -> ModelTurn:
        if tools and self.native_tools is not False:
            try:
                completion = await self._ask(clean_messages(messages), {**sampling, "tools": list(tools)}, heard)
            except BackendResponseError as error:
                if self.native_tools or not _refuses_tools(error):
                    raise
                logger.warning("The server takes no tools (%s): they go into the system prompt from now on", error)
                self.native_tools = False
            else:
                self.native_tools = True
                return self._turn(completion, tools)
        if tools or self.native_tools is False:
            sampling.pop("tool_choice", None)
            sampling.pop("parallel_tool_calls", None)
            messages, _ = TEXT_ONLY.prepare(messages, tools)
        return self._turn(await self._ask(clean_messages(messages), sampling, heard), tools)

    async def _ask(
        self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], heard: ChatHearing | None
    ) -> Any:
        """A completion, through a server's own chat wrapper."""
        arguments = dict(arguments)
        if self.chat_template_kwargs:
            arguments["chat_template_kwargs"] = self.chat_template_kwargs
        split = arguments.pop("split", None) or "train"
        request = {key: value for key, value in arguments.items() if key in OPENAI_PARAMETERS}
        if extra := {key: value for key, value in arguments.items() if key not in OPENAI_PARAMETERS}:
            request["extra_body"] = {**(request.get("extra_body") or {}), **extra}

        async def chat(server: Any) -> Any:
            own = server._inject_reasoning_kwargs({**request, "model": server.config.model_name, "messages": messages})
            return await answered(_on_this_loop(server), own, heard)

        return await self._pool.call(chat, split=split)

    def _read(self, message: Message, tools: Sequence[Tool] | None) -> ParsedText:
        """What a message says in its texts."""
        raw, reasoning = _texts(message)
        parsed = parse_text(raw, format=self.tool_format, tools=tools)
        return parsed._replace(reasoning=reasoning or parsed.reasoning)

    def _turn(self, completion: Any, tools: Sequence[Tool] | None) -> ModelTurn:
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise BackendResponseError(f"the server answered without a message: {str(completion)[:500]}", status=200)
        message = choices[0].message.model_dump(warnings="none")
        raw, _ = _texts(message)
        parsed = self._read(message, tools)
        calls = from_openai(message.get("tool_calls") or []) or parsed.calls
        if not calls and not parsed.content and parsed.reasoning:
            calls = parse_text(parsed.reasoning, format=self.tool_format, tools=tools).calls
        content = parsed.content if calls or parsed.reasoning else raw or None
        finish_reason = choices[0].finish_reason or "stop"
        if message.get("refusal") and not (content or calls):
            content, finish_reason = message["refusal"], "content_filter"
        usage = completion.usage.model_dump(warnings="none") if getattr(completion, "usage", None) else {}
        return ModelTurn(
            content=content,
            reasoning=parsed.reasoning,
            calls=calls,
            finish_reason=finish_reason,
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            reasoning_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
            raw=raw,
            model=getattr(completion, "model", None),
        )


_twins: WeakKeyDictionary[Any, WeakKeyDictionary[asyncio.AbstractEventLoop, Any]] = WeakKeyDictionary()


def _on_this_loop(server: Any) -> Any:
    """The server for the running event loop: a copy, where it has an ``openai`` client, whose own does not retry.

    The first loop's copy shares the server's connections, which belong to that loop; a later loop's has its own.
    """
    if not hasattr(server, "openai"):
        return server
    twins = _twins.setdefault(server, WeakKeyDictionary())
    loop = asyncio.get_running_loop()
    if loop not in twins:
        http_client = openai.DefaultAsyncHttpxClient(timeout=server.config.timeout) if twins else None
        twin = copy.copy(server)
        twin.openai = server.openai.copy(max_retries=0, http_client=http_client)
        twins[loop] = twin
    return twins[loop]


def _refuses_tools(error: BackendResponseError) -> bool:
    # vLLM without --enable-auto-tool-choice, Ollama for a model without tools, …: a 4xx that speaks of tools.
    return error.status in {400, 404, 422, 501} and "tool" in (error.body or "").lower()


def _texts(message: Message) -> tuple[str, str | None]:
    """Content and reasoning, wherever the server put them: a string, a list of parts, ``reasoning_content`` (vLLM,
    SGLang, DeepSeek), ``reasoning`` (OpenRouter, Ollama, newer vLLM) or ``reasoning_details`` (OpenRouter)."""
    content = message.get("content")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    if not thoughts:
        thoughts = "\n".join(_part_texts(message.get("reasoning_details"), {"reasoning.text", "reasoning.summary"}))
    if isinstance(content, list):
        thoughts = thoughts or "\n".join(_part_texts(content, {"thinking", "reasoning"}))
        content = "".join(_part_texts(content, {"text", "output_text"}))
    return content or "", thoughts if isinstance(thoughts, str) and thoughts.strip() else None


def _part_texts(parts: Any, types: set[str]) -> Iterator[str]:
    for part in parts or []:
        if isinstance(part, Mapping) and part.get("type") in types:
            text = part.get("text") or part.get("summary") or part.get("thinking") or part.get("reasoning")
            yield from [text] if isinstance(text, str) else _part_texts(text, types | {"text"})


# What the OpenAI API knows of a message, and the reasoning that some servers want back. A harness keeps more.
_MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", "reasoning_content", "reasoning_details")
_CALL_KEYS = ("id", "type", "function", "extra_content")


def clean_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as strict servers take them: without our reference to the turn and without a harness' own keys; what
    answers a call that was none (a malformed one, which stands in the content) comes from the user."""
    cleaned: list[dict[str, Any]] = []
    called: set[str] = set()
    told: dict[str, Any] | None = None  # the user's word, after the answers to the turn's calls
    for message in messages:
        if message.get("role") != "tool":
            called, told = {call["id"] for call in message.get("tool_calls") or ()}, None
        elif message.get("tool_call_id") not in called:
            if told:
                told["content"] += "\n" + _result_text(message)
            else:
                cleaned.append(told := {"role": "user", "content": _result_text(message)})
            continue
        kept = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
        kept.setdefault("content", None)
        if message.get("tool_calls"):
            kept["tool_calls"] = [{k: call[k] for k in _CALL_KEYS if k in call} for call in message["tool_calls"]]
        cleaned.insert(len(cleaned) - (told is not None), kept)
    return cleaned


def _result_text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content)


#: For a server that knows no tools: they stand in the system prompt, calls in the assistant's text, results in user
#: messages.
TEXT_ONLY = Dialect(
    tools=False,
    system=True,
    developer=True,
    tool=False,
    calls=False,
    several_calls=True,
    object_arguments=False,
    blank=None,
    answered_calls=True,
    long_ids=True,
    reasoning="reasoning_content",
    reasoned_calls=True,
    parts=True,
    repeated_user=True,
    user_after_tool=True,
)
