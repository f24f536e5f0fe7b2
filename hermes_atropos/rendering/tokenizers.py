"""Tokenizers: which one a server's model has, and what is asked of any."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from hermes_atropos.errors import NoTokenizerError

__all__ = ["decode", "load_tokenizer", "own_tokenizer", "vocab_size"]


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
        NoTokenizerError: neither, or it can't be loaded.
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
    """One more than the tokenizer's largest id; None where it doesn't tell."""
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "__len__")):
        return None
    if tokenizer not in _VOCAB_SIZES:
        _VOCAB_SIZES[tokenizer] = max(tokenizer.get_vocab().values()) + 1
    return _VOCAB_SIZES[tokenizer]


def decode(tokenizer: Any, ids: list[int], *, skip_special_tokens: bool = False) -> str:
    """The ids' text; past the wrapper of a fast Hugging Face tokenizer, which is slower and may "clean up" spaces."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return str(inner.decode(ids, skip_special_tokens=skip_special_tokens))
