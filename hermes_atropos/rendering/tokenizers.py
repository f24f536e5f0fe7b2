"""Tokenizers: which one a server's model has, and what every renderer asks of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hermes_atropos.errors import ChatTemplateError, NoTokenizerError
from hermes_atropos.messages import TURN_KEY, Message, Tool

__all__ = ["Vocabulary", "decode", "load_tokenizer", "own_tokenizer", "template_text"]

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


class Vocabulary(dict[int, str | bytes]):
    """What each token of a tokenizer says: its text, or its bytes where it is a part of a character.

    An entry is made when it is first looked up.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str | bytes:
        alone = decode(self._tokenizer, [token])
        if "\ufffd" in alone:
            self[token] = _bytes_of(self._tokenizer, token) or alone
        else:
            # Behind another token, because some decoders drop a space at the start of a text.
            self[token] = decode(self._tokenizer, [token, token])[len(alone) :]
        return self[token]


#: How byte-level BPE writes bytes as characters (``bytes_to_unicode`` of OpenAI's GPT-2): printable ones stand for
#: themselves, the others for those from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


def _bytes_of(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token that is no text on its own; None where the tokenizer writes it in no known way."""
    named = getattr(tokenizer, "convert_ids_to_tokens", None)
    written = named(token) if named else None
    if not isinstance(written, str):
        return None
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", written):  # SentencePiece's fallback
        return bytes.fromhex(byte[1])
    return bytes(map(_BYTES.__getitem__, written)) if _BYTES.keys() >= set(written) else None


def template_text(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    open_turn: bool = True,
    **options: Any,
) -> str:
    """The messages as the tokenizer's chat template writes them; ``open_turn`` adds what opens an assistant turn.

    Raises:
        ChatTemplateError: the tokenizer has no template, or it refuses the messages, for instance because their roles
            don't alternate.
    """
    plain = [{key: value for key, value in message.items() if key != TURN_KEY} for message in messages]
    if tools:  # a template that knows no tools may not even have the argument
        options["tools"] = [dict(tool) for tool in tools]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=open_turn, **options)
    except Exception as error:  # whatever a template raises: jinja2's errors, TypeError, KeyError
        roles = ", ".join(str(message.get("role")) for message in messages[-6:])
        raise ChatTemplateError(f"The chat template refuses messages that end with {roles}: {error}") from error
    return str(text)
