"""What harnesses do to a history on its way back: what is seen through, and what starts a branch."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check_tokens

from hermes_atropos.proxy.session import Session
from hermes_atropos.proxy.sessions import Sessions
from hermes_atropos.proxy.wire import read_request
from hermes_atropos.testing import ScriptedServer, tool_call
from hermes_atropos.tokens import BreakCause
from hermes_atropos.trajectory import AgentResult

Messages = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
OPENING: Messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Look. \n"}]


def calls(*numbers: int) -> str:
    return "\n".join(tool_call("look", at=number, how={"b": 1, "a": "ü"}) for number in numbers)


SAID = [f"<think>\nHm.\n</think>\n\nI look.\n{calls(1, 2)}", calls(3), "  \nDone. \n"]


async def asks(session: Session, messages: Messages, **more: Any) -> dict[str, Any]:
    said, _ = await session.answer(read_request({"messages": messages, "tools": TOOLS, **more}))
    return {key: value for key, value in said[-1].message.items() if key != "atropos_turn"}


def results(answer: dict[str, Any]) -> Messages:
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": f"seen {place}\n"}
        for place, call in enumerate(answer.get("tool_calls", []))
    ]


async def conversation(rewrite: Callable[[Messages], Messages]) -> tuple[AgentResult, ScriptedServer]:
    """A conversation whose harness rewrites its history before each request but the first."""
    server = ScriptedServer(SAID)
    session = Sessions(server).open()
    messages = copy.deepcopy(OPENING)
    for _ in SAID:
        asked = messages if len(messages) == len(OPENING) else rewrite(copy.deepcopy(messages))
        answer = await asks(session, asked)
        messages += [answer, *results(answer)]
    result = session.trajectory()
    check_tokens(result, server.requests)
    return result, server


# ── What is seen through ─────────────────────────────────────────────────────────────────────────────────────────────


def serialised(message: dict[str, Any]) -> None:
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        call["function"]["arguments"] = json.dumps(arguments, sort_keys=True, indent=1, ensure_ascii=True)


def emptied(message: dict[str, Any]) -> None:
    if message["role"] == "assistant":
        message["content"] = message["content"] or ""


def nulled(message: dict[str, Any]) -> None:
    if message["role"] == "assistant":
        message["content"] = message["content"] or None
        message.setdefault("tool_calls", None)


def unreasoned(message: dict[str, Any]) -> None:
    message.pop("reasoning_content", None)


def tagged(message: dict[str, Any]) -> None:
    if thought := message.pop("reasoning_content", None):
        message["content"] = f"<think>{thought}</think>{message['content'] or ''}"


def trimmed(message: dict[str, Any]) -> None:
    if message["content"]:
        message["content"] = message["content"].strip()


def in_parts(message: dict[str, Any]) -> None:
    if message["content"] is not None:
        message["content"] = [{"type": "text", "text": message["content"]}]


def decorated(message: dict[str, Any]) -> None:
    if message["role"] == "assistant":
        message |= {"refusal": None, "annotations": [], "audio": None}


HARMLESS = [serialised, emptied, nulled, unreasoned, tagged, trimmed, decorated, in_parts]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.sampled_from(HARMLESS), max_size=3), min_size=12, max_size=12))
def test_a_history_that_says_the_same_goes_on(changes: list[set[Callable[..., None]]]) -> None:
    def rewrite(messages: Messages) -> Messages:
        for message, some in zip(messages, changes, strict=False):
            for change in sorted(some, key=HARMLESS.index):
                change(message)
        return messages

    result, _ = asyncio.run(conversation(rewrite))
    assert result.fidelity is not None
    assert (result.fidelity.sequences, result.fidelity.breaks) == (1, {})


def test_results_in_another_order_are_those_that_the_model_read() -> None:
    shuffle = random.Random(1).shuffle

    def rewrite(messages: Messages) -> Messages:
        two = messages[3:5]
        shuffle(two)
        return [*messages[:3], *two, *messages[5:]]

    result, server = asyncio.run(conversation(rewrite))
    assert result.fidelity is not None
    assert result.fidelity.sequences == 1
    assert server.requests[2].prompt.count("seen 0") == 2


# ── What is not ──────────────────────────────────────────────────────────────────────────────────────────────────────


def at(place: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Messages], Messages]:
    def rewrite(messages: Messages) -> Messages:
        if len(messages) > 5:  # in the last request alone
            change(messages[place])
        return messages

    return rewrite


@pytest.mark.parametrize(
    "rewrite",
    [
        at(2, lambda message: message.update(content="I looked.")),
        at(2, lambda message: message["tool_calls"][0]["function"].update(name="Look")),
        at(2, lambda message: message["tool_calls"][0]["function"].update(arguments='{"at": 9}')),
        at(2, lambda message: message["tool_calls"].reverse()),
        at(2, lambda message: message["tool_calls"].pop()),
        at(3, lambda message: message.update(content="[cleared]")),
        at(3, lambda message: message.update(tool_call_id="call_other")),
        at(1, lambda message: message.update(content="Look again.")),
        lambda messages: messages[:3] + messages[4:] if len(messages) > 5 else messages,
    ],
)
def test_a_history_that_says_something_else_is_a_branch(rewrite: Callable[[Messages], Messages]) -> None:
    result, _ = asyncio.run(conversation(rewrite))
    assert result.fidelity is not None
    assert result.fidelity.sequences == 2


async def test_a_change_of_tools_is_a_branch() -> None:
    session = Sessions(ScriptedServer(["One.", "Two."])).open()
    answer = await asks(session, OPENING)
    await asks(session, [*OPENING, answer, OPENING[1]], tools=[])
    assert session.trajectory().fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 1}  # type: ignore[union-attr]


# ── Answers that say the same ────────────────────────────────────────────────────────────────────────────────────────


async def twins(*said: str, chosen: int, keep: Callable[[dict[str, Any]], None]) -> tuple[AgentResult, list[str]]:
    """Samples of one prompt, of which the harness goes on with one, after ``keep`` has left what it leaves."""
    server = ScriptedServer([*said, "Next."])
    session = Sessions(server).open()
    answers, _ = await session.answer(read_request({"messages": OPENING, "tools": TOOLS, "n": len(said)}))
    answer = copy.deepcopy(answers[chosen].message)
    keep(answer)
    await asks(session, [*OPENING, answer, *(results(answer) or [OPENING[1]])])
    result = session.trajectory()
    check_tokens_of_all(result, server)
    last = next(sequence for sequence in result.sequences if "Next." in sequence.full_text)
    return result, [text for text in said if text in last.full_text]


def check_tokens_of_all(result: AgentResult, server: ScriptedServer) -> None:
    sampled = sum(len(ids) for request in server.requests for ids in request.output_ids)
    assert sum(sequence.trainable_tokens for sequence in result.sequences) == sampled


def only(*names: str) -> Callable[[dict[str, Any]], None]:
    def keep(answer: dict[str, Any]) -> None:
        for name in set(answer) - {"role", "content", "tool_calls", *names}:
            del answer[name]

    return keep


@pytest.mark.parametrize("kept", ["atropos_turn", "reasoning_content"])
@pytest.mark.parametrize("chosen", [0, 1])
async def test_what_tells_answers_apart_decides(kept: str, chosen: int) -> None:
    said = ["<think>A</think>Yes.", "<think>B</think>Yes."]
    result, read = await twins(*said, chosen=chosen, keep=only(kept))
    assert read == [said[chosen]]
    assert result.fidelity is not None
    assert result.fidelity.breaks == {}


@pytest.mark.parametrize("chosen", [0, 1])
async def test_the_ids_of_its_calls_tell_an_answer(chosen: int) -> None:
    said = [f"<think>A</think>{calls(1)}", f"<think>B</think>{calls(1)}"]
    _, read = await twins(*said, chosen=chosen, keep=only())
    assert read == [said[chosen]]


async def test_nothing_is_guessed() -> None:
    result, read = await twins("<think>A</think>Yes.", "<think>B</think>Yes.", chosen=1, keep=only())
    assert read == []
    assert result.fidelity is not None
    assert result.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 1}


async def test_the_same_tokens_twice_are_no_choice() -> None:
    result, _ = await twins("Yes.", "Yes.", chosen=1, keep=only())
    assert result.fidelity is not None
    assert result.fidelity.breaks == {}
