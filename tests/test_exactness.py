"""Invariants 1 to 4 for every model family: the trainer's tokens against the server's own record of what it was sent
and sampled, whatever the model answers and the harness makes of its history."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import families
import pytest
import test_toolcalls_formats as formats
from families import FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check_tokens

from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.conversation import Conversation, assistant_message
from hermes_atropos.errors import ChatTemplateError, ToolCallRetriesError
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.rendering import renderer_for
from hermes_atropos.rendering.library import LibraryRenderer
from hermes_atropos.testing import Reply, ScriptedServer
from hermes_atropos.trajectory import StopReason, ToolResult

Message = dict[str, Any]

TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "terminal",
            "description": "Runs a command.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    }
]

WRITERS: dict[str, Callable[[Sequence[formats.Call]], str]] = dict(reversed(formats.WRITERS))

TEXTS = st.one_of(
    st.sampled_from(["", " ", "a", " a b\n\n", "naïve 🙂", "</think>", "<tool_call>", "<|im_end|>\n", "[INST]</s>"]),
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)


@dataclass(frozen=True)
class Answer:
    """What a model says; ``cut`` leaves its end token off."""

    thought: str | None
    text: str
    commands: tuple[str | int, ...]
    cut: bool

    def written_by(self, family: Family) -> tuple[str, str | None]:
        """The text that a model of the family samples, and the token with which it ends it."""
        calls: list[formats.Call] = [("terminal", {"text": command}) for command in self.commands]
        thought = "" if self.thought is None else self._thinking(family)
        if family is families.GPT_OSS_FAMILY:
            said = f"<|channel|>final<|message|>{self.text}" if self.text and not calls else ""
        else:
            said = self.text
        end = (family.call_end if calls else None) or family.special[0]
        written = WRITERS[family.format if family.tools or family.example else "hermes"](calls) if calls else ""
        return thought + said + written, None if self.cut else end

    def _thinking(self, family: Family) -> str:
        opening, closing = family.tags
        if family is families.GPT_OSS_FAMILY:
            return f"{opening}{self.thought}{closing}"
        return f"{'' if family.thinks else opening}\n{self.thought}\n{closing}\n\n"


ANSWERS = st.builds(
    Answer,
    thought=st.none() | TEXTS,
    text=TEXTS,
    # A number is no text: that call is invalid, and the conversation asks again by itself.
    commands=st.lists(st.sampled_from(["ls", "echo '🙂' </think>", " \n", 5]), max_size=2).map(tuple),
    cut=st.sampled_from([False, False, False, True]),
)

ACTIONS = st.sampled_from(
    [
        *["go on"] * 5,
        "steer",
        "strip the answers",
        "lose the references",
        "drop the end",
        "rewrite a message",
        "throw the answer away",
        "compress",
        "ask a subagent",
    ]
)

STEPS = st.lists(st.tuples(ACTIONS, TEXTS, st.integers(0, 99)), min_size=1, max_size=7)


class Model(ScriptedServer):
    """Answers in the family's own words, and ends them as it does."""

    def __init__(self, family: Family, tokenizer: Any, answers: Sequence[Answer]) -> None:
        super().__init__(lambda _: "", tokenizer=tokenizer, end_token=family.special[0])
        self._answers = (answer.written_by(family) for answer in itertools.cycle(answers))

    def _sample(self, reply: Reply, max_tokens: int | None) -> tuple[list[int], str]:
        text, end = next(self._answers)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return (ids, "length") if end is None else ([*ids, self.tokenizer.convert_tokens_to_ids(end)], "stop")


class Harness:
    """Keeps a history as harnesses do, and takes liberties with it."""

    def __init__(self, backend: TrackedBackend, tools: list[Message] | None) -> None:
        self.backend = backend
        self.tools = tools
        self.conversation = Conversation(backend, max_tool_call_retries=1)
        self.opening: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Go."}]
        self.messages = list(self.opening)

    async def ask(self) -> None:
        """One answer and the results of its calls, or a fresh start where there is none to be had."""
        try:
            turn = await self.conversation.chat(self.messages, self.tools)
        except (ToolCallRetriesError, ChatTemplateError):
            self.messages = list(self.opening)
            return
        results = [
            ToolResult(call.name, f"result of {call.id[:2]}\n", call_id=call.id).to_message()
            for call in turn.calls
            if call.ok
        ]
        self.messages = [*self.messages, assistant_message(turn), *results]

    async def act(self, action: str, text: str, place: int) -> None:
        messages = self.messages
        if action == "steer" and messages[-1]["role"] == "tool":
            self.messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
        elif action == "throw the answer away":
            kept = max(index for index, message in enumerate(messages) if message["role"] == "user")
            self.messages = messages[: kept + 1]
        elif action == "ask a subagent":
            child = Harness(self.backend, self.tools)
            child.messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": text}]
            await child.ask()
        elif action == "compress":
            self.messages = [messages[0], {"role": "user", "content": f"So far: {text}"}]
        else:
            self.messages = self._altered(action, text, place)
        if self.messages[-1]["role"] == "assistant":
            self.messages = [*self.messages, {"role": "user", "content": text}]
        await self.ask()

    def _altered(self, action: str, text: str, place: int) -> list[Message]:
        messages = self.messages
        if action == "strip the answers":
            return [{**message, "content": message["content"].strip()} for message in messages]
        if action == "lose the references":
            return [{key: message[key] for key in message if key != TURN_KEY} for message in messages]
        if action == "drop the end":
            return [*messages[: 1 + place % len(messages)], {"role": "user", "content": text}]
        if action == "rewrite a message":
            place %= len(messages)
            return [*messages[:place], {**messages[place], "content": text}, *messages[place + 1 :]]
        return list(messages)


def run(family: Family, tokenizer: Any, answers: list[Answer], steps: list[Any], *, with_tools: bool) -> None:
    server = Model(family, tokenizer, answers)
    harness = Harness(TrackedBackend(server, tokenizer), TOOLS if with_tools else None)

    async def rollout() -> None:
        await harness.ask()
        for step in steps:
            await harness.act(*step)

    asyncio.run(rollout())
    result = harness.conversation.result(harness.messages, StopReason.COMPLETED)
    check_tokens(result, server.requests)
    discarded = [turn for turn in harness.backend.ledger.turns if turn.discarded]
    assert result.fidelity is not None
    assert result.fidelity.tokens_discarded == sum(len(turn.output_ids) for turn in discarded)


TOKENIZERS = {family.name: family.tokenizer() for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@settings(deadline=None, max_examples=70)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=4), steps=STEPS, with_tools=st.booleans())
def test_every_family(family: Family, answers: list[Answer], steps: list[Any], with_tools: bool) -> None:
    run(family, TOKENIZERS[family.name], answers, steps, with_tools=with_tools)


@pytest.fixture(scope="module")
def known() -> Any:
    """The tokenizer of a model that the renderers library knows."""
    tokenizer = families.QWEN3_FAMILY.tokenizer()
    tokenizer.name_or_path = "Qwen/Qwen3-8B"
    assert isinstance(renderer_for(tokenizer), LibraryRenderer)
    return tokenizer


@settings(deadline=None, max_examples=70)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=4), steps=STEPS, with_tools=st.booleans())
def test_a_model_that_the_library_knows(known: Any, answers: list[Answer], steps: list[Any], with_tools: bool) -> None:
    run(families.QWEN3_FAMILY, known, answers, steps, with_tools=with_tools)
