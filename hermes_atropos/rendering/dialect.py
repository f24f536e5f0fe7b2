"""What a chat template accepts, found out by trying, and conversations put into that form."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hermes_atropos.errors import ChatTemplateError
from hermes_atropos.messages import SAMPLED_KEY, Message, Tool, call_function, text_of, tool_call_block
from hermes_atropos.rendering.tokenizers import template_text
from hermes_atropos.toolcalls import ToolCall, tool_response, tools_prompt
from hermes_atropos.toolcalls.formats.format import format_reading

__all__ = ["ChatTemplate", "Dialect", "with_named_ids"]

PROBE_NAME = "atropos_probe_tool"
PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "An atropos probe.",
        "parameters": {"type": "object", "properties": {"value": {"type": "string", "description": "Any."}}},
    },
}
# Nine alphanumeric characters: an id that the strictest templates (Mistral's) take.
PROBE_ID = "probe0001"
SYSTEM: Message = {"role": "system", "content": "atropos-probe-system"}
USER: Message = {"role": "user", "content": "atropos-probe-user"}
LATER_USER: Message = {"role": "user", "content": "atropos-probe-later-user"}

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def function_call(arguments: Any, *, name: str = PROBE_NAME, call_id: str = PROBE_ID) -> dict[str, Any]:
    """An entry of ``tool_calls``."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def probe_call(value: str, **message: Any) -> dict[str, Any]:
    """An assistant message that calls the probe tool."""
    return {"role": "assistant", "content": "", "tool_calls": [function_call({"value": value})], **message}


def probe_result(content: str, *, call_id: str = PROBE_ID) -> dict[str, Any]:
    """What answers ``probe_call``."""
    return {"role": "tool", "tool_call_id": call_id, "name": PROBE_NAME, "content": content}


def think(thought: str, answer: str) -> str:
    """An answer after reasoning, for templates that have no place for that."""
    return f"<think>\n{thought}\n</think>\n\n{answer}"


