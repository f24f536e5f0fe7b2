"""Calls against the tools that there are, and their JSON schemas."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry

from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls.call import ParseStatus, ToolCall
from hermes_atropos.toolcalls.strict_json import TOO_DEEP, BrokenJSON, loads

__all__ = ["functions_of", "nearest", "validate"]


def functions_of(tools: Iterable[Tool] | None) -> dict[str, Mapping[str, Any]]:
    """Name → function of OpenAI tool definitions, with or without the ``{"type": "function"}`` envelope."""
    functions = (tool.get("function", tool) for tool in tools or [])
    return {function["name"]: function for function in functions if isinstance(function.get("name"), str)}


def validate(calls: Iterable[ToolCall], tools: Sequence[Tool] | None) -> list[ToolCall]:
    """The calls, with those marked that no tool can answer; the ones given are left as they are.

    A well-formed call becomes ``UNKNOWN_TOOL`` (with the nearest names) or ``INVALID_ARGUMENTS`` (with the first
    faults). Where a schema refuses a string, and the string holds JSON that it accepts, that takes its place: models
    often quote numbers and nested objects, and Hermes' own tools forgive it too. A schema that is itself invalid, or
    refers to something outside of itself, asks for an object and nothing else.
    """
    functions = functions_of(tools)
    return [_validated(call, functions) if call.ok else call for call in calls]


def _validated(call: ToolCall, functions: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    if call.name not in functions:
        error = f"There is no tool named {call.name[:80]!r}. {nearest(call.name, functions)}"
        return call.model_copy(update={"status": ParseStatus.UNKNOWN_TOOL, "error": error})
    try:
        arguments, faults = _fitted(call.arguments, functions[call.name].get("parameters"))
    except RecursionError:
        arguments, faults = call.arguments, [TOO_DEEP]
    if faults:
        error = f"The arguments of {call.name[:80]!r} do not fit its schema: {'; '.join(faults)}."
        return call.model_copy(update={"status": ParseStatus.INVALID_ARGUMENTS, "error": error})
    return call if arguments is call.arguments else call.model_copy(update={"arguments": arguments})


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that leads from a wrong name to the right one."""
    known = sorted(names)
    if not known:
        return "No tools can be called here."
    spelled = {each.lower(): each for each in known}
    close = [spelled[each] for each in difflib.get_close_matches(name[:80].lower(), list(spelled), n=3, cutoff=0.5)]
    if close:
        return f"Did you mean {' or '.join(repr(each) for each in close)}?"
    more = f" and {len(known) - 40} more" if len(known) > 40 else ""
    return f"The tools are: {', '.join(known[:40])}{more}."


def _fitted(arguments: dict[str, Any], parameters: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments as the schema takes them, and what it has against them (at most three faults)."""
    if not isinstance(parameters, Mapping):
        return arguments, []
    validator = _validator(json.dumps(parameters, sort_keys=True, default=str))
    if validator is None:
        return arguments, []
    try:
        errors = list(validator.iter_errors(arguments))
        if errors and (repaired := _unquoted(validator, arguments, errors)) is not None:
            arguments = repaired
            errors = list(islice(validator.iter_errors(arguments), 3))
    except RecursionError:
        raise
    except Exception:
        # A reference that leads nowhere, a pattern that is not a regular expression: faults of the schema.
        return arguments, []
    return arguments, [_fault(error) for error in errors[:3]]


@functools.lru_cache(maxsize=1024)
def _validator(parameters: str) -> Validator | None:
    """The compiled schema; None if it is invalid. An empty registry: references are never fetched from anywhere."""
    schema = json.loads(parameters)
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError:
        return None
    return kind(schema, registry=Registry())


_SPELLINGS = {"True": True, "False": False, "None": None}


def _unquoted(
    validator: Validator, arguments: dict[str, Any], errors: Sequence[ValidationError]
) -> dict[str, Any] | None:
    """A copy in which refused strings give way to the JSON that they hold, where it is accepted; None if nowhere."""
    copy: dict[str, Any] | None = None
    for error in errors:
        if not isinstance(error.instance, str) or error.validator not in ("type", "anyOf", "oneOf"):
            continue
        text = error.instance.strip()
        try:
            value = _SPELLINGS[text] if text in _SPELLINGS else loads(text)
        except BrokenJSON:
            continue
        if not error.absolute_path or not validator.evolve(schema=error.schema).is_valid(value):
            continue
        copy = json.loads(json.dumps(arguments)) if copy is None else copy
        place: Any = copy
        *parents, last = error.absolute_path
        for key in parents:
            place = place[key]
        place[last] = value
    return copy


def _fault(error: ValidationError) -> str:
    error = best_match([error]) or error
    message = error.message
    if len(message) > 200:
        message = f"{message[:120]} … {message[-60:]}"
    path = error.json_path.removeprefix("$").removeprefix(".")
    return f"{path[:80]}: {message}" if path else message
