"""What a chat template writes around an assistant turn, found out from synthetic conversations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hermes_atropos.errors import ChatTemplateError
from hermes_atropos.messages import Message
from hermes_atropos.rendering.dialect import (
    LATER_USER,
    PROBE_ID,
    PROBE_NAME,
    PROBE_TOOL,
    SYSTEM,
    USER,
    ChatTemplate,
    Dialect,
    probe_result,
)
from hermes_atropos.toolcalls.formats import format_of

__all__ = ["Layout", "TurnEnd", "Unproven"]

# No text of a probe may get into what is rendered for a real conversation: they all hold MARK.
MARK = "atropos-probe"
ANSWER = "atropos-probe-answer"
EARLIER = "atropos-probe-earlier"
THOUGHT = "atropos-probe-thought"

PROBE_CALL = {"id": PROBE_ID, "name": PROBE_NAME}
OTHER_CALL = {"id": "probe0002", "name": PROBE_NAME}
# Ids tell calls apart in some templates (Command R): no two turns of a conversation share one.
EARLIER_ID = "earlier0"
EARLIER_CALLS = [{"id": f"{EARLIER_ID}{number}", "name": EARLIER} for number in range(5)]


class Unproven(Exception):
    """A bridge that can't be proven; ``rewritten`` if because the template changes what it wrote before."""

    def __init__(self, *, rewritten: bool = False) -> None:
        super().__init__()
        self.rewritten = rewritten


class TurnEnd(NamedTuple):
    """How a template ends an assistant turn.

    Attributes:
        gap: what stands between the turn's last text and its end; holds ``PROBE_ID`` where the call's id stands.
        token: the special token that closes the turn; empty where the next message opens with what ends it (GLM).
    """

    gap: str
    token: str

    def find(self, rest: str, call_id: str) -> int | None:
        """Where in ``rest``, what is written after the turn's last text, its end token begins."""
        gap = self.gap.replace(PROBE_ID, call_id)
        return len(gap) if rest.startswith(gap + self.token) else None


