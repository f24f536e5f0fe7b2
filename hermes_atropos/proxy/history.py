"""A stranger's messages: which recorded answers they hold, whatever the harness did to them on the way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from hermes_atropos.messages import TURN_KEY, Message, call_function, text_of
from hermes_atropos.tokens import Turn
from hermes_atropos.tokens.ledger import call_key, text_key

__all__ = ["History"]

#: In place of a reference: one that no turn has, so that the message stands for none.
NOBODY = "ambiguous"

#: What an answer says, without what harnesses drop: the text, and name and arguments of each call in order.
Form = tuple[str, tuple[tuple[Any, str], ...]]

#: Where harnesses keep what the model thought, and how they write it into the content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class Answer(NamedTuple):
    """What a client was given for the turn ``ref``, and what that says."""

    ref: str
    message: Message
    form: Form


class History:
    """The answers that a session gave, and how they are found again.

    An assistant message of a client is one of them if it has the same text, but for white space around it, and the same
    calls, in order, whatever became of the reasoning and of the layout of the arguments. The ids of its calls, or the
    reference where a client hands it back, tell which of several that say the same. Where nothing does, and they are
    different tokens, the message stands for none: a new branch begins.
    """

    def __init__(self) -> None:
        self._by_ref: dict[str, Answer] = {}
        self._by_call: dict[str, Answer] = {}
        self._twins: dict[Form, list[Answer]] = {}
        self._orders: dict[frozenset[str], list[str]] = {}

    def remember(self, turn: Turn, message: Message, siblings: Sequence[Turn]) -> None:
        """Keep an answer as the client gets it; ``siblings`` are all that were sampled from its prompt."""
        answer = Answer(turn.ref, message, form_of(message))
        self._by_ref[turn.ref] = answer
        for call in message.get("tool_calls") or ():
            self._by_call[call["id"]] = answer
        alike = [
            known
            for sibling in siblings
            if sibling.discarded is None
            and sibling.output_ids != turn.output_ids
            and (known := self._by_ref.get(sibling.ref)) is not None
            and known.form == answer.form
        ]
        if alike:
            twins = self._twins.setdefault(answer.form, [])
            twins += [twin for twin in (*alike, answer) if twin not in twins]

    def recognise(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the references of the answers among them, and results as they were first ordered."""
        known: list[Message] = []
        for role, run in groupby(messages, key=lambda message: message["role"]):
            match role:
                case "tool":
                    known += self._ordered(list(run))
                case "assistant":
                    known += map(self._recognised, run)
                case _:
                    known += run
        return known

    def _recognised(self, message: Message) -> Message:
        plain = {key: value for key, value in message.items() if key != TURN_KEY}
        given, text = message.get(TURN_KEY), text_of(message.get("content")) or ""
        if thought := THOUGHT.match(text):
            message = plain = plain | {
                "content": text[thought.end() :].strip(),
                "reasoning_content": thought[1].strip(),
            }
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        answer = self._by_ref.get(str(given)) or self._by_call.get(ids[0] if ids else "")
        if answer is not None and says(message, answer):
            return plain | {TURN_KEY: answer.ref}
        if self._twins and (twins := self._twins.get(form_of(message))):
            reasoning = reasoning_of(message)
            same = [twin for twin in twins if reasoning and reasoning_of(twin.message) == reasoning]
            return plain | {TURN_KEY: same[0].ref if len(same) == 1 else NOBODY}
        return plain

    def _ordered(self, results: list[Message]) -> list[Message]:
        by_id = {str(result.get("tool_call_id")): result for result in results}
        if len(by_id) < len(results):
            return results
        order = self._orders.setdefault(frozenset(by_id), list(by_id))
        return [by_id[call_id] for call_id in order]


def says(message: Message, answer: Answer) -> bool:
    """Whether a client's message says what the answer said, its calls by the same ids."""
    calls, given = message.get("tool_calls") or (), answer.message.get("tool_calls") or ()
    if len(calls) != len(given) or text_key(message) != answer.form[0]:
        return False
    return all(
        call.get("id") == ours["id"]
        # Most harnesses hand the function back as it was.
        and (call_function(call) == call_function(ours) or call_key(call) == call_key(ours))
        for call, ours in zip(calls, given, strict=True)
    )


def form_of(message: Message) -> Form:
    return text_key(message), tuple(map(call_key, message.get("tool_calls") or ()))


def reasoning_of(message: Message) -> str:
    """What the model thought, where the message tells."""
    told = (message.get(key) for key in REASONING_KEYS)
    return next((text.strip() for text in told if text and isinstance(text, str)), "")
