"""Rendering for tokenizers without a template to look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_atropos.errors import ChatTemplateError
from hermes_atropos.messages import TURN_KEY, Message, Tool
from hermes_atropos.toolcalls import ParsedText, parse_text

__all__ = ["PlainRenderer", "template_text"]


class PlainRenderer:
    """For a tokenizer that has no template to look into: only ``encode``, ``decode`` and ``apply_chat_template``.

    What closes a turn, and what follows it, is read off a conversation that the template renders.
    """

    def __init__(self, tokenizer: Any, tool_format: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.tool_format = "hermes" if tool_format == "auto" else tool_format
        end = getattr(tokenizer, "eos_token_id", None)
        self.stop_token_ids: frozenset[int] = frozenset() if end is None else frozenset({int(end)})

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        return list(self.tokenizer.encode(template_text(self.tokenizer, messages, tools)))

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | None:
        answer = "the-answer-that-was-sampled"
        before = [*history[:-1], {"role": "assistant", "content": answer}]
        text = template_text(self.tokenizer, [*before, *new_messages], tools)
        start, found, appended = text.partition(answer)
        if not (new_messages and found and start == template_text(self.tokenizer, history[:-1], tools)):
            return None
        ids = list(self.tokenizer.encode(appended, add_special_tokens=False))
        closed = bool(ids and turn_ids) and ids[0] == turn_ids[-1] and ids[0] in self.stop_token_ids
        return ids[1:] if closed else ids

    def parse(
        self,
        output_ids: Sequence[int],
        tools: Sequence[Tool] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedText:
        text = str(self.tokenizer.decode(list(output_ids), skip_special_tokens=True))
        return parse_text(text, format=self.tool_format)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def template_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] | None = None, open_turn: bool = True
) -> str:
    """The messages as the tokenizer's chat template writes them.

    Raises:
        ChatTemplateError: it has none, or it refuses the messages.
    """
    plain = [{key: value for key, value in message.items() if key != TURN_KEY} for message in messages]
    # A template that knows no tools may not even have the argument.
    given = {"tools": list(tools)} if tools else {}
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=open_turn, **given))
    except Exception as error:
        raise ChatTemplateError(f"the tokenizer's chat template can't render the messages: {error}") from error