class Layout:
    """A template as it writes conversations with tools, or without.

    Attributes:
        dialect: what it takes.
        ends: how it ends a turn without calls (False) and with calls (True), where that can be made out.
        stops: the special tokens that a model ends its turns with.
        reasoning_opening: what the template writes before reasoning; ``<think>`` where it writes none.
    """

    def __init__(self, template: ChatTemplate, special: re.Pattern[str], eos: str | None, *, with_tools: bool) -> None:
        self.template = template
        self.dialect = Dialect.learn(template, with_tools=with_tools)
        self._tools = [PROBE_TOOL] if with_tools else None
        self._special = special
        self._eos = eos
        self._prompts: dict[tuple[bool, bool], str] = {}
        self.reasoning_opening = self._find_reasoning_opening()
        self.ends: dict[bool, TurnEnd] = {}
        self.stops: set[str] = set()
        for calls in (False, True):
            self._find_end(calls)
        context = self.context(system=False, after_tools=False)
        opening = self.text(context)[len(self.text(context, open_turn=False)) :]
        self.stops -= {*self._find_inner(), *special.findall(opening)}

    def text(self, messages: Sequence[Message], *, open_turn: bool = True) -> str:
        """What the template writes of a synthetic conversation."""
        messages, tools = self.dialect.prepare(messages, self._tools)
        return self.template(messages, tools, open_turn=open_turn)

    def shows_reasoning(self, text: str) -> bool:
        """Whether a sampled turn holds reasoning."""
        return self.reasoning_opening in text or "</think>" in text

    def context(self, *, system: bool, after_tools: bool) -> list[Message]:
        """The shortest conversation that a turn can follow."""
        messages = [SYSTEM, USER] if system else [USER]
        return [*messages, *self.step(EARLIER_CALLS[:1])] if after_tools else messages

    def prompt(self, *, system: bool, after_tools: bool) -> str:
        """What the template writes of such a context. It is remembered, but not by a template that writes the time."""
        key = system, after_tools
        if key not in self._prompts or "strftime_now" in self.template.source:
            self._prompts[key] = self.text(self.context(system=system, after_tools=after_tools))
        return self._prompts[key]

    def step(self, calls: Sequence[Message]) -> list[Message]:
        """An earlier turn that called tools, and their results."""
        return [self.turn(calls, EARLIER), *(probe_result(EARLIER, call_id=call["id"]) for call in calls)]

    def turn(
        self, calls: Sequence[Message], answer: str = ANSWER, *, thought: str | None = EARLIER, text: str = ""
    ) -> Message:
        """An assistant turn that ends with ``answer``: after calls, the last argument; ``text`` comes before them."""
        message: dict[str, Any] = {"role": "assistant", "content": text or answer}
        if calls:
            values = [*[EARLIER] * (len(calls) - 1), answer]
            made = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": {"value": value}},
                }
                for call, value in zip(calls, values, strict=True)
            ]
            message |= {"content": text, "tool_calls": made if self.dialect.several_calls else made[-1:]}
        if thought is not None and self.dialect.reasoning:
            message[self.dialect.reasoning] = thought
        elif thought is not None and not (calls and not self.dialect.answered_calls):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        return message

    def tail(self, context: Sequence[Message], prompt: str, turn: Message, new_messages: Sequence[Message]) -> str:
        """What the template writes from the end token of ``turn`` on; ``prompt`` is what it wrote of the context.

        Raises:
            Unproven: it changes the prompt, leaves out the turn's reasoning, or can't be read.
        """
        try:
            head, found, rest = self.text([*context, turn, *new_messages]).partition(ANSWER)
        except ChatTemplateError:
            raise Unproven from None
        thinking = THOUGHT in str(turn.values())
        if not _without_space(head).startswith(_without_space(prompt)) or (thinking and THOUGHT not in head):
            raise Unproven(rewritten=True)
        end = self.ends.get("tool_calls" in turn)
        call_id = self.dialect.call_id(turn["tool_calls"][-1]["id"]) if "tool_calls" in turn else ""
        place = end.find(rest, call_id) if end and found else None
        if place is None:
            raise Unproven
        return rest[place:]

    def call_format(self) -> str:
        """The format in which the template writes calls; ``hermes`` where that can't be made out."""
        context = self.context(system=False, after_tools=False)
        try:
            text = self.text([*context, self.turn([PROBE_CALL], thought=None)], open_turn=False)
        except ChatTemplateError:
            return "hermes"
        format = format_of(text[len(self.text(context, open_turn=False)) :])
        return format.name if format else "hermes"

    def _find_end(self, calls: bool) -> None:
        """Compare a conversation that a turn ends with one that goes on after it."""
        turn = self.turn([PROBE_CALL] if calls else [], thought=None)
        context = self.context(system=False, after_tools=False)
        following = probe_result(EARLIER) if calls else LATER_USER
        try:
            last = self.text([*context, turn], open_turn=False).partition(ANSWER)[2]
            then = self.text([*context, turn, following]).partition(ANSWER)[2]
        except ChatTemplateError:
            return
        marks = list(self._special.finditer(last))
        if marks and not (calls and any(not end.token for end in self.ends.values())):
            known = [mark for mark in marks if mark[0] == self._eos or mark[0] in self.stops]
            for mark in [*known, marks[-1] if calls else marks[0]]:
                closing = self._special.match(then, mark.start())
                # Another token may close an answer once something follows (gpt-oss).
                may_differ = mark is marks[0] and not calls
                if closing and last[: mark.start()] == then[: mark.start()] and (closing[0] == mark[0] or may_differ):
                    self.ends[calls] = TurnEnd(last[: mark.start()], closing[0])
                    self.stops.add(mark[0])
                    break
        elif then.startswith(last) and (opening := self._special.match(then, len(last))):
            # The next message opens with the end (GLM), and what is special in a turn belongs to its calls.
            self.ends[calls] = TurnEnd(last, "")
            self.stops.add(opening[0])

    def _find_inner(self) -> set[str]:
        """Special tokens within a turn: those between its reasoning, its content and its calls."""
        inner: set[str] = set()
        for calls in ([], [PROBE_CALL]):
            try:
                text = self.text([USER, self.turn(calls, thought=THOUGHT)], open_turn=False)
            except ChatTemplateError:
                continue
            inner.update(self._special.findall(text.partition(THOUGHT)[2].partition(ANSWER)[0]))
        return inner

    def _find_reasoning_opening(self) -> str:
        if not self.dialect.reasoning:
            return "<think>"
        context = self.context(system=False, after_tools=False)
        answer, call = self.turn([], thought=THOUGHT), self.turn([PROBE_CALL], thought=THOUGHT)
        for messages, open_turn in ([answer], True), ([answer], False), ([call, probe_result(EARLIER)], True):
            try:
                head, found, _ = self.text([*context, *messages], open_turn=open_turn).partition(THOUGHT)
            except ChatTemplateError:
                continue
            if found:
                opened = self.text(context)
                same = next((at for at, (a, b) in enumerate(zip(head, opened, strict=False)) if a != b), len(opened))
                return head[same:].strip() or "<think>"
        return "<think>"


def _without_space(text: str) -> str:
    """Without white space: templates write that differently around messages that are not the last (Hermes 3)."""
    return "".join(text.split())
