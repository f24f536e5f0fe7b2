"""The text formats in which models write tool calls: each section shows one, and reads it.

They are those of the families' chat templates on the Hugging Face hub (gpt-oss: the harmony format). Common to all:
a tag within an argument is data, neither the end of a call nor the beginning of another; a broken call ends where the
next may begin; what was read is not read again, so that time is linear in the text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.toolcalls.call import (
    ParsedText,
    ParseStatus,
    ToolCall,
    encodable,
    failed,
    named_call,
    object_call,
)
from hermes_atropos.toolcalls.formats.scanning import Blocks, Read, Scan, joined
from hermes_atropos.toolcalls.strict_json import BrokenJSON, loads, value_at

__all__ = ["FORMATS", "parse_text"]


def parse_text(
    text: str,
    *,
    format: str = "hermes",
    thinking_open: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> ParsedText:
    """Take a model's answer apart into content, reasoning and tool calls. No text makes it raise.

    Calls count in the content; where that is empty, and has none, those in the reasoning do. Reasoning that is not
    closed goes on to the end. A closing tag that nothing opened, before any call, ends reasoning that the prompt began.

    Args:
        text: the answer, special tokens included, the stop token at its end removed.
        format: one of ``FORMATS``.
        thinking_open: the generation prompt already opened the reasoning.
        tools: OpenAI tool definitions, for formats that write arguments without their types (``qwen3_coder``, ``glm``):
            a parameter declared as a string stays as it was written, another is read as JSON where it can be.

    Raises:
        ConfigurationError: an unknown format.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"Unknown tool-call format {format!r}: use one of {', '.join(sorted(FORMATS))}.")
    return FORMATS[format](Scan(encodable(text), format, tools), thinking_open)


# --- What several formats share --------------------------------------------------------------------------------------


class End(NamedTuple):
    """How a block ends.

    Attributes:
        tag: what closes it.
        pattern: the tag (group ``close``), or what shows that it is missing.
        optional: a complete call may also stand at the end of the text, because the tag is a stop token.
    """

    tag: str
    pattern: re.Pattern[str]
    optional: bool = False


def _end(tag: str, *others: str) -> End:
    return End(tag, re.compile("|".join([f"(?P<close>{re.escape(tag)})", *map(re.escape, others)])))


def _json_block(scan: Scan, start: int, body: int, end: End, name: str | None = None, **known: Any) -> Read:
    """A block from ``start`` to ``end`` with JSON at ``body``: the arguments where the name is known, else the call."""
    text, broken, value = scan.text, None, None
    build = object_call if name is None else partial(named_call, name)
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
    if not broken and (closed or (end.optional and tag is None)) and not text[behind:stop].strip():
        place = tag.end() if tag else stop
        return [build(value, **known, **scan.fields(start, place))], place
    if not broken and not closed:
        call = build(value, **known, **scan.fields(start, behind))
        fault = {"status": ParseStatus.UNCLOSED_BLOCK, "error": f"The call is not closed: {end.tag} is missing."}
        return [call.model_copy(update=fault)], behind
    return _broken(scan, start, body, tag, "" if end.optional and tag is None else end.tag, name, **known)


