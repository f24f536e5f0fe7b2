"""``[f(x=1), g()]``: Llama 3.2 and 4, the latter between <|python_start|> and <|python_end|>.

Without the tag, a list is calls only where it fills whole lines: Markdown has links in such brackets.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from hermes_atropos.toolcalls.call import ParseStatus, ToolCall, failed_call, named_call
from hermes_atropos.toolcalls.formats.format import Blocks, Format, Read, Scan, is_mentioned, register
from hermes_atropos.toolcalls.formats.json_block import BlockEnd
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads

OPENING = r"<\|python_start\|>|(?:^|(?<=</think>))[ \t]*(?=\[\s*+[A-Za-z_][\w.]*+\()"
STRING = (
    r"(?P<raw>\b[rR])?(?:"
    r"'{3}(?:[^'\\]|\\.|'(?!''))*+'{3}|"
    r'"{3}(?:[^"\\]|\\.|"(?!""))*+"{3}|'
    r"'(?:[^'\\\n]|\\.)*+'|"
    r'"(?:[^"\\\n]|\\.)*+")'
)
TOKEN = re.compile(STRING + r"|[][(){}]", re.DOTALL)
FENCE = re.compile(r"^```(?:python)?\s|```$")
LINE_END = re.compile(r"[ \t]*(?:\n|\Z|<\|)")
ESCAPE = re.compile(r"\\(?:[4-7][0-7]{2}|(?P<known>[\n'\"\\abfnrtvxNuU0-7])|.)", re.DOTALL)


def read(scan: Scan, opening: re.Match[str]) -> Read:
    text, (start, body) = scan.text, opening.span()
    tagged = opening.group().startswith("<|python_start|>")
    depth, stop = 0, None
    for token in TOKEN.finditer(text, body):
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(token.group(), 0)
        if depth <= 0:
            stop = token.end()
            break
    if stop is None:
        error = "The list of calls is not closed: ] is missing."
        return [failed_call(ParseStatus.UNCLOSED_BLOCK, error, **scan.fields(start, len(text)))], len(text)
    if not tagged and not LINE_END.match(text, stop):
        return [], stop
    return _calls(text[body:stop].strip(), scan.fields(start, stop)), stop


def read_tagged(scan: Scan, opening: re.Match[str], end: BlockEnd) -> Read:
    """A list of calls, or a call a line, from a tag to ``end``; a tag within a string is data."""
    text, start = scan.text, opening.start()
    ends = re.compile(f"{STRING}|(?P<end>{end.pattern.pattern})", re.DOTALL)
    tag = next((token for token in ends.finditer(text, opening.end()) if token["end"]), None)
    if tag is None or tag["close"] is None:
        stop = tag.start() if tag else len(text)
        if is_mentioned(scan, *opening.span(), closed=False):
            return [], opening.end()
        error = f"The calls are not closed: {end.tag} is missing."
        return [failed_call(ParseStatus.UNCLOSED_BLOCK, error, **scan.fields(start, stop))], stop
    source = FENCE.sub("", text[opening.end() : tag.start()].strip()).strip()
    return _calls(source, scan.fields(start, tag.end()), lines=True), tag.end()


def _calls(source: str, fields: dict[str, Any], *, lines: bool = False) -> list[ToolCall]:
    try:
        tree = _parsed(TOKEN.sub(_with_known_escapes, source), lines)
    except SyntaxError as error:
        where = f"line {error.lineno}, column {error.offset}: {error.msg}"
        return [failed_call(ParseStatus.INVALID_JSON, f"The calls are not valid Python: {where}.", **fields)]
    except (ValueError, RecursionError, MemoryError) as error:
        return [failed_call(ParseStatus.INVALID_JSON, f"The calls are not valid Python: {error}.", **fields)]
    if not tree:
        return [failed_call(ParseStatus.MALFORMED, "The calls must be a list, like [name(parameter=1)].", **fields)]
    return [_call(node, fields) for node in tree]


def _parsed(source: str, lines: bool) -> list[ast.expr]:
    """The items of the list that the source is or, with ``lines``, its lines; none if it is neither."""
    statements = ast.parse(source, mode="exec").body
    values = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
    if len(values) == len(statements) == 1 and isinstance(values[0], ast.List):
        return values[0].elts
    return values if lines and len(values) == len(statements) else []


def _with_known_escapes(token: re.Match[str]) -> str:
    """An escape that Python does not know stands for itself, with a warning; doubled, without one."""
    if token["raw"]:
        return token.group()
    return ESCAPE.sub(lambda escape: escape.group() if escape["known"] else "\\" + escape.group(), token.group())


def _call(node: ast.expr, fields: dict[str, Any]) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return failed_call(ParseStatus.MALFORMED, "Each call must be written as name(parameter=value).", **fields)
    name = ast.unparse(node.func)
    try:
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise TypeError("each must be written as parameter=value")
        written = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        arguments = loads(json.dumps(written))
    except (TypeError, BrokenJSON, RecursionError) as error:
        fault = f"The arguments of {name[:80]!r} cannot be read: {error}."
        return failed_call(ParseStatus.MALFORMED, fault, name=name, **fields)
    return named_call(name, arguments, **fields)


def _value(node: ast.expr) -> Any:
    """The value of a literal, of JSON's kinds alone; ``true``, ``false`` and ``null`` are forgiven."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as word):
            return {"true": True, "false": False}.get(word)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(_is_text(key) for key in keys):
            return {key.value: _value(value) for key, value in zip(keys, values, strict=True)}  # type: ignore[union-attr]
    raise TypeError(f"{ast.unparse(node)[:40]!r} is not a literal value that JSON has too")


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


register(
    Format(
        name="pythonic",
        parse=Blocks(OPENING, read, wrapper=r"<\|python_end\|>").parse,
        mark=r"\[[A-Za-z_][\w.]*\(",
        parsers=("llama4_pythonic",),
        json_arguments=False,
    )
)
