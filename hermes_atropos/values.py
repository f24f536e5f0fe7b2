"""Values: whether they are numbers, what they are in JSON, and how far two of them agree."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

__all__ = ["SURROGATE", "common_length", "is_number", "plain"]

#: Half of a character in UTF-16, which UTF-8 does not hold.
SURROGATE = re.compile("[\ud800-\udfff]")


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a finite number, or a whole one."""
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: mappings with text keys, lists, text, finite numbers, None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # A pair of surrogates is one character once JSON was read; joined now, the first writing equals the second.
        return (
            value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            if SURROGATE.search(value)
            else value
        )
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if {*map(type, value)} <= {int} or ({*map(type, value)} == {float} and all(map(math.isfinite, value))):
            return value  # tokens and logprobs, by the hundred thousand
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return plain(value.tolist())
    return str(value)


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items, tokens or characters for example, two sequences of one type begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
