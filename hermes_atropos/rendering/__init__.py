"""Messages to token ids and back, exactly as the model's own chat template has them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from hermes_atropos.errors import ChatTemplateError, NoTokenizerError
from hermes_atropos.rendering.bridge import TemplateRenderer
from hermes_atropos.rendering.library import library_renderer
from hermes_atropos.rendering.renderer import Renderer
from hermes_atropos.toolcalls.formats import format_named

__all__ = ["Renderer", "TemplateRenderer", "renderer_for"]

REMEMBERED_RENDERERS = 16
# A renderer holds its tokenizer, so that no other can get its id while it is remembered.
_renderers: OrderedDict[tuple[Any, ...], Renderer] = OrderedDict()
_lock = threading.Lock()


def renderer_for(tokenizer: Any, *, tool_format: str = "auto", **options: Any) -> Renderer:
    """The renderer of a tokenizer's chat template; the same one each time, as long as neither changes.

    The ``renderers`` library where it knows the model and renders as this template does, else ``TemplateRenderer``.

    Args:
        tokenizer: a Hugging Face tokenizer, or one with its ``apply_chat_template``, ``encode`` and ``decode``.
        tool_format: one of ``toolcalls.FORMATS``, or the name of vLLM's parser; ``auto`` takes what the template
            writes.
        options: further arguments of the template, such as ``enable_thinking=False``.

    Raises:
        NoTokenizerError: ``tokenizer`` is None or has no such methods.
        ChatTemplateError: it has no chat template, or one that can't render a conversation, or writes tool calls in a
            format that is not read.
        ConfigurationError: there is no such tool format.
    """
    if tokenizer is None or not all(hasattr(tokenizer, name) for name in ("apply_chat_template", "encode", "decode")):
        name = type(tokenizer).__name__
        raise NoTokenizerError(f"{name} is not a tokenizer: hand in a Hugging Face tokenizer of the served model")
    if tool_format != "auto":
        tool_format = format_named(tool_format).name
    key = (id(tokenizer), repr(getattr(tokenizer, "chat_template", None)), tool_format, repr(sorted(options.items())))
    with _lock:
        if key not in _renderers:
            _renderers[key] = _make(tokenizer, tool_format, options)
            if len(_renderers) > REMEMBERED_RENDERERS:
                _renderers.popitem(last=False)
        return _renderers[key]


def _make(tokenizer: Any, tool_format: str, options: dict[str, Any]) -> Renderer:
    template = None
    if getattr(tokenizer, "chat_template", None):
        template = TemplateRenderer(tokenizer, tool_format=tool_format, options=options)
    if template is None or tool_format == "auto":
        library = library_renderer(tokenizer, template, options)
        if library is not None:
            return library
    if template is None:
        raise ChatTemplateError("The tokenizer has no chat template: set tokenizer.chat_template to the model's own")
    return template
