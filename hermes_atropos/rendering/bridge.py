"""A renderer for any Hugging Face chat template, which finds out from the template itself how a turn closes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hermes_atropos.errors import ChatTemplateError
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
from hermes_atropos.rendering.encoder import ChunkEncoder, decode
from hermes_atropos.toolcalls import ParsedText, parse_text

__all__ = ["TemplateRenderer"]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

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

#: How to tell the format in which a template writes a call.
CALL_MARKS = {
    "kimi": re.escape("<|tool_call_argument_begin|>"),
    "deepseek": "<｜tool▁call",
    "mistral": re.escape("[TOOL_CALLS]"),
    "gpt_oss": re.escape("<|channel|>"),
    "glm": "<arg_key>",
    "qwen3_coder": "<function=",
    "hermes": "<tool_call>",
    "llama3_json": r'"parameters": ?\{|<\|python_tag\|>',
    "pythonic": rf"\[{PROBE_NAME}\(",
}

#: What new messages may hold: leading and trailing white space, nothing, markup, many bytes a character.
PROBE_CONTENTS = ("plain", "  \n spaces around \n\n", "", '{"a": [1, null]}\n', "naïve 🙂 <b>&amp;</b>\r\n")

#: Tokens that end a turn by another name than the template's, where the tokenizer has them.
OTHER_ENDS = ("<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


class Unproven(Exception):
    """A bridge that can't be proven; ``rewritten`` if because the template changes what it wrote before."""

    def __init__(self, *, rewritten: bool = False) -> None:
        super().__init__()
        self.rewritten = rewritten


