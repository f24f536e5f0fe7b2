"""A renderer for any Hugging Face chat template, which proves of each kind of turn that the template only appends."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hermes_atropos.errors import ChatTemplateError
from hermes_atropos.messages import Message, Tool, call_function
from hermes_atropos.rendering.dialect import (
    LATER_USER,
    PROBE_ID,
    PROBE_NAME,
    PROBE_TOOL,
    USER,
    ChatTemplate,
    probe_result,
    with_named_ids,
)
from hermes_atropos.rendering.encoder import ChunkEncoder
from hermes_atropos.rendering.layout import (
    EARLIER,
    EARLIER_CALLS,
    EARLIER_ID,
    MARK,
    OTHER_CALL,
    PROBE_CALL,
    THOUGHT,
    Layout,
)
from hermes_atropos.rendering.renderer import Renderer
from hermes_atropos.tokens import BreakCause

__all__ = ["TemplateRenderer"]

#: What new messages may hold: leading and trailing white space, nothing, markup, many bytes a character.
PROBE_CONTENTS = ("plain", "  \n spaces around \n\n", "", '{"a": [1, null]}\n', "naïve 🙂 <b>&amp;</b>\r\n")

#: Tokens that end a turn by another name than the template's, where the tokenizer has them.
OTHER_ENDS = ("<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


class Shape(NamedTuple):
    """What decides how a template goes on after a turn; a verdict holds for one shape."""

    tools: bool
    system: bool
    after_tools: bool
    thought: bool
    calls: bool
    roles: tuple[str, ...]


class TemplateRenderer(Renderer):
    """Renders with the tokenizer's own ``apply_chat_template``, and bridges where that is proven to be the same.

    ``render`` gives the ids of ``tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)``.
    What the template does not know is put into its terms first (see ``Dialect``): tools into the system prompt, tool
    results and the system prompt into user messages, JSON arguments into objects.

    ``bridge`` renders a short synthetic conversation (a probe, a probe's answer, the new messages) and takes what
    stands after the answer's end token. It returns ids only if all of this holds:

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
        ChatTemplateError: the template can't render a user's message, or writes calls in a format that is not read.
    """

    def __init__(self, tokenizer: Any, *, tool_format: str = "auto", options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.encode = ChunkEncoder(tokenizer)
        template = ChatTemplate(tokenizer, options or {})
        names = sorted(self.encode.special, key=len, reverse=True)
        special = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
        self._template = template
        eos = getattr(tokenizer, "eos_token", None)
        self._layouts: dict[bool, Layout] = {}
        for with_tools in (False, True):
            try:
                self._layouts[with_tools] = Layout(template, special, eos, tool_format, with_tools=with_tools)
            except ChatTemplateError as error:  # a template for conversations with tools alone
                if with_tools and not self._layouts:
                    raise ChatTemplateError(
                        f"{error}: if it needs an argument, pass that in chat_template_kwargs=; else set "
                        "tokenizer.chat_template to one that renders a conversation"
                    ) from error
        self._check_ids()
        #: Why bridges of a shape are not proven; None where they are.
        self._verdicts: dict[Shape, BreakCause | None] = {}
        layout = self._layout(True)
        self.tool_format = layout.call_format() if tool_format == "auto" else tool_format
        self.reasoning_tags = layout.reasoning_tags
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
        dialect = self._layout(tools).dialect
        plain, tools = dialect.prepare(messages, tools)
        return (with_named_ids(plain) if dialect.named_ids else plain), tools

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | BreakCause:
        roles = tuple(role for role, _ in itertools.groupby(message["role"] for message in new_messages))
        before = [message["role"] for message in history[-2:]]
        unsampled = [message for message in new_messages if message["role"] == "assistant"]
        if before not in (["user", "assistant"], ["tool", "assistant"]) or any(m.get("tool_calls") for m in unsampled):
            return BreakCause.UNPROVABLE
        layout = self._layout(tools)
        if layout.dialect.reasoning and any(_stands_for_result(message) for message in (*history[:2], history[-2])):
            return BreakCause.UNPROVABLE
        system, after_tools = history[0]["role"] in ("system", "developer"), before[0] == "tool"
        context, prompt = layout.start(system=system, after_tools=after_tools)
        shape = Shape(
            tools=bool(tools),
            system=system,
            after_tools=after_tools,
            thought=prompt.rstrip().endswith(layout.reasoning_tags[0]) or layout.shows_reasoning(self.decode(turn_ids)),
            calls=bool(history[-1].get("tool_calls")) or "tool" in roles,
            roles=roles,
        )
        if shape not in self._verdicts:
            self._verdicts[shape] = self._try(shape)
        if cause := self._verdicts[shape]:
            return cause
        calls = _calls_of(history[-1], new_messages)
        if len(calls) > 1 and not layout.dialect.several_calls:
            return BreakCause.UNPROVABLE
        turn = layout.turn(calls, thought=THOUGHT if shape.thought else None)
        cut = layout.cut(context, prompt, turn, new_messages)
        return cut if isinstance(cut, BreakCause) else self._after(turn_ids, self.encode(cut[1]))

    def _layout(self, tools: Any) -> Layout:
        try:
            return self._layouts[bool(tools)]
        except KeyError:
            raise ChatTemplateError(
                f"The chat template refuses conversations with{'' if tools else 'out'} tools"
            ) from None

    def _after(self, turn_ids: Sequence[int], tail: list[int]) -> list[int] | BreakCause:
        """The ids of a tail after a turn: without the end token where the model sampled it."""
        ends = [place for place, token in enumerate(turn_ids) if token in self.stop_token_ids]
        if tail[0] not in self.stop_token_ids:
            return BreakCause.UNPROVABLE
        if ends == [len(turn_ids) - 1] and turn_ids[-1] == tail[0]:
            return tail[1:]
        # Another special token at the end may have ended the turn too.
        if ends or (turn_ids and turn_ids[-1] in self._special_ids):
            return BreakCause.UNPROVABLE
        return tail

    def _try(self, shape: Shape) -> BreakCause | None:
        """Why a long conversation does not go on after such a turn as the shortest does; None if it does, in text and
        in tokens."""
        layout = self._layout(shape.tools)
        context, prompt = layout.start(system=shape.system, after_tools=shape.after_tools)
        opening = context[: 1 + shape.system]
        earlier = [*opening, *layout.step(EARLIER_CALLS[1:3]), layout.turn([], EARLIER), LATER_USER]
        if shape.after_tools:
            earlier += [*layout.step(EARLIER_CALLS[3:]), *layout.step(EARLIER_CALLS[:1])]
        try:
            earlier_prompt = layout.text(earlier)
            for number, content in enumerate(PROBE_CONTENTS):
                calls = [PROBE_CALL, OTHER_CALL][: 1 + number % 2] if shape.calls else []
                text = "atropos-probe-text" if calls and number % 2 else ""
                turn = layout.turn(calls, thought=THOUGHT if shape.thought else None, text=text)
                new_messages = [message for role in shape.roles for message in _probes(role, content, calls)]
                short = layout.cut(context, prompt, turn, new_messages)
                long = layout.cut(earlier, earlier_prompt, turn, new_messages)
                if isinstance(short, BreakCause):
                    return short
                if isinstance(long, BreakCause):
                    return long
                (_, tail), (before, same) = short, long
                if tail != same or MARK in tail or EARLIER_ID in tail or not self._encodes_apart(before, tail):
                    return BreakCause.UNPROVABLE
        except ChatTemplateError:
            return BreakCause.UNPROVABLE
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
            ids = self.tokenizer.apply_chat_template(
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


def _calls_of(answer: Message, new_messages: Sequence[Message]) -> list[Message]:
    """Ids and names of a turn's calls: its own or, where it has none, those that the new messages answer."""
    calls = [{"id": call.get("id"), **call_function(call)} for call in answer.get("tool_calls") or ()]
    if not calls:
        results = [message for message in new_messages if message["role"] == "tool"]
        calls = [{"id": result.get("tool_call_id"), "name": result.get("name")} for result in results]
    return [{"id": call["id"] or PROBE_ID, "name": call.get("name") or PROBE_NAME} for call in calls]


def _stands_for_result(message: Message) -> bool:
    """Whether templates that keep the reasoning since the last request (Qwen3) take a user's message for a result."""
    return message["role"] == "user" and str(message.get("content")).lstrip().startswith("<tool_response>")


def _probes(role: str, content: str, calls: Sequence[Message]) -> list[Message]:
    if role == "tool":
        return [probe_result(content, call_id=call["id"]) for call in calls]
    return [{"role": role, "content": content}]
