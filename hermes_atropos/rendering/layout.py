"""What a chat template writes around an assistant turn, found out from synthetic conversations."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
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
    function_call,
    probe_result,
    think,
)
from hermes_atropos.tokens import BreakCause
from hermes_atropos.toolcalls import ParsedText
from hermes_atropos.toolcalls.formats.format import FORMATS, REASONING_TAGS, Format, format_marked, format_reading
from hermes_atropos.values import common_length

__all__ = ["Layout", "TurnEnd"]

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
        reasoning_tags: what the template writes before reasoning and after it; ``<think>`` and ``</think>`` where it
            writes none.
    """

    def __init__(
        self, template: ChatTemplate, special: re.Pattern[str], eos: str | None, tool_format: str, *, with_tools: bool
    ) -> None:
        self.template = template
        self.dialect = Dialect.learn(template, with_tools=with_tools, tool_format=tool_format)
        self._tools = [PROBE_TOOL] if with_tools else None
        self._special = special
        self._eos = eos
        self._starts: dict[tuple[bool, bool], tuple[list[Message], str]] = {}
        self.reasoning_tags = self._find_reasoning_tags()
        self.ends: dict[bool, TurnEnd] = {}
        self.stops: set[str] = set()
        for calls in (False, True):
            self._find_end(calls)
        opening = self.text([USER])[len(self.text([USER], open_turn=False)) :]
        self.stops -= {*self._find_inner(), *special.findall(opening)}
        if with_tools and self.dialect.calls and not self.dialect.tools:
            self.dialect = replace(self.dialect, example=self._example())

    def text(self, messages: Sequence[Message], *, open_turn: bool = True) -> str:
        """What the template writes of a synthetic conversation."""
        messages, tools = self.dialect.prepare(messages, self._tools)
        return self.template(messages, tools, open_turn=open_turn)

    def shows_reasoning(self, text: str) -> bool:
        """Whether a sampled turn holds reasoning."""
        return any(tag in text for tag in self.reasoning_tags)

    def start(self, *, system: bool, after_tools: bool) -> tuple[list[Message], str]:
        """The shortest conversation that a turn can follow, and what the template writes of it.

        That is remembered, but not of a template that writes the time.
        """
        key = system, after_tools
        if key not in self._starts or "strftime_now" in self.template.source:
            context = [SYSTEM, USER] if system else [USER]
            if after_tools:
                context += self.step(EARLIER_CALLS[:1])
            self._starts[key] = context, self.text(context)
        return self._starts[key]

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
                function_call({"value": value}, name=call["name"], call_id=call["id"])
                for call, value in zip(calls, values, strict=True)
            ]
            message |= {"content": text, "tool_calls": made if self.dialect.several_calls else made[-1:]}
        if thought is not None and self.dialect.reasoning:
            message[self.dialect.reasoning] = thought
        elif thought is not None and not (calls and not self.dialect.answered_calls):
            message["content"] = think(thought, message["content"])
        return message

    def cut(
        self, context: Sequence[Message], prompt: str, turn: Message, new_messages: Sequence[Message]
    ) -> tuple[str, str] | BreakCause:
        """What the template writes up to the end token of ``turn`` and from it on; ``prompt`` is what it wrote of the
        context.

        ``TEMPLATE`` where it changes the prompt or leaves out the turn's reasoning, ``UNPROVABLE`` where it can't be
        read.
        """
        try:
            head, found, rest = self.text([*context, turn, *new_messages]).partition(ANSWER)
        except ChatTemplateError:
            return BreakCause.UNPROVABLE
        thinking = THOUGHT in str(turn.values())
        if not _without_space(head).startswith(_without_space(prompt)) or (thinking and THOUGHT not in head):
            return BreakCause.TEMPLATE
        end = self.ends.get("tool_calls" in turn)
        call_id = self.dialect.call_id(turn["tool_calls"][-1]["id"]) if "tool_calls" in turn else ""
        place = end.find(rest, call_id) if end and found else None
        if place is None:
            return BreakCause.UNPROVABLE
        return head + ANSWER + rest[:place], rest[place:]

    def call_format(self) -> str:
        """The format in which calls are written.

        It is the one that reads what the template writes for a call; where that writes none, the one whose mark stands
        in what it says of the tools, or among the special tokens; where it does not even speak of tools, the one that
        our own prompt teaches.

        Raises:
            ChatTemplateError: no format reads it.
        """
        if self.dialect.calls:
            said, format = self._own_call()
        elif not self.dialect.tools:
            return "hermes"
        else:
            said = self.text([USER])
            format = format_marked(said) or format_marked(self._special.pattern.replace("\\", ""))
        if format is None:
            what = "writes a tool call as" if self.dialect.calls else "does not write tool calls, and says of tools"
            raise ChatTemplateError(
                f"The chat template {what} {said[-300:]!r}, which is none of the formats that are read: pass "
                f"tool_format=, one of {', '.join(sorted(FORMATS))}, if the model writes that, or add its format with "
                "hermes_atropos.toolcalls.formats.register"
            )
        return format.name

    def _own_call(self) -> tuple[str, Format | None]:
        """What the template writes of a call, and the format that reads it, if any does."""
        written = self._written_calls()
        for text in written:
            fits = functools.partial(_is_probe_call, text)
            if format := format_reading(text, fits, [PROBE_TOOL], self.reasoning_tags):
                return text, format
        return written[0], None

    def _example(self) -> str:
        """A call as the template writes it, of a function and with a value that no tool has."""
        said, _ = self._own_call()
        return (
            said.replace("value", "parameter").replace(ANSWER, "value").replace(PROBE_NAME, "function_name").strip()
        ).replace(PROBE_ID, "call00001")

    def _written_calls(self) -> list[str]:
        """What the template writes of a turn that calls the probe's tool, as a model would sample it.

        Where it can't be made out what ends that turn, there is more than one possibility.
        """
        text = self.text([USER, self.turn([PROBE_CALL], thought=None)], open_turn=False)
        said = text[_same_until(text, self.text([USER])) :]
        head, answer, rest = said.partition(ANSWER)
        end = self.ends.get(True)
        if end is not None and (place := end.find(rest, self.dialect.call_id(PROBE_ID))) is not None:
            return [head + answer + rest[:place]]
        places = [len(rest), *(tag.start() for tag in reversed(list(re.finditer(r"[<\[]", rest))))]
        return [(head + answer + rest[:place]).rstrip() for place in places]

    def _find_end(self, calls: bool) -> None:
        """Compare a conversation that a turn ends with one that goes on after it."""
        turn = self.turn([PROBE_CALL] if calls else [], thought=None)
        following = probe_result(EARLIER) if calls else LATER_USER
        try:
            last = self.text([USER, turn], open_turn=False).partition(ANSWER)[2]
            then = self.text([USER, turn, following]).partition(ANSWER)[2]
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
            between, answered, _ = text.partition(THOUGHT)[2].partition(ANSWER)
            inner.update(self._special.findall(between) if answered else ())
        return inner

    def _find_reasoning_tags(self) -> tuple[str, str]:
        if not self.dialect.reasoning:
            return REASONING_TAGS
        answer, call = self.turn([], thought=THOUGHT), self.turn([PROBE_CALL], thought=THOUGHT)
        heads: list[str] = []
        closings: dict[bool, str] = {}
        for messages, open_turn in [([answer], True), ([answer], False), ([call, probe_result(EARLIER)], True)]:
            try:
                head, found, rest = self.text([USER, *messages], open_turn=open_turn).partition(THOUGHT)
            except ChatTemplateError:
                continue
            if found:
                heads.append(head)
                closings["tool_calls" in messages[0]] = rest.partition(ANSWER)[0]
        if len(closings) == 2:  # what follows reasoning, whether that is an answer or a call
            closing = closings[False][: _same_until(*closings.values())].strip()
        else:
            [closing] = closings.values() or [""]
            first = FIRST_TAG.match(closing)
            closing = (first[0] if first else closing).strip()
        openings = (self._opening_at_the_end(head, closing) for head in heads)
        return (next(filter(None, openings), REASONING_TAGS[0]), closing or REASONING_TAGS[1])

    def _opening_at_the_end(self, head: str, closing: str) -> str:
        """What opens reasoning, from a text up to it; empty where that can't be told."""
        opened = self.text([USER])
        own = head[_same_until(head, opened) :].strip()
        rest = opened.removeprefix(head.rstrip()).strip()
        if own or (rest and not rest.startswith(closing)):
            return own
        # The prompt opens it: by the last tag, unless an answer without reasoning has that too.
        line = head.rstrip().rpartition("\n")[2]
        tag = line[max(line.rfind("<"), 0) :].strip()
        try:
            answer = self.text([USER, self.turn([], thought=None), LATER_USER], open_turn=False)
        except ChatTemplateError:
            return ""
        return "" if tag in answer[len(self.text([USER], open_turn=False)) :] else tag


FIRST_TAG = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]]*\])")


def _same_until(text: str, other: str) -> int:
    """How many characters the two begin with together, up to a tag that is not the same."""
    same = common_length(text, other)
    tag = text.rfind("<", 0, same)
    return tag if tag > text.rfind(">", 0, same) else same


def _is_probe_call(said: str, parsed: ParsedText) -> bool:
    """Whether a text was read as the probe's call, wholly; some templates write an id in place of the name."""
    if len(parsed.calls) != 1 or parsed.content is not None:
        return False
    [call] = parsed.calls
    named = call.name == PROBE_NAME or PROBE_NAME not in said
    return call.ok and named and call.arguments == {"value": ANSWER}


def _without_space(text: str) -> str:
    """Without white space: templates write that differently around messages that are not the last (Hermes 3)."""
    return "".join(text.split())