class End(NamedTuple):
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
        thinks: what the template writes before reasoning; ``<think>`` where it writes none.
    """

    def __init__(self, template: ChatTemplate, special: re.Pattern[str], eos: str | None, *, with_tools: bool) -> None:
        self.template = template
        self.dialect = Dialect.learn(template, with_tools=with_tools)
        self._tools = [PROBE_TOOL] if with_tools else None
        self._special = special
        self._eos = eos
        self._prompts: dict[tuple[bool, bool], str] = {}
        self.thinks = self._find_thinks()
        self.ends: dict[bool, End] = {}
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
        if not _squeezed(head).startswith(_squeezed(prompt)) or (thinking and THOUGHT not in head):
            raise Unproven(rewritten=True)
        end = self.ends.get("tool_calls" in turn)
        call_id = self.dialect.call_id(turn["tool_calls"][-1]["id"]) if "tool_calls" in turn else ""
        place = end.find(rest, call_id) if end and found else None
        if place is None:
            raise Unproven
        return rest[place:]

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
                    self.ends[calls] = End(last[: mark.start()], closing[0])
                    self.stops.add(mark[0])
                    break
        elif then.startswith(last) and (opening := self._special.match(then, len(last))):
            # The next message opens with the end (GLM), and what is special in a turn belongs to its calls.
            self.ends[calls] = End(last, "")
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

    def _find_thinks(self) -> str:
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


class Shape(NamedTuple):
    """What decides how a template goes on after a turn; proofs hold for one shape each."""

    tools: bool
    system: bool
    after_tools: bool
    thought: bool
    calls: bool
    roles: tuple[str, ...]


class TemplateRenderer:
    """Renders with the tokenizer's own ``apply_chat_template``, and bridges where that is proven to be the same.

    ``render`` gives the ids of ``tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)``.
    What the template does not know is put into its terms first (see ``Dialect``): tools into the system prompt, tool
    results and the system prompt into user messages, JSON arguments into objects. As in ``apply_chat_template``, the
    text of a special token in a message becomes that token.

    ``bridge`` renders a short synthetic conversation (a probe, a probe's answer, the new messages) and takes what
    stands after the answer's end token. It returns None unless all of this holds:

    - the turn ended with the end token that the template writes there, or without any, as a truncated one does, and
      an assistant message among the new ones, which a harness wrote, has no calls;
    - with the new messages appended the template still writes what it wrote before, white space aside: a template that
      drops old reasoning, moves the tools to the last user message or repeats the system prompt starts a branch. Where
      reasoning is dropped once a user speaks (Qwen3, GLM), a turn after tool results is taken to follow reasoning;
    - for new messages of these roles, with and without tools, system prompt, calls and reasoning as here, the synthetic
      conversation and a long one were found to end in the same text and the same tokens, whatever the contents.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tool_format: one of ``toolcalls.FORMATS``, or ``auto``: the one in which the template writes calls.
        options: further arguments of the template, such as ``{"enable_thinking": False}``.

    Raises:
        ChatTemplateError: the template can't render a user's message.
    """

    def __init__(self, tokenizer: Any, *, tool_format: str = "auto", options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.encode = ChunkEncoder(tokenizer)
        template = ChatTemplate(tokenizer, options or {})
        names = sorted(self.encode.special, key=len, reverse=True)
        special = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
        self._template = template
        eos = getattr(tokenizer, "eos_token", None)
        self._layouts: dict[bool, Layout] = {}
        for with_tools in (False, True):
            try:
                self._layouts[with_tools] = Layout(template, special, eos, with_tools=with_tools)
            except ChatTemplateError:  # a template for conversations with tools alone
                if with_tools and not self._layouts:
                    raise
        self._check_ids()
        self._proofs: dict[Shape, Unproven | None] = {}
        #: The format in which the template writes calls, and the one in which answers are read.
        self.written_format = self._find_format()
        self.tool_format = self.written_format if tool_format == "auto" else tool_format
        ids = self.encode.special
        stops = {name for layout in self._layouts.values() for name in layout.stops} | ids.keys() & set(OTHER_ENDS)
        self.stop_token_ids = frozenset(ids[name] for name in {*stops, eos} if name in ids)
        self._special_ids = frozenset(ids.values())

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        plain, tools = self.prepare(messages, tools)
        return self.encode(self._template(plain, tools))

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> tuple[list[dict[str, Any]], Sequence[Tool] | None]:
        """Messages and tools in the template's own terms: what ``render`` hands to ``apply_chat_template``."""
        return self._layout(tools).dialect.prepare(messages, tools)

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | None:
        try:
            return self._bridge(history, turn_ids, new_messages, tools)
        except Unproven:
            return None

    def rewrites(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> bool:
        """Whether ``bridge`` gives None because the template changes what stands before the new messages."""
        try:
            self._bridge(history, turn_ids, new_messages, tools)
        except Unproven as reason:
            return reason.rewritten
        return False

    def parse(
        self,
        output_ids: Sequence[int],
        tools: Sequence[Tool] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedText:
        end = len(output_ids)
        while end and output_ids[end - 1] in self.stop_token_ids:
            end -= 1
        layout = self._layout(tools)
        if prompt_ids is None:
            prompt = layout.text(layout.context(system=False, after_tools=False))
        else:
            prompt = self.decode(prompt_ids[-16:])
        return parse_text(
            self.decode(output_ids[:end]), format=self.tool_format, thinking_open=prompt.rstrip().endswith("<think>")
        )

    def decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)

    def dialect(self, *, tools: bool = False) -> Dialect:
        """What the template takes, in conversations with tools or without.

        Raises:
            ChatTemplateError: it refuses those conversations.
        """
        return self._layout(tools).dialect

    def _layout(self, tools: Any) -> Layout:
        try:
            return self._layouts[bool(tools)]
        except KeyError:
            raise ChatTemplateError(
                f"The chat template refuses conversations with{'' if tools else 'out'} tools"
            ) from None

    def _bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None,
    ) -> list[int]:
        roles = tuple(role for role, _ in itertools.groupby(message["role"] for message in new_messages))
        before = [message["role"] for message in history[-2:]]
        unsampled = [message for message in new_messages if message["role"] == "assistant"]
        if before not in (["user", "assistant"], ["tool", "assistant"]) or any(m.get("tool_calls") for m in unsampled):
            raise Unproven
        layout = self._layout(tools)
        if layout.dialect.reasoning and any(_stands_for_result(message) for message in (*history[:2], history[-2])):
            raise Unproven
        shape = Shape(
            tools=bool(tools),
            system=history[0]["role"] in ("system", "developer"),
            after_tools=before[0] == "tool",
            thought=False,
            calls=bool(history[-1].get("tool_calls")) or "tool" in roles,
            roles=roles,
        )
        context = layout.context(system=shape.system, after_tools=shape.after_tools)
        prompt = layout.prompt(system=shape.system, after_tools=shape.after_tools)
        if prompt.rstrip().endswith(layout.thinks) or self._holds_reasoning(turn_ids, layout.thinks):
            shape = shape._replace(thought=True)
        if shape not in self._proofs:
            self._proofs[shape] = self._refute(shape)
        refuted = self._proofs[shape]
        if refuted:
            raise refuted
        calls = _calls_of(history[-1], new_messages)
        if len(calls) > 1 and not layout.dialect.several_calls:
            raise Unproven
        turn = layout.turn(calls, thought=THOUGHT if shape.thought else None)
        return self._after(turn_ids, self.encode(layout.tail(context, prompt, turn, new_messages)))

    def _holds_reasoning(self, turn_ids: Sequence[int], opening: str) -> bool:
        text = self.decode(turn_ids)
        return opening in text or "</think>" in text

    def _after(self, turn_ids: Sequence[int], tail: list[int]) -> list[int]:
        """The ids of a tail after a turn: without the end token where the model sampled it."""
        ends = [place for place, token in enumerate(turn_ids) if token in self.stop_token_ids]
        if tail[0] not in self.stop_token_ids:
            raise Unproven
        if ends == [len(turn_ids) - 1] and turn_ids[-1] == tail[0]:
            return tail[1:]
        # Another special token at the end may have ended the turn too.
        if ends or (turn_ids and turn_ids[-1] in self._special_ids):
            raise Unproven
        return tail

    def _refute(self, shape: Shape) -> Unproven | None:
        """Try whether a long conversation goes on after such a turn as the shortest does, in text and in tokens."""
        layout = self._layout(shape.tools)
        context = layout.context(system=shape.system, after_tools=shape.after_tools)
        opening = layout.context(system=shape.system, after_tools=False)
        earlier = [*opening, *layout.step(EARLIER_CALLS[1:3]), layout.turn([], EARLIER), LATER_USER]
        if shape.after_tools:
            earlier += [*layout.step(EARLIER_CALLS[3:]), *layout.step(EARLIER_CALLS[:1])]
        try:
            prompt, earlier_prompt = layout.text(context), layout.text(earlier)
            for number, content in enumerate(PROBE_CONTENTS):
                calls = [PROBE_CALL, OTHER_CALL][: 1 + number % 2] if shape.calls else []
                text = "atropos-probe-text" if calls and number % 2 else ""
                turn = layout.turn(calls, thought=THOUGHT if shape.thought else None, text=text)
                new_messages = [message for role in shape.roles for message in _probes(role, content, calls)]
                tail = layout.tail(context, prompt, turn, new_messages)
                whole = layout.text([*earlier, turn, *new_messages])
                same = tail == layout.tail(earlier, earlier_prompt, turn, new_messages)
                if (
                    not same
                    or MARK in tail
                    or EARLIER_ID in tail
                    or not self._encodes_apart(whole.removesuffix(tail), tail)
                ):
                    return Unproven()
        except ChatTemplateError:
            return Unproven()
        except Unproven as reason:
            return reason
        return None

    def _encodes_apart(self, head: str, tail: str) -> bool:
        """Whether the two have the same ids apart and together, the tail's first being the end token."""
        ids = self.encode.whole(tail)
        return (
            ids[0] in self._special_ids
            and ids == self.encode(tail)
            and self.encode.whole(head) + ids == self.encode.whole(head + tail)
        )

    def _check_ids(self) -> None:
        """Some tokenizers (mistral-common's) do not read control tokens back from their own template's text."""
        tools = [dict(PROBE_TOOL)] if False not in self._layouts else None
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(USER)],
                tools=tools,
                add_generation_prompt=True,
                return_dict=False,
                **self._template.options,
            )
        except TypeError:  # a double that only knows text
            return
        if list(ids) != self.encode(self._template([USER], tools)):
            raise ChatTemplateError(
                "The tokenizer's ids of a conversation are not those of the text that its chat template writes: "
                "hand in the model's Hugging Face tokenizer, with a chat template of its own"
            )

    def _find_format(self) -> str:
        layout = self._layout(True)
        context = layout.context(system=False, after_tools=False)
        try:
            text = layout.text([*context, layout.turn([PROBE_CALL], thought=None)], open_turn=False)
        except ChatTemplateError:
            return "hermes"
        call = text[len(layout.text(context, open_turn=False)) :]
        return next((name for name, pattern in CALL_MARKS.items() if re.search(pattern, call)), "hermes")


def _calls_of(answer: Message, new_messages: Sequence[Message]) -> list[Message]:
    """Ids and names of a turn's calls: its own or, where it has none, those that the new messages answer."""
    calls = [{"id": call.get("id"), **(call.get("function") or call)} for call in answer.get("tool_calls") or ()]
    if not calls:
        results = [message for message in new_messages if message["role"] == "tool"]
        calls = [{"id": result.get("tool_call_id"), "name": result.get("name")} for result in results]
    return [{"id": call["id"] or PROBE_ID, "name": call.get("name") or PROBE_NAME} for call in calls]


def _stands_for_result(message: Message) -> bool:
    """Whether a user's message is no request to templates that keep reasoning since the last one (Qwen3)."""
    return message["role"] == "user" and str(message.get("content")).lstrip().startswith("<tool_response>")


def _probes(role: str, content: str, calls: Sequence[Message]) -> list[Message]:
    if role == "tool":
        return [probe_result(content, call_id=call["id"]) for call in calls]
    return [{"role": role, "content": content}]


def _squeezed(text: str) -> str:
    """Without white space: templates write that differently around messages that are not the last (Hermes 3)."""
    return "".join(text.split())