class ChatTemplate:
    """A tokenizer's chat template, as a function from messages to text; ``options`` are further arguments of it."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self.options = dict(options)
        self.source = str(tokenizer.chat_template)

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, open_turn: bool = True
    ) -> str:
        """``template_text`` of a conversation."""
        return template_text(self._tokenizer, messages, tools, open_turn, **self.options)

    def shows(self, messages: Sequence[Message], *texts: str, tools: Sequence[Tool] | None = None) -> bool:
        """Whether the template takes the conversation and writes all of ``texts``, with a turn opened or without."""
        for open_turn in (True, False):
            try:
                written = self(messages, tools, open_turn=open_turn)
            except ChatTemplateError:
                continue
            if all(text in written for text in texts):
                return True
        return False


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a template accepts; ``prepare`` puts a conversation into that form.

    Attributes:
        tools: it describes the tools itself; else the system prompt does.
        system: it knows that role; else the system prompt opens the first user message.
        developer: it knows that role; else it is ``system``.
        tool: it knows that role; else results are ``<tool_response>`` blocks in user messages.
        calls: it writes ``tool_calls``; else they are ``<tool_call>`` blocks in the content.
        several_calls: it writes more than one to a message; else each has a message, followed by its result.
        object_arguments: it writes arguments that are an object; else they are JSON text.
        blank: the content of a message that has calls alone.
        answered_calls: it writes content beside calls; else it leaves the content out.
        long_ids: it takes any call id; else only nine alphanumeric characters.
        reasoning: the key of reasoning; None if it writes none.
        reasoned_calls: a message may have reasoning, content and calls at once; else the content joins the reasoning.
        parts: contents may be lists of parts; else those that hold only text are joined.
        repeated_user: it takes a user message after another; else they are merged.
        user_after_tool: it takes a user message after a result; else that text joins the result.
        stray_results: it takes the result of a call that stands as text in an answer; else a user says it.
        named_ids: it writes the id of a call in place of the name (Kimi): the id has to hold that.
        thinks_in_content: it writes reasoning that stands between ``<think>`` tags in the content.
        example: a call as it writes them, where the system prompt describes the tools; None: as Hermes does.
    """

    tools: bool
    system: bool
    developer: bool
    tool: bool
    calls: bool
    several_calls: bool
    object_arguments: bool
    blank: str | None
    answered_calls: bool
    long_ids: bool
    reasoning: str | None
    reasoned_calls: bool
    parts: bool
    repeated_user: bool
    user_after_tool: bool
    stray_results: bool = True
    named_ids: bool = False
    thinks_in_content: bool = False
    example: str | None = None

    @classmethod
    def learn(cls, template: ChatTemplate, *, with_tools: bool, tool_format: str) -> Dialect:
        """Probe a template, with tools or without (some tokenizers have another template where there are tools).

        A template that does not describe the tools may write calls all the same: they count if they are read, as
        ``tool_format`` if that says how.

        Raises:
            ChatTemplateError: it does not even write what a user says, before an answer or behind one.
        """
        describes = with_tools and template.shows([USER], PROBE_NAME, tools=[PROBE_TOOL])
        tools = [PROBE_TOOL] if describes else None
        if str(USER["content"]) not in template([USER], tools):
            raise ChatTemplateError("The chat template leaves out what the user says: is it the model's own?")
        answer = {"role": "assistant", "content": "probe-answer"}
        template([USER, answer, LATER_USER], tools)
        shows = functools.partial(template.shows, tools=tools)

        def reads(call: Message) -> bool:
            try:
                written = template([USER, call], open_turn=False)
            except ChatTemplateError:  # it wants a turn to be opened
                return False
            format = format_reading(written, lambda read: any(map(_is_probe_call, read.calls)), [PROBE_TOOL])
            return format is not None and tool_format in ("auto", format.name)

        def calls_with(arguments: Any, content: str | None) -> bool:
            call = {"role": "assistant", "content": content, "tool_calls": [function_call(arguments)]}
            value = arguments if isinstance(arguments, str) else "probe-value"
            # A template that wants text may write an object as Python does.
            writes = shows([USER, call], value) and not shows([USER, call], "'probe-value'")
            return writes and (describes or not with_tools or reads(call))

        values = [{"value": "probe-value"}, {"value": "probe-second"}]
        as_object, as_text, blank = False, False, None
        for blank in ("", None):
            as_object = calls_with(values[0], blank)
            as_text = calls_with(json.dumps(values[0]), blank)
            if as_object or as_text:
                break
        calls = as_object or as_text
        first, second = (value if as_object else json.dumps(value) for value in values)

        def call(**message: Any) -> dict[str, Any]:
            made = {"role": "assistant", "content": blank, "tool_calls": [function_call(first)], **message}
            return made if calls else {"role": "assistant", "content": "probe-call"}

        result, long_id = probe_result("probe-result"), f"call_{PROBE_ID:0>24}"
        long, renamed = function_call(first, call_id=long_id), function_call(first, name="probe-other-name")
        two_calls = [function_call(first), function_call(second, call_id="probe0002")]
        part = {"role": "user", "content": [{"type": "text", "text": "probe-part"}]}
        reasoning = next(
            (
                key
                for key in REASONING_KEYS
                if shows([USER, {**answer, key: "probe-thought"}], "probe-thought")
                or shows([USER, call(**{key: "probe-thought"}), result], "probe-thought")
            ),
            None,
        )
        both = call(content="probe-answer", **({reasoning: "probe-thought"} if reasoning else {}))
        return cls(
            tools=describes,
            system=shows([SYSTEM, USER], str(SYSTEM["content"])),
            developer="developer" in template.source,
            tool=shows([USER, call(), result], "probe-result"),
            calls=calls,
            several_calls=not calls or shows([USER, call(tool_calls=two_calls)], "probe-value", "probe-second"),
            object_arguments=as_object,
            blank=blank,
            answered_calls=not calls
            or shows([USER, call(content="probe-answer"), result], "probe-value", "probe-answer"),
            long_ids=shows([USER, call(tool_calls=[long]), probe_result("probe-result", call_id=long_id)]),
            reasoning=reasoning,
            reasoned_calls=shows([USER, both, result]),
            parts=shows([part], "probe-part") and not shows([part], "'probe-part'"),
            repeated_user=shows([USER, LATER_USER]),
            user_after_tool=shows([USER, call(), result, LATER_USER]),
            stray_results=shows([USER, answer, result, answer, LATER_USER], "probe-result"),
            named_ids=calls and not shows([USER, call(tool_calls=[renamed])], "probe-other-name"),
            thinks_in_content=not reasoning
            and shows([USER, {**answer, "content": think("probe-thought", "probe-answer")}], "probe-thought"),
        )

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> tuple[list[dict[str, Any]], Sequence[Tool] | None]:
        """The conversation and the tools as the template takes them; what it takes as it stands stays so.

        Keys that no template reads are left out.
        """
        if self.tool and not self.stray_results:
            messages = _stray_results_as_users(messages)
        plain = [self._plain(message) for message in messages]
        if tools and not self.tools:
            plain = _with_system(plain, tools_prompt(tools, self.example))
            tools = None
        if not self.several_calls:
            plain = _one_call_each(plain, self.blank)
        if not self.tool:
            plain = _results_as_users(plain, _called_names(messages))
        elif not self.user_after_tool:
            plain = _merged(plain, lambda before, after: (before["role"], after["role"]) == ("tool", "user"))
        if not self.system:
            plain = _system_into_user(plain)
        if not self.repeated_user:
            plain = _merged(plain, _alike)
        return plain, tools or None

    def _plain(self, message: Message) -> dict[str, Any]:
        role, content = message["role"], message.get("content")
        if role == "developer" and not self.developer:
            role = "system"
        if not (self.parts and isinstance(content, list)):
            text = text_of(content)
            content = content if text is None else text
        if role == "assistant":
            return self._plain_answer(message, content)
        plain = {"role": role, "content": content}
        if message.get("name"):
            plain["name"] = message["name"]
        if message.get("tool_call_id"):
            plain["tool_call_id"] = self.call_id(message["tool_call_id"])
        return plain

    def _plain_answer(self, message: Message, content: Any) -> dict[str, Any]:
        plain = {"role": "assistant", "content": content}
        calls = message.get("tool_calls") or ()
        if calls and self.calls:
            plain["content"] = content or self.blank
            plain["tool_calls"] = [self._plain_call(call) for call in calls]
        elif calls:
            plain["content"] = "\n".join(filter(None, [content, *map(_call_text, calls)]))
        told = (message.get(key) for key in REASONING_KEYS)
        reasoning = next((text for text in told if text and isinstance(text, str)), "")
        if reasoning and self.thinks_in_content:
            plain["content"] = think(reasoning, plain["content"] or "")
        if reasoning and self.reasoning:
            plain[self.reasoning] = reasoning
            if content and "tool_calls" in plain and not self.reasoned_calls:
                plain[self.reasoning] = f"{reasoning}\n\n{content}"
                plain["content"] = self.blank
        return plain

    def _plain_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call_function(call)
        called = {"name": function.get("name"), "arguments": self._arguments(function.get("arguments"))}
        told = {"id": self.call_id(call["id"])} if call.get("id") else {}
        return {**told, "type": "function", "function": called}

    def _arguments(self, arguments: Any) -> Any:
        if isinstance(arguments, str) and self.object_arguments:
            try:
                parsed = json.loads(arguments)
            except ValueError:
                return arguments
            return parsed if isinstance(parsed, dict) else arguments
        if not isinstance(arguments, str) and not self.object_arguments:
            return json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        return arguments

    def call_id(self, call_id: str) -> str:
        """An id as the template takes it: the same, or nine characters made from it."""
        if self.long_ids or re.fullmatch("[A-Za-z0-9]{9}", call_id):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _is_probe_call(call: ToolCall) -> bool:
    return call.ok and (call.name, call.arguments) == (PROBE_NAME, {"value": "probe-value"})


