"""Rendering for tokenizers without a template to look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_atropos.messages import Message, Tool
from hermes_atropos.rendering.renderer import Renderer
from hermes_atropos.rendering.tokenizers import template_text
from hermes_atropos.tokens import BreakCause
from hermes_atropos.toolcalls.formats import format_named

__all__ = ["PlainRenderer"]


class PlainRenderer(Renderer):
    """For a tokenizer that has no template to look into: only ``encode``, ``decode`` and ``apply_chat_template``.

    What closes a turn, and what follows it, is read off a conversation that the template renders.
    """

    def __init__(self, tokenizer: Any, tool_format: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.tool_format = "hermes" if tool_format == "auto" else format_named(tool_format).name
        end = getattr(tokenizer, "eos_token_id", None)
        self.stop_token_ids = frozenset() if end is None else frozenset({int(end)})

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        return list(self.tokenizer.encode(template_text(self.tokenizer, messages, tools)))

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | BreakCause:
        answer = "the-answer-that-was-sampled"
        before = [*history[:-1], {"role": "assistant", "content": answer}]
        text = template_text(self.tokenizer, [*before, *new_messages], tools)
        start, found, appended = text.partition(answer)
        if not (new_messages and found and start == template_text(self.tokenizer, history[:-1], tools)):
            return BreakCause.UNPROVABLE
        ids = list(self.tokenizer.encode(appended, add_special_tokens=False))
        closed = bool(ids and turn_ids) and ids[0] == turn_ids[-1] and ids[0] in self.stop_token_ids
        return ids[1:] if closed else ids
