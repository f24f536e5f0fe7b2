"""What changed between two JSON values, so that a file can hold a value that grows at the cost of what is new.

A change is a list, itself JSON:

    ["=", value]                        another value in its place
    ["+", more]                         a text or a list that grew
    ["[", {place: change}, more]        a list whose items changed, and that grew
    ["{", {key: change}, [key, …]]      an object whose values changed, and the keys that are gone
"""

from __future__ import annotations

from typing import Any

__all__ = ["apply", "difference"]

Change = list[Any]


def difference(old: Any, new: Any) -> Change | None:
    """What makes ``new`` of ``old``; None where they are equal."""
    if type(old) is type(new):
        if old == new:
            return None
        if isinstance(new, str) and new.startswith(old):
            return ["+", new[len(old) :]]
        if isinstance(new, list) and len(new) >= len(old):
            if new[: len(old)] == old:
                return ["+", new[len(old) :]]
            items = {str(place): difference(*pair) for place, pair in enumerate(zip(old, new, strict=False))}
            return ["[", {place: item for place, item in items.items() if item is not None}, new[len(old) :]]
        if isinstance(new, dict):
            values = {key: difference(old[key], value) if key in old else ["=", value] for key, value in new.items()}
            gone = [key for key in old if key not in new]
            return ["{", {key: value for key, value in values.items() if value is not None}, gone]
    return ["=", new]


def apply(old: Any, change: Change) -> Any:
    """``old`` with a change, in place where that can be.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the change is not one of this value.
    """
    match change:
        case ["=", value]:
            return value
        case ["+", str() as more]:
            return old + more
        case ["+", list() as more]:
            old.extend(more)
        case ["[", dict() as items, list() as more]:
            for place, item in items.items():
                old[int(place)] = apply(old[int(place)], item)
            old.extend(more)
        case ["{", dict() as values, list() as gone]:
            for key in gone:
                del old[key]
            for key, value in values.items():
                old[key] = apply(old.get(key), value)
        case _:
            raise ValueError(f"{str(change)[:80]} is not a change")
    return old
