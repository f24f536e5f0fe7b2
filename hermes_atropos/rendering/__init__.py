"""Messages to token ids and back, exactly as the model's own chat template has them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hermes_atropos.errors import ChatTemplateError, ConfigurationError, NoTokenizerError
from hermes_atropos.rendering.bridge import TemplateRenderer
from hermes_atropos.toolcalls import FORMATS, ParsedText

__all__ = ["Message", "Renderer", "TemplateRenderer", "Tool", "renderer_for"]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

REMEMBERED_RENDERERS = 16
# A renderer holds its tokenizer, so that no other can get its id while it is remembered.
_renderers: OrderedDict[tuple[Any, ...], tuple[Any, Renderer]] = OrderedDict()
_lock = threading.Lock()


class Renderer(Protocol):
    """What a model's chat template says about token ids."""

    #: Ids that end an assistant's turn.
    stop_token_ids: frozenset[int]

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """The whole conversation, then what opens an assistant turn: ``[prompt_len] int``.

        As in ``tokenizer.apply_chat_template``, the text of a special token in a message becomes that token.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        ...

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | None:
        """What to append to ``prompt + turn_ids``, so that the next assistant turn can begin.

        Args:
            history: the messages before the new ones; the last is the assistant turn that was sampled.
            turn_ids: ``[output_len] int``, that turn as it was sampled. Where its end token is missing, because it
                was truncated, the bridge begins with it.
            new_messages: what came after that turn.
            tools: the tools that the conversation's prompts were rendered with.

        Returns:
            ``[extension_len] int``, or None where it can't be proven that the template would only append.
            The cost depends on ``turn_ids`` and ``new_messages`` alone.
        """
        ...

    def parse(
        self,
        output_ids: Sequence[int],
        tools: Sequence[Tool] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedText:
        """Content, reasoning and tool calls of a sampled turn.

        Args:
            output_ids: ``[output_len] int``, as sampled.
            tools: the tools that were offered.
            prompt_ids: what they were sampled after; its end tells whether the prompt opened the reasoning. Without it,
                what the template does after a user message is taken for granted.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...


def renderer_for(tokenizer: Any, *, tool_format: str = "auto", **options: Any) -> Renderer:
    """The renderer of a tokenizer's chat template; the same one each time, as long as neither changes.

    The ``renderers`` library where it knows the model and renders as this template does, else ``TemplateRenderer``.

    Args:
        tokenizer: a Hugging Face tokenizer, or one with its ``apply_chat_template``, ``encode`` and ``decode``.
        tool_format: one of ``toolcalls.FORMATS``; ``auto`` takes what the template writes.
        options: further arguments of the template, such as ``enable_thinking=False``.

    Raises:
        NoTokenizerError: ``tokenizer`` is None or has no such methods.
        ChatTemplateError: it has no chat template, or one that can't render a conversation.
        ConfigurationError: there is no such tool format.
    """
    if tokenizer is None or not all(hasattr(tokenizer, name) for name in ("apply_chat_template", "encode", "decode")):
        raise NoTokenizerError(
            f"{type(tokenizer).__name__} is no tokenizer: hand in a Hugging Face tokenizer of the model that is served"
        )
    if tool_format != "auto" and tool_format not in FORMATS:
        raise ConfigurationError(f"Unknown tool format {tool_format!r}: take auto or one of {', '.join(FORMATS)}")
    key = (id(tokenizer), repr(getattr(tokenizer, "chat_template", None)), tool_format, repr(sorted(options.items())))
    with _lock:
        if key not in _renderers:
            _renderers[key] = (tokenizer, _make(tokenizer, tool_format, options))
            if len(_renderers) > REMEMBERED_RENDERERS:
                _renderers.popitem(last=False)
        return _renderers[key][1]


def _make(tokenizer: Any, tool_format: str, options: dict[str, Any]) -> Renderer:
    from hermes_atropos.rendering.library import library_renderer

    template = None
    if getattr(tokenizer, "chat_template", None):
        template = TemplateRenderer(tokenizer, tool_format=tool_format, options=options)
    if template is None or template.tool_format == template.written_format:
        library = library_renderer(tokenizer, template, options)
        if library is not None:
            return library
    if template is None:
        raise ChatTemplateError("The tokenizer has no chat template: set tokenizer.chat_template to the model's own")
    return template