def _call_text(call: Mapping[str, Any]) -> Any:
    """A call as it stands in a content: as it was sampled, where that is known."""
    if SAMPLED_KEY in call:
        return call[SAMPLED_KEY]
    function = call_function(call)
    return tool_call_block(function.get("name"), function.get("arguments"))


def _called_names(messages: Sequence[Message]) -> dict[str, Any]:
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return {call["id"]: call_function(call).get("name") for call in calls if call.get("id")}


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        prompt = "\n\n".join(part for part in (messages[0]["content"], text) if part)
        return [{**messages[0], "content": prompt}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _system_into_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The leading system prompt opens the first user message; later ones are user messages."""
    users = [{**message, "role": "user"} if message["role"] == "system" else message for message in messages]
    if messages and messages[0]["role"] == "system" and len(users) > 1 and users[1]["role"] == "user":
        return _merged(users[:2], lambda before, after: True) + users[2:]
    return users


def _results_as_users(messages: list[dict[str, Any]], names: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool results as user messages, one for the results that stand together."""
    users: list[dict[str, Any]] = []
    previous = None
    for message in messages:
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "tool")
            text = text_of(message["content"])
            block = tool_response(name, json.dumps(message["content"]) if text is None else text)
            if previous == "tool":
                users[-1]["content"] += f"\n{block}"
            else:
                users.append({"role": "user", "content": block})
        else:
            users.append(message)
        previous = message["role"]
    return users


