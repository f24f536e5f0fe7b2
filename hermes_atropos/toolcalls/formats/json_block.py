"""Blocks that hold JSON: a whole call, or the arguments of one whose name is known; and blocks that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from hermes_atropos.toolcalls.call import ParseStatus, ToolCall, failed_call, named_call, object_call
from hermes_atropos.toolcalls.formats.format import Read, Scan, is_mentioned
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads, value_at

__all__ = ["BlockEnd", "block_end", "broken_json", "json_reader", "read_json", "wrong_opening"]

#: How the JSON of a call may begin.
JSON = re.compile(r'\s*+(?:[{\["]|\Z)')

#: The tool that a broken call most likely meant, so that the answer can show its schema.
NAME = re.compile(r'"name"\s*:\s*"([\w.:-]{1,128})"')


class BlockEnd(NamedTuple):
    """How a block ends.

    Attributes:
        tag: what closes it.
        pattern: the tag (group ``close``), or what shows that it is missing.
        optional: a complete call may also be followed by nothing or by another, because the tag is a stop token.
    """

    tag: str
    pattern: re.Pattern[str]
    optional: bool = False

    def find(self, scan: Scan, position: int) -> tuple[bool, int]:
        """Whether a block that goes on at ``position`` is closed, and the place behind it."""
        tag = scan.search(self.pattern, position)
        if tag is None:
            return False, len(scan.text)
        return (True, tag.end()) if tag["close"] else (False, tag.start())


def block_end(tag: str, *others: str, optional: bool = False) -> BlockEnd:
    """The end of a block that ``tag`` closes; ``others`` show that it is missing."""
    pattern = "|".join([f"(?P<close>{re.escape(tag)})", *map(re.escape, others)])
    return BlockEnd(tag, re.compile(pattern), optional)


def json_reader(end: BlockEnd, *, expected: str = "", **options: Any) -> Callable[[Scan, re.Match[str]], Read]:
    """Reads blocks whose JSON follows the opening: the arguments where that has a group ``name``, else the calls.

    A group ``id`` is the model's own. ``expected`` says what must follow an opening in which ``name`` matched nothing;
    ``options`` are for ``read_json``.
    """

    def read(scan: Scan, opening: re.Match[str]) -> Read:
        head = opening.groupdict()
        name = head.get("name")
        if expected and name is None:
            return wrong_opening(scan, opening, end, expected)
        return read_json(scan, opening.start(), opening.end(), end, name, sampled_id=head.get("id"), **options)

    return read


def read_json(
    scan: Scan,
    start: int,
    body: int,
    end: BlockEnd,
    name: str | None = None,
    *,
    listed: bool = False,
    call: Callable[..., ToolCall] = object_call,
    **known: Any,
) -> Read:
    """A block from ``start`` to ``end`` with JSON at ``body``: the arguments where the name is known, else a call.

    Where the name is not known, ``listed`` says that it may be a list of calls, and ``call`` makes a call of each.
    """
    text, broken, value = scan.text, None, None
    if name is not None:
        call = partial(named_call, name)
    try:
        value, behind = value_at(text, body)
    except BrokenJSON as error:
        broken, behind = error, body
    tag = scan.search(end.pattern, behind)
    if broken and tag and tag["close"] is None and tag.start() < broken.position:
        # The beginning of another call within a string of this one is data: it must not be run.
        tag = scan.search(end.pattern, broken.position)
    stop = tag.start() if tag else len(text)
    closed = tag is not None and tag["close"] is not None
    items = value if listed and isinstance(value, list) and value else [value]
    if not broken and (closed or end.optional) and not text[behind:stop].strip():
        place = tag.end() if tag and closed else stop
        return [call(item, **known, **scan.fields(start, place)) for item in items], place
    if not broken and not closed:
        calls = [call(item, **known, **scan.fields(start, behind)) for item in items]
        fault = {"status": ParseStatus.UNCLOSED_BLOCK, "error": f"The call is not closed: {end.tag} is missing."}
        return [made.model_copy(update=fault) for made in calls], behind
    if is_mentioned(scan, start, body, closed=closed or JSON.match(text, body) is not None):
        return [], body
    return broken_json(scan, start, body, tag, "" if end.optional and tag is None else end.tag, name, **known)


def broken_json(
    scan: Scan,
    start: int,
    body: int,
    tag: re.Match[str] | None,
    closing: str = "",
    name: str | None = None,
    **known: Any,
) -> Read:
    """A block from ``start`` whose JSON at ``body`` is broken.

    It ends with ``tag`` if that closes it, else before ``tag``; ``closing`` is the tag that it must have, if any.
    """
    stop = tag.start() if tag else len(scan.text)
    closed = tag is not None and tag.groupdict().get("close") is not None
    place = tag.end() if tag and closed else stop
    try:
        loads(scan.text[body:stop])
        fault, truncated = "expected nothing after the JSON", False
    except BrokenJSON as error:
        fault, truncated = str(error), error.truncated
    if closed or not (closing or truncated):
        status, sentence = ParseStatus.INVALID_JSON, f"The call is not valid JSON: {fault}."
    else:
        missing = f" {closing} is missing, and" if closing else ""
        status, sentence = ParseStatus.UNCLOSED_BLOCK, f"The call is not closed:{missing} its JSON is broken: {fault}."
    meant = NAME.search(scan.text, body, min(stop, body + 1000))
    name = name or (meant[1] if meant else "")
    return [failed_call(status, sentence, name=name.strip(), **known, **scan.fields(start, place))], place


def wrong_opening(scan: Scan, opening: re.Match[str], end: BlockEnd, expected: str) -> Read:
    """A block that does not begin as it must."""
    closed, stop = end.find(scan, opening.end())
    if is_mentioned(scan, *opening.span(), closed=closed):
        return [], opening.end()
    status = ParseStatus.MALFORMED if closed else ParseStatus.UNCLOSED_BLOCK
    found = scan.text[opening.end() : min(stop, opening.end() + 40)].strip()
    error = f"The call must begin with {expected}; {opening.group().strip()!r} is followed by {found!r}."
    return [failed_call(status, error, **scan.fields(opening.start(), stop))], stop