def _broken(
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
    name = name or _name_in(scan.text[body : min(stop, body + 1000)])
    return [failed(status, sentence, name=name.strip(), **known, **scan.fields(start, place))], place


_NAME = re.compile(r'"name"\s*:\s*"([\w.:-]{1,128})"')


def _name_in(broken: str) -> str:
    """The tool that a broken call most likely meant, so that the answer can show its schema."""
    match = _NAME.search(broken)
    return match[1] if match else ""


# --- hermes: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call> ---------------------------------------------
# Hermes 2 to 4, Qwen 2.5, Qwen 3 and many finetunes.

_TOOL_CALL = _end("</tool_call>", "<tool_call>")


def _read_hermes(scan: Scan, opening: re.Match[str]) -> Read:
    return _json_block(scan, opening.start(), opening.end(), _TOOL_CALL)


# --- Arguments as tagged pairs: qwen3_coder, glm, and DeepSeek from V3.2 on -------------------------------------------


class Pairs(NamedTuple):
    """How names and values are written.

    Attributes:
        parameter: up to the beginning of a value; group ``key``.
        closing: the tag that closes a value.
        behind: what follows that tag, when it is really the end and not part of the value, which is not escaped.
        last: what ends the call after the last value.
        end: the tag of the block.
        convert: the value from the match of ``parameter``, the text and the parameter's schema; raises ``BrokenJSON``.
    """

    parameter: re.Pattern[str]
    closing: str
    behind: re.Pattern[str]
    last: re.Pattern[str]
    end: End
    convert: Callable[[re.Match[str], str, Any], Any]


def _pairs_block(scan: Scan, start: int, position: int, name: str, pairs: Pairs) -> Read:
    """A block from ``start`` whose parameters begin at ``position``."""
    text, arguments, status = scan.text, {}, ParseStatus.MALFORMED
    properties = _properties(scan, name)
    fault = None
    while fault is None and (parameter := pairs.parameter.match(text, position)):
        key, position = parameter["key"], parameter.end()
        closing = scan.search(pairs.behind, position)
        if closing is None:
            fault = f"The value of {key[:80]!r} is not closed by {pairs.closing}."
            break
        value, position = text[position : closing.start()], closing.end()
        try:
            arguments[key] = pairs.convert(parameter, value, properties.get(key))
        except BrokenJSON as error:
            status, fault = ParseStatus.INVALID_JSON, f"The value of {key[:80]!r} is not valid JSON: {error}."
    last = pairs.last.match(text, position)
    if fault is None and last:
        return [named_call(name, arguments, **scan.fields(start, last.end()))], last.end()
    tag = scan.search(pairs.end.pattern, position)
    if tag is None or tag["close"] is None:
        stop = tag.start() if tag else len(text)
        status, sentence = ParseStatus.UNCLOSED_BLOCK, f"The call is not closed: {pairs.end.tag} is missing."
    else:
        stop = tag.end()
        sentence = fault or f"The call cannot be read after {text[max(start, position - 20) : position]!r}."
    return [failed(status, sentence, name=name.strip(), **scan.fields(start, stop))], stop


def _properties(scan: Scan, name: str) -> Mapping[str, Any]:
    parameters = scan.functions.get(name, {}).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: the text itself, or what it says as JSON if that is no string."""
    if _only_strings(schema):
        return text
    try:
        value = loads(text)
    except BrokenJSON:
        return text
    return text if isinstance(value, str) else value


def _only_strings(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    if "type" in schema:
        return schema["type"] in ("string", ["string"])
    if isinstance(schema.get("enum"), list):
        return all(isinstance(value, str) for value in schema["enum"])
    options = schema.get("anyOf") or schema.get("oneOf")
    return isinstance(options, list) and all(_only_strings(option) for option in options)


# --- qwen3_coder ------------------------------------------------------------------------------------------------------
# <tool_call>
# <function=f>
# <parameter=x>
# 1
# </parameter>
# </function>
# </tool_call>

_QWEN_FUNCTION = re.compile(r"\s*<function=(?P<name>[^<>\n]*)>")
_QWEN = Pairs(
    parameter=re.compile(r"\s*<parameter=(?P<key>[^<>\n]*)>"),
    closing="</parameter>",
    behind=re.compile(r"</parameter>\s*+(?=<parameter=|</function>)"),
    last=re.compile(r"\s*</function>\s*</tool_call>"),
    end=_TOOL_CALL,
    convert=lambda _, text, schema: _typed(text.removeprefix("\n").removesuffix("\n"), schema),
)
_QWEN_ORPHAN = _end("</function>", "<tool_call>")


def _read_qwen3_coder(scan: Scan, opening: re.Match[str]) -> Read:
    if opening.group() != "<tool_call>":
        return _headless(scan, opening, _QWEN_ORPHAN, "<tool_call>")
    function = _QWEN_FUNCTION.match(scan.text, opening.end())
    if function:
        return _pairs_block(scan, opening.start(), function.end(), function["name"], _QWEN)
    return _headless(scan, opening, _TOOL_CALL, "<function=name>")


def _headless(scan: Scan, opening: re.Match[str], end: End, expected: str) -> Read:
    """A block that does not begin as it must."""
    tag = scan.search(end.pattern, opening.end())
    closed = tag is not None and tag["close"] is not None
    stop = tag.end() if tag and closed else tag.start() if tag else len(scan.text)
    status = ParseStatus.MALFORMED if closed else ParseStatus.UNCLOSED_BLOCK
    found = scan.text[opening.end() : min(stop, opening.end() + 40)].strip()
    error = f"The call must begin with {expected}; {opening.group().strip()!r} is followed by {found!r}."
    return [failed(status, error, **scan.fields(opening.start(), stop))], stop


# --- glm --------------------------------------------------------------------------------------------------------------
# <tool_call>f
# <arg_key>x</arg_key>
# <arg_value>1</arg_value>
# </tool_call>

_GLM_FUNCTION = re.compile(r"\s*(?P<name>[^<>\n{]*)")
_GLM = Pairs(
    parameter=re.compile(r"\s*<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>"),
    closing="</arg_value>",
    behind=re.compile(r"</arg_value>\s*+(?=<arg_key>|</tool_call>)"),
    last=re.compile(r"\s*</tool_call>"),
    end=_TOOL_CALL,
    convert=lambda _, text, schema: _typed(text, schema),
)


def _read_glm(scan: Scan, opening: re.Match[str]) -> Read:
    function = _GLM_FUNCTION.match(scan.text, opening.end())
    name, position = (function["name"].strip(), function.end()) if function else ("", opening.end())
    return _pairs_block(scan, opening.start(), position, name, _GLM)


# --- deepseek ---------------------------------------------------------------------------------------------------------
# V3, R1:  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
#          ```json
#          {"x": 1}
#          ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
# V3.1:    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
# V3.2 on: <｜DSML｜function_calls>                                                   (V4: tool_calls)
#          <｜DSML｜invoke name="f">
#          <｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
#          </｜DSML｜invoke>
#          </｜DSML｜function_calls>

_DEEPSEEK_HEAD = re.compile(r"(?P<name>[^<\n]*)<｜tool▁sep｜>(?:(?P<fenced>[^\n{<]*)\n```(?:json)?)?")
_DEEPSEEK_CALL = End(
    "<｜tool▁call▁end｜>",
    re.compile(r"(?P<close>(?:```\s*)?<｜tool▁call▁end｜>)|<｜tool▁call▁begin｜>|<｜tool▁calls▁end｜>"),
)
_DSML_FUNCTION = re.compile(r'<｜DSML｜invoke name="(?P<name>[^"<>\n]*)">')
_DSML = Pairs(
    parameter=re.compile(r'\s*<｜DSML｜parameter name="(?P<key>[^"<\n]*)" string="(?P<string>true|false)">'),
    closing="</｜DSML｜parameter>",
    behind=re.compile(r"</｜DSML｜parameter>\s*+(?=<｜DSML｜parameter |</｜DSML｜invoke>)"),
    last=re.compile(r"\s*</｜DSML｜invoke>"),
    end=_end("</｜DSML｜invoke>", "<｜DSML｜invoke "),
    convert=lambda parameter, text, _: text if parameter["string"] == "true" else loads(text),
)


def _read_deepseek(scan: Scan, opening: re.Match[str]) -> Read:
    if opening.group() != "<｜tool▁call▁begin｜>":
        function = _DSML_FUNCTION.match(scan.text, opening.start())
        if function:
            return _pairs_block(scan, opening.start(), function.end(), function["name"], _DSML)
        return _headless(scan, opening, _DSML.end, 'name="…">')
    head = _DEEPSEEK_HEAD.match(scan.text, opening.end())
    if head is None:
        return _headless(scan, opening, _DEEPSEEK_CALL, "a name and <｜tool▁sep｜>")
    name = head["name"] if head["fenced"] is None else head["fenced"]
    return _json_block(scan, opening.start(), head.end(), _DEEPSEEK_CALL, name)


# --- kimi -------------------------------------------------------------------------------------------------------------
# <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>
# <|tool_calls_section_end|>

_KIMI_HEAD = re.compile(r"\s*+(?P<id>(?:functions\.)?(?P<name>[^<\s]*?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>")
_KIMI_CALL = _end("<|tool_call_end|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>")


def _read_kimi(scan: Scan, opening: re.Match[str]) -> Read:
    head = _KIMI_HEAD.match(scan.text, opening.end())
    if head is None:
        return _headless(scan, opening, _KIMI_CALL, "functions.name:0 and <|tool_call_argument_begin|>")
    return _json_block(scan, opening.start(), head.end(), _KIMI_CALL, head["name"], sampled_id=head["id"])


# --- mistral ----------------------------------------------------------------------------------------------------------
# Up to tokenizer v7: [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]
# From v11 on:        [TOOL_CALLS]f[ARGS]{"x": 1}          one for each call; v11 with [CALL_ID]123456789 before [ARGS]

_MISTRAL_HEAD = re.compile(r"\s*(?P<name>[^\s\[\]{}]*)\s*(?:\[CALL_ID\](?P<id>[^\s\[\]{}]*))?\s*(?:\[ARGS\])?")
_MISTRAL_NEXT = re.compile(r"\[TOOL_CALLS\]")


def _read_mistral(scan: Scan, opening: re.Match[str]) -> Read:
    start, head = opening.start(), _MISTRAL_HEAD.match(scan.text, opening.end())
    name, body = (head["name"], head.end()) if head else ("", opening.end())
    try:
        value, behind = value_at(scan.text, body)
    except BrokenJSON as error:
        return _broken(scan, start, body, scan.search(_MISTRAL_NEXT, error.position), name=name)
    fields = scan.fields(start, behind)
    if name and head:
        return [named_call(name, value, sampled_id=head["id"], **fields)], behind
    items = value if isinstance(value, list) and value else [value]
    return [object_call(item, sampled_id=_own_id(item), **fields) for item in items], behind


def _own_id(item: Any) -> str | None:
    own = item.get("id") if isinstance(item, dict) else None
    return own if isinstance(own, str) and own else None


# --- llama3_json: {"name": "f", "parameters": {"x": 1}} ---------------------------------------------------------------
# Llama 3.1 to 3.3; several separated by ";" or new lines, sometimes after <|python_tag|>. Without the tag, an object is
# a call only where a line begins with it, and it with a name and parameters: an answer may well contain JSON.

_LLAMA_CALL = (
    r'\{\s*+(?:"type"\s*+:\s*+"function"\s*+,\s*+)?"name"\s*+:\s*+"[^"\n]*"\s*+,\s*+"(?:parameters|arguments)"\s*+:'
)
_LLAMA_OPENING = rf"<\|python_tag\|>|(?:^|(?<=</think>))[ \t]*(?={_LLAMA_CALL})"
_LLAMA_NEXT = re.compile(_LLAMA_OPENING, re.MULTILINE)
_LLAMA_MORE = re.compile(rf"\s*+;?\s*+(?={_LLAMA_CALL})")


def _read_llama3_json(scan: Scan, opening: re.Match[str]) -> Read:
    start, position = opening.span()
    calls: list[ToolCall] = []
    while True:
        try:
            value, behind = value_at(scan.text, position)
        except BrokenJSON as error:
            found, behind = _broken(scan, start, position, scan.search(_LLAMA_NEXT, max(error.position, position + 1)))
            return [*calls, *found], behind
        calls.append(object_call(value, **scan.fields(start, behind)))
        more = _LLAMA_MORE.match(scan.text, behind)
        if more is None:
            return calls, behind
        start = position = more.end()


# --- pythonic: [f(x=1), g()] ------------------------------------------------------------------------------------------
# Llama 3.2 and 4, the latter between <|python_start|> and <|python_end|>. Without the tag, a list is calls only where
# it fills whole lines: Markdown has links in such brackets.

_PYTHON_OPENING = r"<\|python_start\|>|(?:^|(?<=</think>))[ \t]*(?=\[\s*+[A-Za-z_][\w.]*+\()"
_PYTHON_STRING = (
    r"(?P<raw>\b[rR])?(?:"
    r"'{3}(?:[^'\\]|\\.|'(?!''))*+'{3}|"
    r'"{3}(?:[^"\\]|\\.|"(?!""))*+"{3}|'
    r"'(?:[^'\\\n]|\\.)*+'|"
    r'"(?:[^"\\\n]|\\.)*+")'
)
_PYTHON_TOKEN = re.compile(_PYTHON_STRING + r"|[][(){}]", re.DOTALL)
_LINE_END = re.compile(r"[ \t]*(?:\n|\Z|<\|)")
_ESCAPE = re.compile(r"\\(?:[4-7][0-7]{2}|(?P<known>[\n'\"\\abfnrtvxNuU0-7])|.)", re.DOTALL)


def _read_pythonic(scan: Scan, opening: re.Match[str]) -> Read:
    text, (start, body) = scan.text, opening.span()
    tagged = opening.group().startswith("<|python_start|>")
    depth, stop = 0, None
    for token in _PYTHON_TOKEN.finditer(text, body):
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(token.group(), 0)
        if depth <= 0:
            stop = token.end()
            break
    if stop is None:
        error = "The list of calls is not closed: ] is missing."
        return [failed(ParseStatus.UNCLOSED_BLOCK, error, **scan.fields(start, len(text)))], len(text)
    if not tagged and not _LINE_END.match(text, stop):
        return [], stop
    return _python_calls(text[body:stop].strip(), scan.fields(start, stop)), stop


def _python_calls(source: str, fields: dict[str, Any]) -> list[ToolCall]:
    try:
        tree = ast.parse(_PYTHON_TOKEN.sub(_with_known_escapes, source), mode="eval").body
    except SyntaxError as error:
        where = f"line {error.lineno}, column {error.offset}: {error.msg}"
        return [failed(ParseStatus.INVALID_JSON, f"The calls are not valid Python: {where}.", **fields)]
    except (ValueError, RecursionError, MemoryError) as error:
        return [failed(ParseStatus.INVALID_JSON, f"The calls are not valid Python: {error}.", **fields)]
    if not isinstance(tree, ast.List) or not tree.elts:
        return [failed(ParseStatus.MALFORMED, "The calls must be a list, like [name(parameter=1)].", **fields)]
    return [_python_call(node, fields) for node in tree.elts]


def _with_known_escapes(token: re.Match[str]) -> str:
    """Escapes that Python does not know stand for themselves, with a warning; doubled, without one."""
    if token["raw"]:
        return token.group()
    return _ESCAPE.sub(lambda escape: escape.group() if escape["known"] else "\\" + escape.group(), token.group())


def _python_call(node: ast.expr, fields: dict[str, Any]) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return failed(ParseStatus.MALFORMED, "Each call must be written as name(parameter=value).", **fields)
    name = ast.unparse(node.func)
    try:
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise TypeError("each must be written as parameter=value")
        written = {str(keyword.arg): _python_value(keyword.value) for keyword in node.keywords}
        arguments = loads(json.dumps(written))
    except (TypeError, BrokenJSON, RecursionError) as error:
        return failed(
            ParseStatus.MALFORMED, f"The arguments of {name[:80]!r} cannot be read: {error}.", name=name, **fields
        )
    return named_call(name, arguments, **fields)


def _python_value(node: ast.expr) -> Any:
    """The value of a literal, of JSON's kinds alone; ``true``, ``false`` and ``null`` are forgiven."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as word):
            return {"true": True, "false": False}.get(word)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(_is_text(key) for key in keys):
            return {key.value: _python_value(value) for key, value in zip(keys, values, strict=True)}  # type: ignore[union-attr]
    raise TypeError(f"{ast.unparse(node)[:40]!r} is no literal value that JSON has too")


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# --- gpt_oss ----------------------------------------------------------------------------------------------------------
# <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>commentary to=functions.f
# <|constrain|>json<|message|>{"x": 1}<|call|>                  (no line break; the prompt ends with <|start|>assistant)

_HARMONY_HEAD = re.compile(
    r"<\|start\|>[^<]*(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_HARMONY_RECIPIENT = re.compile(r"\bto=(?:functions\.)?(?P<name>[^\s<]+)")
_HARMONY_CALL = End("<|call|>", re.compile(r"(?P<close><\|(?:call|end|return)\|>)|<\|start\|>"), optional=True)


def _parse_gpt_oss(scan: Scan, thinking: bool) -> ParsedText:
    prompt = "<|start|>assistant<|channel|>analysis<|message|>" if thinking else "<|start|>assistant"
    if not thinking and scan.text.startswith("<|start|>"):
        prompt = ""
    scan = Scan(prompt + scan.text, scan.format, scan.tools)
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while head := scan.search(_HARMONY_HEAD, position):
        content.append(scan.text[position : head.start()])
        recipient = _HARMONY_RECIPIENT.search(head.group())
        if recipient:
            found, position = _json_block(scan, head.start(), head.end(), _HARMONY_CALL, recipient["name"])
            calls += [call.model_copy(update={"raw": call.raw.removeprefix(prompt)}) for call in found]
            continue
        tag = scan.search(_HARMONY_CALL.pattern, head.end())
        stop = tag.start() if tag else len(scan.text)
        channel = (head["channel"] or "").strip()
        (reasoning if channel.startswith("analysis") else content).append(scan.text[head.end() : stop])
        position = tag.end() if tag and tag["close"] else stop
    content.append(scan.text[position:] if position else scan.text.removeprefix(prompt))
    return ParsedText(joined(content, "\n"), joined(reasoning, "\n"), calls)


#: Format → what parses it: (the scan of an answer, whether it begins within reasoning) → content, reasoning, calls.
FORMATS: Mapping[str, Callable[[Scan, bool], ParsedText]] = {
    "hermes": Blocks(r"<tool_call>", _read_hermes).parse,
    "qwen3_coder": Blocks(r"<tool_call>|^<function=(?=[^<>\n]*>)", _read_qwen3_coder).parse,
    "llama3_json": Blocks(_LLAMA_OPENING, _read_llama3_json).parse,
    "pythonic": Blocks(_PYTHON_OPENING, _read_pythonic, wrapper=r"<\|python_end\|>").parse,
    "mistral": Blocks(r"\[TOOL_CALLS\]", _read_mistral, think=(r"\[THINK\]|<think>", r"\[/THINK\]|</think>")).parse,
    "deepseek": Blocks(
        r"<｜tool▁call▁begin｜>|<｜DSML｜invoke ",
        _read_deepseek,
        wrapper=r"<｜tool▁calls▁(?:begin|end)｜>|</?｜DSML｜(?:function_calls|tool_?calls)>",
    ).parse,
    "glm": Blocks(r"<tool_call>", _read_glm).parse,
    "kimi": Blocks(r"<\|tool_call_begin\|>", _read_kimi, wrapper=r"<\|tool_calls_section_(?:begin|end)\|>").parse,
    "gpt_oss": _parse_gpt_oss,
}