def with_named_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids that hold the function's name, for the calls whose ids do not, and for their results."""
    named: dict[str, str] = {}
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for number, call in enumerate(calls):
        name, call_id = str(call["function"]["name"]), call.get("id", "")
        if name not in call_id:
            named[call_id] = f"functions.{name}:{number}"
    renamed = []
    for message in messages:
        if "tool_calls" in message:
            calls = [{**call, "id": named.get(call.get("id", ""), call.get("id"))} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        elif message.get("tool_call_id") in named:
            message = {**message, "tool_call_id": named[message["tool_call_id"]]}
        renamed.append(message)
    return renamed


def _stray_results_as_users(messages: Sequence[Message]) -> list[Message]:
    """What answers an answer without calls (those that it has are malformed, and text) is said by the user."""
    told: list[Message] = []
    calls: Any = None
    for message in messages:
        if message["role"] != "tool":
            calls = message.get("tool_calls") or () if message["role"] == "assistant" else None
        stray = message["role"] == "tool" and calls == ()
        told.append({"role": "user", "content": message["content"]} if stray else message)
    return told


def _one_call_each(messages: list[dict[str, Any]], blank: str | None) -> list[dict[str, Any]]:
    """Each call of a message in a message of its own, followed by the results that name it."""
    single: list[dict[str, Any]] = []
    placed: set[int] = set()
    for position, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            single += [] if position in placed else [message]
            continue
        rest = itertools.takewhile(lambda at: messages[at]["role"] == "tool", range(position + 1, len(messages)))
        results = list(rest)
        for number, call in enumerate(calls):
            answer = message if number == 0 else {"role": "assistant", "content": blank}
            single.append({**answer, "tool_calls": [call]})
            named = [at for at in results if messages[at].get("tool_call_id") == call.get("id")]
            single += [messages[at] for at in named]
            placed.update(named)
    return single


def _alike(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before["role"] == after["role"] != "tool" and not ("tool_calls" in before or "tool_calls" in after)


def _merged(
    messages: list[dict[str, Any]], belongs: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Each message that ``belongs`` to the one before it joins its text to that one's."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and belongs(merged[-1], message):
            first, second = text_of(merged[-1]["content"]), text_of(message["content"])
            if first is not None and second is not None:
                merged[-1] = {**merged[-1], "content": "\n\n".join(text for text in (first, second) if text)}
                continue
        merged.append(message)
    return merged
