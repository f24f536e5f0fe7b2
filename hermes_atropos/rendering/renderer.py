"""What is asked of every renderer, and the one for tokenizers without a template to look into."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hermes_atropos.messages import Message, Tool
from hermes_atropos.rendering.tokenizers import Vocabulary, decode, template_text
from hermes_atropos.tokens import BreakCause
from hermes_atropos.toolcalls import ParsedText, parse_text
from hermes_atropos.toolcalls.formats.format import REASONING_TAGS, format_named

__all__ = ["PlainRenderer", "Renderer"]

#: So many of a prompt's last tokens tell whether it opened the reasoning.
OPENING_TOKENS = 16


class Renderer(ABC):
    """What a model's chat template says about token ids.

    Attributes:
        tokenizer: the model's.
        tool_format: the format in which its answers are read: the name of one of ``toolcalls.FORMATS``.
        stop_token_ids: ids that end an assistant's turn.
        reasoning_tags: what opens reasoning and what closes it.
    """

    tokenizer: Any
    tool_format: str
    stop_token_ids: frozenset[int]
    reasoning_tags: tuple[str, str] = REASONING_TAGS

    @abstractmethod
    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """The whole conversation, then what opens an assistant turn: ``[prompt_len] int``.

        As in ``tokenizer.apply_chat_template``, the text of a special token in a message becomes that token.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """

    @abstractmethod
    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | BreakCause:
        """What to append to ``prompt + turn_ids``, so that the next assistant turn can begin.

        Args:
            history: the messages before the new ones; the last is the assistant turn that was sampled.
            turn_ids: ``[output_len] int``, that turn as it was sampled. Where its end token is missing, because it
                was truncated, the bridge begins with it.
            new_messages: what came after that turn.
            tools: the tools that the conversation's prompts were rendered with.

        Returns:
            ``[extension_len] int``. Where it can't be proven that the template would only append: ``TEMPLATE`` if it
            changes what stands before the new messages, else ``UNPROVABLE``. The time that it takes depends on
            ``turn_ids`` and ``new_messages`` alone.
        """

    def parse(self, output_ids: Sequence[int], tools: Sequence[Tool] | None, prompt_ids: Sequence[int]) -> ParsedText:
        """Content, reasoning and tool calls of a sampled turn.

        Args:
            output_ids: ``[output_len] int``, as sampled.
            tools: the tools that were offered.
            prompt_ids: what they were sampled after; its end tells whether the prompt opened the reasoning.
        """
        end = len(output_ids)
        while end and output_ids[end - 1] in self.stop_token_ids:
            end -= 1
        prompt = self.decode(prompt_ids[-OPENING_TOKENS:])
        return parse_text(
            self.decode(output_ids[:end]),
            format=self.tool_format,
            thinking_open=prompt.rstrip().endswith(self.reasoning_tags[0]),
            tools=tools,
            reasoning_tags=self.reasoning_tags,
        )

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token says."""
        return Vocabulary(self.tokenizer)

    @functools.cached_property
    def vocab_size(self) -> int | None:
        """One more than the tokenizer's largest id; None if it can't tell."""
        known = hasattr(self.tokenizer, "get_vocab") and hasattr(self.tokenizer, "__len__")
        return max(self.tokenizer.get_vocab().values()) + 1 if known else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return decode(self.tokenizer, ids)


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
