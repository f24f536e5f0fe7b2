"""Tokenizers: which one a server's model has, and what every renderer asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from hermes_atropos.errors import ChatTemplateError, NoTokenizerError
from hermes_atropos.messages import TURN_KEY, Message, Tool

__all__ = ["decode", "load_tokenizer", "own_tokenizer", "template_text", "vocab_size"]

#: From so many characters or tokens on, the batch methods of the tokenizers library are used: they give up the
#: interpreter lock, which for a shorter text takes longer to get back than the work takes.
LONG = 4096


def load_tokenizer(name: str) -> Any:
    """The Hugging Face tokenizer of that name or path.

    Raises:
        NoTokenizerError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise NoTokenizerError(
            f"no tokenizer could be loaded for {name!r} ({cause}): pass tokenizer=, a Hugging Face tokenizer or the "
            "name or path of one"
        ) from error


def own_tokenizer(server: Any) -> Any:
    """The tokenizer that a server has, or names in its configuration.

    Raises:
        NoTokenizerError: it has none and names none, or the named one can't be loaded.
    """
    tokenizer = getattr(server, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer
    config = getattr(server, "config", None)
    names = [getattr(config, name, None) for name in ("tokenizer_name", "model_name")]
    named = next((name for name in names if name not in (None, "none", "default")), None)
    if named is None:
        raise NoTokenizerError(f"{type(server).__name__} has no tokenizer and names none: pass tokenizer=")
    return load_tokenizer(named)


_VOCAB_SIZES: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def vocab_size(tokenizer: Any) -> int | None:
    """One more than the tokenizer's largest id; None if it can't tell."""
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "__len__")):
        return None
    if tokenizer not in _VOCAB_SIZES:
        _VOCAB_SIZES[tokenizer] = max(tokenizer.get_vocab().values()) + 1
    return _VOCAB_SIZES[tokenizer]


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids, without the "clean up" of spaces.

    A fast tokenizer's backend is asked directly: the code of ``transformers`` around it looks at each id in Python,
    which takes longer than the decoding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # Only transformers' own tokenizers have the option.
        clean_up = getattr(tokenizer, "clean_up_tokenization_spaces", None)
        options = {} if clean_up is None else {"clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, **options))
    if len(ids) < LONG:
        return str(backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
    return str(backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])


def template_text(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    open_turn: bool = True,
    **options: Any,
) -> str:
    """The messages as the tokenizer's chat template writes them; ``open_turn`` adds what opens an assistant turn.

    Raises:
        ChatTemplateError: the tokenizer has no template, or it refuses the messages.
    """
    plain = [dict(message) for message in messages]
    for message in plain:
        message.pop(TURN_KEY, None)
    if tools:  # a template that knows no tools may not even have the argument
        options["tools"] = [dict(tool) for tool in tools]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=open_turn, **options)
    except Exception as error:  # whatever a template raises: jinja2's errors, TypeError, KeyError
        roles = ", ".join(str(message.get("role")) for message in messages[-6:])
        raise ChatTemplateError(f"The chat template refuses messages that end with {roles}: {error}") from error
    return str(text)
