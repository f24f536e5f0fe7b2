"""JSON that can be written again, with errors that a model can act on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["MAX_DEPTH", "BrokenJSON", "loads", "type_name", "value_at"]

#: Far beyond what a tool takes, and below where Python's and pydantic's own recursion limits begin.
MAX_DEPTH = 128

TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


class BrokenJSON(ValueError):
    """Text that is not JSON: line, column, what was expected there and what was found.

    Attributes:
        position: where in the text; everything before it was read as JSON.
        truncated: the text ends before the value does.
    """

    def __init__(self, message: str, *, position: int = 0, truncated: bool = False) -> None:
        super().__init__(message)
        self.position = position
        self.truncated = truncated


def _refuse(constant: str) -> Any:
    raise BrokenJSON(f"{constant} is not a JSON value")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise BrokenJSON(f"the number {number:.40} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
_SPACE = re.compile(r"[ \t\n\r]*+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Python's words for what it met, turned into what should have been there.
_EXPECTED = {
    "Expecting value": "expected a value",
    "Expecting property name enclosed in double quotes": "expected a property name in double quotes",
    "Illegal trailing comma before end of object": "expected no comma before the closing brace",
    "Illegal trailing comma before end of array": "expected no comma before the closing bracket",
    "Expecting ':' delimiter": "expected ':'",
    "Expecting ',' delimiter": "expected ',' or the closing bracket",
    "Unterminated string starting at": "expected a closing quote for the string that starts here",
    "Invalid control character at": "expected control characters to be escaped, a newline as \\n",
    "Invalid \\escape": 'expected one of the escapes \\" \\\\ \\/ \\b \\f \\n \\r \\t \\u',
    "Invalid \\uXXXX escape": "expected four hexadecimal digits after \\u",
    "Extra data": "expected nothing after the JSON",
}


def loads(text: str) -> Any:
    """The value of a JSON text; white space around it is allowed.

    Stricter than ``json.loads``: NaN, infinite numbers, half surrogate pairs and more than ``MAX_DEPTH`` levels are
    refused, because what was read is written again, and shown to libraries that refuse them later.

    Raises:
        BrokenJSON: with the first fault.
    """
    text = text.strip()
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _broken(error, text, 0) from None
    except (ValueError, RecursionError) as error:
        raise _refused(error, 0) from None
    _check(value, text, len(text))
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, after white space, and the place behind it.

    The text is read in growing windows: an error of Python's decoder costs a pass over all that it was given, so that
    many broken values in one long text would take quadratic time.

    Raises:
        BrokenJSON: there is no valid JSON value.
    """
    space = _SPACE.match(text, start)
    start = space.end() if space else start
    size = 4096
    while True:
        window = text[start : start + size]
        try:
            value, end = _DECODER.raw_decode(window)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(window) - 16
            if cut and start + size < len(text):
                size *= 4
                continue
            raise _broken(error, window, start) from None
        except (ValueError, RecursionError) as error:
            raise _refused(error, start) from None
        _check(value, window[:end], start + end)
        return value, start + end


def _broken(error: json.JSONDecodeError, text: str, start: int) -> BrokenJSON:
    message = error.msg.partition(": ")[0]
    expected = _EXPECTED.get(message, message[:1].lower() + message[1:])
    found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end"
    return BrokenJSON(
        f"line {error.lineno}, column {error.colno}: {expected}, found {found}",
        position=start + error.pos,
        truncated=error.pos >= len(text) or message.startswith("Unterminated string"),
    )


def _refused(error: Exception, start: int) -> BrokenJSON:
    if isinstance(error, BrokenJSON):
        return BrokenJSON(str(error), position=start)
    return BrokenJSON(TOO_DEEP if isinstance(error, RecursionError) else "a number has too many digits", position=start)


def _check(value: Any, text: str, end: int) -> None:
    if text.count("{") + text.count("[") > MAX_DEPTH:
        level, depth = [value], 0
        while level := [child for item in level for child in _children(item)]:
            depth += 1
            if depth > MAX_DEPTH:
                raise BrokenJSON(TOO_DEEP, position=end)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "it holds half of a surrogate pair, like \\ud83d without its second half"
            raise BrokenJSON(message, position=end) from None


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def type_name(value: Any) -> str:
    """``an object``, ``an array`` … for sentences about a value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
