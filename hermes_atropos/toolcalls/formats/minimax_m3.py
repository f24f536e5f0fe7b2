"""MiniMax-M3, whose tags a special token precedes; objects and lists are tags within tags.

::

    ]<]minimax[>[<tool_call>
    ]<]minimax[>[<invoke name="f">]<]minimax[>[<x>1]<]minimax[>[</x>]<]minimax[>[</invoke>
    ]<]minimax[>[</tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hermes_atropos.toolcalls.call import ParseStatus, failed_call, named_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, is_mentioned, register
from hermes_atropos.toolcalls.formats.json_block import block_end
from hermes_atropos.toolcalls.formats.pairs import resolved, typed, types_of
from hermes_atropos.toolcalls.strict_json import MAX_DEPTH

MARK = "]<]minimax[>["
TAG = re.compile(re.escape(MARK) + r"<(?P<close>/?)(?P<key>[^<>\n]*)>")
END = block_end(f"{MARK}</invoke>", f"{MARK}<invoke ", f"{MARK}</tool_call>")


class Element(NamedTuple):
    """A value that has begun: its key, its schema, and the values within it that have ended."""

    key: str
    schema: Any
    inner: list[tuple[str, Any]]


def read(scan: Scan, opening: re.Match[str]) -> Read:
    text, name, position, fault = scan.text, opening["name"], opening.end(), None
    parameters = scan.functions.get(name, {}).get("parameters")
    opened = [Element("invoke", resolved(parameters, parameters), [])]
    for tag in TAG.finditer(text, position):
        element, key, said = opened[-1], tag["key"], text[position : tag.start()]
        position = tag.start()
        closing = f"The value of {element.key[:80]!r} is not closed by {MARK}</{element.key[:80]}>"
        if tag["close"] and key != element.key:
            fault = f"{closing}."
        elif not tag["close"] and (said.strip() or key.startswith("invoke ") or len(opened) > MAX_DEPTH):
            fault = f"{closing} where that of {key[:80]!r} begins."
        elif tag["close"] and said.strip() and (element.inner or len(opened) == 1):
            fault = f"Beside the values in {key[:80]!r} there is {said.strip()[:80]!r}."
        if fault:
            break
        position = tag.end()
        if not tag["close"]:
            opened.append(Element(key, _schema_of(element, key, parameters), []))
            continue
        opened.pop()
        if not opened:
            return [named_call(name, dict(element.inner), **scan.fields(opening.start(), position))], position
        opened[-1].inner.append((key, _value(element, said, parameters)))
    closed, stop = END.find(scan, position)
    if not opened[0].inner and len(opened) == 1 and is_mentioned(scan, *opening.span(), closed=closed):
        return [], opening.end()
    status = ParseStatus.MALFORMED if closed else ParseStatus.UNCLOSED_BLOCK
    error = fault if fault and closed else f"The call is not closed: {END.tag} is missing."
    return [failed_call(status, error, name=name.strip(), **scan.fields(opening.start(), stop))], stop


def _schema_of(element: Element, key: str, root: Any) -> Any:
    schema = element.schema if isinstance(element.schema, Mapping) else {}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return resolved(properties[key], root)
    return resolved(schema.get("items"), root) if key == "item" else None


def _value(element: Element, text: str, root: Any) -> Any:
    types = types_of(element.schema, root)
    if not element.inner:
        empty: Any = [] if types == {"array"} else {} if types == {"object"} else text
        return typed(text, types) if text.strip() else empty
    if {key for key, _ in element.inner} == {"item"} and types != {"object"}:
        return [value for _, value in element.inner]
    return dict(element.inner)


register(
    Format(
        name="minimax_m3",
        parse=Blocks(
            re.escape(MARK) + r'<invoke name="(?P<name>[^"<>\n]*)">', read, wrapper=re.escape(MARK) + "</?tool_call>"
        ).parse,
        mark=re.escape(MARK),
        json_arguments=False,
    )
)
