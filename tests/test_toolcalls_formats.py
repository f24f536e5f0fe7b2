"""Every family's format, written as its chat template writes it, and read back."""

from __future__ import annotations

import copy
import json
import keyword
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.rendering import renderer_for
from hermes_atropos.testing import chatml_tokenizer
from hermes_atropos.testing.server import ScriptedServer
from hermes_atropos.toolcalls import FORMATS, ParseStatus, ToolCall, error_result, parse_text
from hermes_atropos.toolcalls.formats import Blocks, Format, Read, Scan, block_end, format_named, read_json, register

OK, BAD, ODD = ParseStatus.OK, ParseStatus.INVALID_JSON, ParseStatus.MALFORMED
UNCLOSED, NAMELESS = ParseStatus.UNCLOSED_BLOCK, ParseStatus.MISSING_NAME

Call = tuple[str, dict[str, Any]]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{dumps({'name': f, 'arguments': x})}\n</tool_call>" for f, x in calls)


def qwen3_coder(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        parameters = "".join(f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items())
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def glm(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items()
        )
        return f"<tool_call>{name}\n{pairs}</tool_call>"

    return "\n".join(one(*call) for call in calls)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(dumps({"name": f, "parameters": x}) for f, x in calls)


def llama3_tagged(calls: Sequence[Call]) -> str:
    typed = ({"type": "function", "name": f, "parameters": x} for f, x in calls)
    return "<|python_tag|>" + "\n".join(json.dumps(call, indent=1) for call in typed)


def pythonic(calls: Sequence[Call]) -> str:
    written = (f"{f}({', '.join(f'{key}={value!r}' for key, value in x.items())})" for f, x in calls)
    return f"[{', '.join(written)}]"


def pythonic_tagged(calls: Sequence[Call]) -> str:
    return f"<|python_start|>{pythonic(calls)}<|python_end|>"


def mistral_v7(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS]" + dumps([{"name": f, "arguments": x, "id": "a1B2c3D4e"} for f, x in calls])


def mistral_v11(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{f}[CALL_ID]a1B2c3D4e[ARGS]{dumps(x)}" for f, x in calls)


def mistral_v13(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{f}[ARGS]{dumps(x)}" for f, x in calls)


def deepseek_v3(calls: Sequence[Call]) -> str:
    written = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{f}\n```json\n{dumps(x)}\n```<｜tool▁call▁end｜>" for f, x in calls
    )
    return f"<｜tool▁calls▁begin｜>{chr(10).join(written)}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Sequence[Call]) -> str:
    written = (f"<｜tool▁call▁begin｜>{f}<｜tool▁sep｜>{dumps(x)}<｜tool▁call▁end｜>" for f, x in calls)
    return f"<｜tool▁calls▁begin｜>{''.join(written)}<｜tool▁calls▁end｜>"


def deepseek_v32(calls: Sequence[Call]) -> str:
    def parameter(key: str, value: Any) -> str:
        head = f'<｜DSML｜parameter name="{key}" string="{dumps(isinstance(value, str))}">'
        return f"{head}{plain(value)}</｜DSML｜parameter>\n"

    def one(name: str, arguments: dict[str, Any]) -> str:
        parameters = "".join(parameter(key, value) for key, value in arguments.items())
        return f'<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>'

    written = "\n".join(one(*call) for call in calls)
    return f"<｜DSML｜function_calls>\n{written}\n</｜DSML｜function_calls>"


def kimi(calls: Sequence[Call]) -> str:
    written = (
        f"<|tool_call_begin|>functions.{f}:{number}<|tool_call_argument_begin|>{dumps(x)}<|tool_call_end|>"
        for number, (f, x) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{''.join(written)}<|tool_calls_section_end|>"


def gpt_oss(calls: Sequence[Call]) -> str:
    """As it is sampled: the prompt ended with ``<|start|>assistant``, and the last ``<|call|>`` is the stop token."""
    head = "<|channel|>commentary to=functions."
    return "<|call|><|start|>assistant".join(
        f"{head}{f} <|constrain|>json<|message|>{dumps(x)}" for f, x in calls
    )  # fmt: skip


def granite(calls: Sequence[Call]) -> str:
    return "<|tool_call|>" + listed(calls)


def phi(calls: Sequence[Call]) -> str:
    return f"<|tool_call|>{listed(calls)}<|/tool_call|>"


def apriel(calls: Sequence[Call]) -> str:
    return f"<tool_calls>{listed(calls)}</tool_calls>"


def nemotron(calls: Sequence[Call]) -> str:
    return f"<TOOLCALL>{listed(calls)}</TOOLCALL>"


def listed(calls: Sequence[Call]) -> str:
    return dumps([{"name": f, "arguments": x} for f, x in calls])


def gigachat_3(calls: Sequence[Call]) -> str:
    return "".join(f"function call<|role_sep|>\n{dumps({'name': f, 'arguments': x})}<|message_sep|>" for f, x in calls)


def gigachat_31(calls: Sequence[Call]) -> str:
    return "".join(f"<|function_call|>{dumps({'name': f, 'arguments': x})}" for f, x in calls)


def apertus(calls: Sequence[Call]) -> str:
    return f"<|tools_prefix|>{dumps([{f: x} for f, x in calls])}<|tools_suffix|>"


def command_r7b(calls: Sequence[Call]) -> str:
    written = [{"tool_call_id": str(at), "tool_name": f, "parameters": x} for at, (f, x) in enumerate(calls)]
    return f"<|START_ACTION|>{dumps(written)}<|END_ACTION|>"


def command_r(calls: Sequence[Call]) -> str:
    return f"Action: ```json\n{dumps([{'tool_name': f, 'parameters': x} for f, x in calls])}\n```"


def internlm(calls: Sequence[Call]) -> str:
    written = (dumps({"name": f, "parameters": x}) for f, x in calls)
    return "\n".join(f"<|action_start|><|plugin|>{call}<|action_end|>" for call in written)


def functionary(calls: Sequence[Call]) -> str:
    return "".join(f"<function={f}>{dumps(x)}</function>" for f, x in calls)


def invoked(calls: Sequence[Call], call: str, parameter: str, closing: str, end: str) -> str:
    """Calls whose arguments are tagged, each with a tag that names what it is."""
    return "\n".join(
        "\n".join([call % f, *(parameter % key + plain(value) + closing for key, value in x.items()), end])
        for f, x in calls
    )


def minimax(calls: Sequence[Call]) -> str:
    written = invoked(calls, '<invoke name="%s">', '<parameter name="%s">', "</parameter>", "</invoke>")
    return f"<minimax:tool_call>\n{written}\n</minimax:tool_call>"


def minimax_m3(calls: Sequence[Call]) -> str:
    mark = "]<]minimax[>["
    written = (
        "".join(
            [f'{mark}<invoke name="{f}">', *(f"{mark}<{key}>{plain(value)}{mark}</{key}>" for key, value in x.items())]
        )
        for f, x in calls
    )
    return f"{mark}<tool_call>\n" + "".join(f"{call}{mark}</invoke>\n" for call in written) + f"{mark}</tool_call>"


def seed_oss(calls: Sequence[Call]) -> str:
    head, end = "<seed:tool_call>\n<function=%s>", "</function>\n</seed:tool_call>"
    return invoked(calls, head, "<parameter=%s>\n", "\n</parameter>", end)


def minicpm(calls: Sequence[Call]) -> str:
    return invoked(calls, '<function name="%s">', '<param name="%s">', "</param>", "</function>")


def step3(calls: Sequence[Call]) -> str:
    head, parameter = '<steptml:invoke name="%s">', '<steptml:parameter name="%s">'
    written = (invoked([call], head, parameter, "</steptml:parameter>", "</steptml:invoke>") for call in calls)
    blocks = (f"<｜tool_call_begin｜>function<｜tool_sep｜>{one}<｜tool_call_end｜>" for one in written)
    return f"<｜tool_calls_begin｜>{''.join(blocks)}<｜tool_calls_end｜>"


def solar(calls: Sequence[Call]) -> str:
    written = (
        f"<|tool_call:begin|>{number}<|tool_call:name|>{f}<|tool_call:args|>{dumps(x)}<|tool_call:end|>"
        for number, (f, x) in enumerate(calls)
    )
    return "<|tool_calls|>" + "".join(written)


def lfm2(calls: Sequence[Call]) -> str:
    return f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"


def python_lines(calls: Sequence[Call]) -> str:
    return "\n".join(pythonic([call])[1:-1] for call in calls)


def minicpm3(calls: Sequence[Call]) -> str:
    return f"<|tool_call_start|>\n```python\n{python_lines(calls)}\n```\n<|tool_call_end|>"


def olmo3(calls: Sequence[Call]) -> str:
    return f"<function_calls>\n{python_lines(calls)}\n</function_calls>"


def gemma4(calls: Sequence[Call]) -> str:
    written = (f + braced(x, '<|"|>', keys=False) for f, x in calls)
    return "".join(f"<|tool_call>call:{call}<tool_call|>" for call in written)


def functiongemma(calls: Sequence[Call]) -> str:
    written = (f"call:{f}{braced(x, '<escape>', keys=False)}" for f, x in calls)
    return "".join(f"<start_function_call>{call}<end_function_call>" for call in written)


def braced(value: Any, quote: str, *, keys: bool = True) -> str:
    """As Gemma writes a value; ``keys``: those of an object stand in quotes."""
    if isinstance(value, dict):
        named = ((f"{quote}{key}{quote}" if keys else key, braced(item, quote)) for key, item in value.items())
        return "{" + ",".join(f"{key}:{item}" for key, item in named) + "}"
    if isinstance(value, list):
        return f"[{','.join(braced(item, quote) for item in value)}]"
    return f"{quote}{value}{quote}" if isinstance(value, str) else dumps(value)


WRITERS: list[tuple[str, Callable[[Sequence[Call]], str]]] = [
    ("hermes", hermes),
    ("qwen3_coder", qwen3_coder),
    ("glm", glm),
    ("llama3_json", llama3_json),
    ("llama3_json", llama3_tagged),
    ("pythonic", pythonic),
    ("pythonic", pythonic_tagged),
    ("mistral", mistral_v7),
    ("mistral", mistral_v11),
    ("mistral", mistral_v13),
    ("deepseek", deepseek_v3),
    ("deepseek", deepseek_v31),
    ("deepseek", deepseek_v32),
    ("kimi", kimi),
    ("gpt_oss", gpt_oss),
    ("granite", granite),
    ("granite", phi),
    ("apriel", apriel),
    ("nemotron", nemotron),
    ("gigachat", gigachat_3),
    ("gigachat", gigachat_31),
    ("apertus", apertus),
    ("command_r", command_r7b),
    ("command_r", command_r),
    ("internlm", internlm),
    ("functionary", functionary),
    ("minimax", minimax),
    ("minimax_m3", minimax_m3),
    ("seed_oss", seed_oss),
    ("minicpm", minicpm),
    ("step3", step3),
    ("solar", solar),
    ("lfm2", lfm2),
    ("lfm2", minicpm3),
    ("lfm2", olmo3),
    ("gemma", gemma4),
    ("gemma", functiongemma),
]
every_family = pytest.mark.parametrize(("format", "write"), WRITERS, ids=[write.__name__ for _, write in WRITERS])

# Each family's own markup, which in an argument is data.
MARKUP = sorted(
    {piece for _, write in WRITERS for piece in re.findall(r"<[^<>]*>|\[[A-Z_]+\]", write([("f", {"x": 1})]))}
    | {"<think>", "</think>", "<|end|>", "<|start|>", "```", "\n", '"', "'", "\\", "\\d", "{", "]", ")"}
)
TEXT = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(MARKUP)), max_size=6).map("".join)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
NAME = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
CALLS = st.lists(st.tuples(NAME, st.dictionaries(NAME, JSON, max_size=3)), min_size=1, max_size=3)

# Where values are not escaped, one that holds the end of a value and what follows it cannot be told from two.
AMBIGUOUS = re.compile(
    r"</parameter>\s*(<parameter=|</function>)"
    r"|</arg_value>\s*(<arg_key>|</tool_call>)"
    r"|</｜DSML｜parameter>\s*(<｜DSML｜parameter |</｜DSML｜invoke>)"
    # … nor one that holds the beginning of a parameter from one that was not closed.
    r"|<parameter=|<arg_key>|<｜DSML｜parameter |<parameter name=|<param name=|</param>|<steptml:parameter "
    r"|</invoke>|</steptml:invoke>"
    # Quotes that can't be escaped.
    r'|<\|\\?"\|>|<escape>'
)


def tools_for(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Definitions in which what is a string is declared as one."""
    functions = [
        {"name": f, "parameters": {"properties": {key: {"type": "string"} for key in x if isinstance(x[key], str)}}}
        for f, x in calls
    ]
    return [{"type": "function", "function": function} for function in functions]


def read(calls: Sequence[ToolCall]) -> list[tuple[str, dict[str, Any], ParseStatus]]:
    return [(call.name, call.arguments, call.status) for call in calls]


class TestEveryFamily:
    def test_each_is_tested(self) -> None:
        assert {format for format, _ in WRITERS} == set(FORMATS)

    @settings(max_examples=200)
    @given(calls=CALLS)
    def test_what_its_template_writes_is_read(self, calls: list[Call]) -> None:
        assume(
            not AMBIGUOUS.search(dumps(calls))
            and not AMBIGUOUS.search("".join(plain(v) for _, x in calls for v in x.values()))
        )
        assume(len({name for name, _ in calls}) == len(calls))
        tools = tools_for(calls)
        for format, write in WRITERS:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                content, reasoning, found = parse_text(write(calls), format=format, tools=tools)
            assert read(found) == [(name, arguments, OK) for name, arguments in calls], write.__name__
            assert (content, reasoning) == (None, None), write.__name__
            assert {call.format for call in found} == {format}, write.__name__
            assert len({call.id for call in found}) == len(calls), write.__name__

    @every_family
    def test_text_around_calls_is_content(self, format: str, write: Any) -> None:
        calls: list[Call] = [("f", {"x": 1}), ("g", {})]
        before = (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" if format == "gpt_oss" else "I look.\n"
        )
        content, _, found = parse_text(before + write(calls), format=format)
        assert read(found) == [("f", {"x": 1}, OK), ("g", {}, OK)]
        assert content == "I look."

    @every_family
    def test_a_call_in_reasoning_is_a_draft_where_there_is_an_answer(self, format: str, write: Any) -> None:
        if format == "gpt_oss":
            text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello."
            assert parse_text(text, format=format) == ("Hello.", "Hm.", [])
            return
        draft = f"Hm.\n{write([('f', {'x': 1})])}"
        assert parse_text(f"<think>{draft}</think>Hello.", format=format) == ("Hello.", draft, [])
        content, reasoning, found = parse_text(f"<think>{draft}</think>", format=format)
        assert (content, reasoning, read(found)) == (None, "Hm.", [("f", {"x": 1}, OK)])

    @pytest.mark.parametrize("write", [hermes, qwen3_coder, seed_oss, glm, minimax], ids=lambda write: write.__name__)
    def test_reasoning_does_not_end_within_a_draft_that_is_marked(self, write: Any) -> None:
        draft = f"Hm.\n{write([('f', {'x': '</think> <think>'})])}"
        parsed = parse_text(f"<think>{draft}</think>Hello.", format=write.__name__)
        assert parsed == ("Hello.", draft, [])

    @every_family
    @pytest.mark.parametrize("value", ["\n", "\n\n", "a\n", "\na\n\n"])
    def test_new_lines_at_the_ends_of_a_value_are_its_own(self, format: str, write: Any, value: str) -> None:
        calls: list[Call] = [("f", {"x": value})]
        _, _, found = parse_text(write(calls), format=format, tools=tools_for(calls))
        assert read(found) == [("f", {"x": value}, OK)]

    @every_family
    def test_reasoning_may_come_before_a_call(self, format: str, write: Any) -> None:
        calls: list[Call] = [("f", {"x": "</think> <think>"})]
        think, close = "<think>", "</think>"
        if format == "gpt_oss":
            think, close = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
        for text, opened in [(f"{think}Hm.{close}", False), (f"Hm.{close}", True)]:
            content, reasoning, found = parse_text(text + write(calls), format=format, thinking_open=opened)
            assert (content, reasoning) == (None, "Hm.")
            assert read(found) == [("f", calls[0][1], OK)]

    @every_family
    def test_cut_off_anywhere_it_is_no_call_that_can_run(self, format: str, write: Any) -> None:
        text = write([("f", {"text": "one two"})])
        whole = read(parse_text(text, format=format).calls)
        for end in range(len(text)):
            found = read(parse_text(text[:end], format=format).calls)
            assert all(call == whole[0] or call[2] is not OK for call in found), text[:end]

    @settings(max_examples=200)
    @given(st.lists(st.one_of(st.integers(0, 40), st.text(max_size=3)), max_size=12))
    def test_no_text_makes_it_raise(self, drawn: list[int | str]) -> None:
        """Whatever is written of a family's own pieces, here by their numbers."""
        for format, write in WRITERS:
            own = re.findall(r"<[^<>]*>|\[[A-Z_]+\]|[^<>\[\]]+", write([("f", {"x": 1})]))
            pieces = [*own, "<think>", "</think>", "[", "]", "(", "\n"]
            text = "".join(piece if isinstance(piece, str) else pieces[piece % len(pieces)] for piece in drawn)
            for thinking in (False, True):
                for call in parse_text(text, format=format, thinking_open=thinking).calls:
                    assert call.raw in text, write.__name__
                    assert call.ok == (call.error is None), write.__name__
                    assert call.raw, write.__name__

    @every_family
    def test_many_beginnings_take_no_longer_than_their_length(self, format: str, write: Any) -> None:
        """Four megabytes: in quadratic time this runs into the time limit of the tests."""
        text = write([("f", {"x": "zz"})])
        begun = text[: text.index("zz")] + " " * 350
        calls = parse_text(begun * 10_000, format=format).calls
        assert calls
        assert OK not in {call.status for call in calls}

    @every_family
    def test_no_beginning_is_slow_to_reject(self, format: str, write: Any) -> None:
        text = write([("f", {"x": "y"})])
        for end in range(1, len(text)):
            for filler in (" " * 200, "\n" + "<" * 200):
                assert all(call.raw for call in parse_text((text[:end] + filler) * 50, format=format).calls)


class TestPairs:
    """Values that are written without quotes."""

    SCHEMA = {  # noqa: RUF012
        "s": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "choice": {"enum": ["1", "2"]},
        "n": {"type": "integer"},
        "either": {"type": ["integer", "string"]},
        "object": {"type": "object"},
        "both": {"allOf": [{"type": "string"}, {"minLength": 1}]},
        "named": {"anyOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]},
    }
    PARAMETERS = {"properties": SCHEMA, "$defs": {"Name": {"type": "string"}}}  # noqa: RUF012
    TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]  # noqa: RUF012

    @pytest.mark.parametrize("write", [qwen3_coder, glm])
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("s", "12", "12"),
            ("s", '{"a": 1}', '{"a": 1}'),
            ("s", " padded\n", " padded\n"),
            ("choice", "1", "1"),
            ("maybe", "null", None),
            ("maybe", "nothing", "nothing"),
            ("n", "12", 12),
            ("n", "twelve", "twelve"),
            ("either", "12", 12),
            ("either", '"12"', '"12"'),
            ("either", "true", "true"),
            ("maybe", "12", "12"),
            ("maybe", '{"a": 1}', '{"a": 1}'),
            ("both", "123_456", "123_456"),
            ("both", "false", "false"),
            ("named", "12", "12"),
            ("named", "null", None),
            ("object", "{'a': [1, None, 'x']}", {"a": [1, None, "x"]}),
            ("object", "{'a': set()}", "{'a': set()}"),
            ("s", "['a']", "['a']"),
            ("unknown", "[1, 2]", [1, 2]),
            ("unknown", "true", True),
            ("unknown", '"quoted"', '"quoted"'),
            ("unknown", "plain text", "plain text"),
        ],
    )
    def test_the_schema_says_what_they_are(self, write: Any, key: str, text: str, value: Any) -> None:
        [call] = parse_text(write([("f", {key: text})]), format=write.__name__, tools=self.TOOLS).calls
        assert (call.status, call.arguments) == (OK, {key: value})

    def test_code_keeps_its_indentation(self) -> None:
        code = "    if a < b:\n        print('</parameter>')\n"
        [call] = parse_text(qwen3_coder([("f", {"s": code})]), format="qwen3_coder", tools=self.TOOLS).calls
        assert call.arguments == {"s": code}


class TestBroken:
    @pytest.mark.parametrize(
        ("format", "text", "calls", "words"),
        [
            ("qwen3_coder", "<tool_call>\n{}\n</tool_call>", [("", ODD)], "begin with <function=name>"),
            ("qwen3_coder", "<function=f>\n</function>", [("", ODD)], "begin with <tool_call>"),
            ("qwen3_coder", "<tool_call><function=></function></tool_call>", [("", NAMELESS)], "does not name"),
            (
                "qwen3_coder",
                "<tool_call><function=f><parameter=x>1</function></tool_call>",
                [("f", ODD)],
                "value of 'x' is not closed by </parameter>",
            ),
            ("qwen3_coder", "<tool_call><function=f>x=1</function></tool_call>", [("f", ODD)], "cannot be read after"),
            ("qwen3_coder", "<tool_call><function=f></function>", [("f", UNCLOSED)], "</tool_call> is missing"),
            ("glm", "<tool_call></tool_call>", [("", NAMELESS)], "does not name"),
            ("glm", '<tool_call>{"name": "f"}</tool_call>', [("", ODD)], "cannot be read"),
            ("glm", "<tool_call>f\n<arg_key>x</arg_key></tool_call>", [("f", ODD)], "cannot be read"),
            ("glm", "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1", [("f", UNCLOSED)], "is missing"),
            ("llama3_json", '{"name": "f", "parameters": {x}}', [("f", BAD)], "expected a property name"),
            ("llama3_json", '{"name": "f", "parameters": {"x"', [("f", UNCLOSED)], "found the end"),
            ("llama3_json", "<|python_tag|>print(1)", [("", BAD)], "expected a value, found 'print"),
            ("llama3_json", '{"name": "", "parameters": {}}', [("", NAMELESS)], "does not name"),
            ("llama3_json", '{"name": "f", "parameters": [1]}', [("f", ODD)], "not an array"),
            ("pythonic", "[f(x=)]", [("", BAD)], "not valid Python: line 1"),
            ("pythonic", "[f(1)]", [("f", ODD)], "parameter=value"),
            ("pythonic", "[f(x=y), g()]", [("f", ODD), ("g", OK)], "'y' is not a literal value"),
            ("pythonic", "[f(x=open('a'))]", [("f", ODD)], "not a literal value"),
            ("pythonic", "[f(x={1: 2})]", [("f", ODD)], "not a literal value"),
            ("pythonic", "[f(x=1e999)]", [("f", ODD)], "Infinity is not a JSON"),
            ("pythonic", "[f(x='a", [("", UNCLOSED)], "] is missing"),
            ("pythonic", "[f(x=" + "[" * 300 + "]" * 300 + ")]", [("", BAD)], "nested"),
            ("pythonic", "<|python_start|>f(x=1)", [("", ODD)], "must be a list"),
            ("mistral", "[TOOL_CALLS]f[ARGS]{x}", [("f", BAD)], "expected a property name"),
            ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1[TOOL_CALLS]g{}', [("f", UNCLOSED), ("g", OK)], "found the end"),
            ("mistral", '[TOOL_CALLS][{"name": "f"}, 3]', [("f", OK), ("", ODD)], None),
            ("mistral", "[TOOL_CALLS][]", [("", ODD)], "not an array"),
            ("mistral", "[TOOL_CALLS]", [("", UNCLOSED)], "found the end"),
            (
                "deepseek",
                "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{x}<｜tool▁call▁end｜>",
                [("f", BAD)],
                "expected a property name",
            ),
            ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁call▁end｜>", [("", ODD)], "begin with a name and"),
            (
                "deepseek",
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}",
                [("f", UNCLOSED)],
                "is missing",
            ),
            (
                "deepseek",
                deepseek_v32([("f", {"x": 1})]).replace(">1<", ">a<"),
                [("f", BAD)],
                "value of 'x' is not valid JSON: line 1",
            ),
            (
                "kimi",
                "<|tool_call_begin|>f:0<|tool_call_argument_begin|>{<|tool_call_end|>",
                [("f", BAD)],
                "found the end",
            ),
            ("kimi", "<|tool_call_begin|>f:0<|tool_call_end|>", [("", ODD)], "begin with functions.name:0"),
            ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}", [("f", UNCLOSED)], "is missing"),
            ("gpt_oss", '<|channel|>commentary to=functions.f<|message|>{"x":', [("f", UNCLOSED)], "found the end"),
            ("gpt_oss", "<|channel|>commentary to=functions.f<|message|>{x}", [("f", BAD)], "a property name"),
        ],
    )
    def test_what_is_wrong_is_named(self, format: str, text: str, calls: list[Any], words: str | None) -> None:
        content, _, found = parse_text(text, format=format)
        assert [(call.name, call.status) for call in found] == calls
        assert content is None
        if words:
            assert words in (found[0].error or "")
            assert len(found[0].error or "") < 250

    def test_the_valid_ones_beside_a_broken_one_are_kept(self) -> None:
        text = qwen3_coder([("f", {"x": 1})]) + "<tool_call>\n<function=g>oops</tool_call>" + qwen3_coder([("h", {})])
        assert [(call.name, call.status) for call in parse_text(text, format="qwen3_coder").calls] == [
            ("f", OK),
            ("g", ODD),
            ("h", OK),
        ]


class TestDamaged:
    """A damaged block never acts, and nothing of its tags reaches the content."""

    TOOLS = [  # noqa: RUF012
        {
            "type": "function",
            "function": {
                "name": "write",
                "parameters": {"properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
            },
        }
    ]

    @pytest.mark.parametrize("write", [qwen3_coder, glm, deepseek_v32, minimax, minimax_m3, seed_oss, minicpm, step3])
    def test_a_parameter_that_was_not_closed_does_not_become_part_of_another(self, write: Any) -> None:
        format = next(format for format, each in WRITERS if each is write)
        written = write([("write", {"path": "a.txt", "text": "hello"})])
        head, _, rest = written.partition("a.txt")
        closing = re.match(r"\s*(?:\]<\]minimax\[>\[)?</[^>]*>", rest)
        assert closing is not None
        damaged = head + "a.txt" + rest[closing.end() :]
        content, _, [call] = parse_text(damaged, format=format, tools=self.TOOLS)
        assert (call.name, call.status, content) == ("write", ODD, None)
        assert "'path' is not closed" in (call.error or "")

    @pytest.mark.parametrize("write", [qwen3_coder, minimax, seed_oss])
    def test_a_value_that_quotes_a_whole_parameter_is_data(self, write: Any) -> None:
        format = next(format for format, each in WRITERS if each is write)
        text = (
            "see " + re.findall(r"(<parameter.*?</parameter>)", write([("f", {"path": "x"})]), re.DOTALL)[0] + " there"
        )
        [call] = parse_text(write([("write", {"text": text})]), format=format, tools=self.TOOLS).calls
        assert (call.arguments, call.status) == ({"text": text}, OK)

    @pytest.mark.parametrize(
        ("format", "text"),
        [
            ("kimi", "<|tool_calls_section_begin|>"),
            ("kimi", "I look.<|tool_calls_section_begin|><|tool_call_be"),
            ("deepseek", "I look.\n<｜DSML｜tool_calls>\n<｜DSML｜inv"),
            ("minimax", "I look.\n<minimax:tool_call>\n<invoke na"),
            ("minimax_m3", "I look.\n]<]minimax[>[<tool_call>\n]<]minimax[>[<inv"),
            ("step3", "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>f"),
            ("seed_oss", "I look. <seed:tool_call>\n<function=f>"),
            ("qwen3_coder", "I look. <tool_call>\n<function=f>"),
        ],
    )
    def test_a_section_without_a_call_is_a_call_that_was_begun(self, format: str, text: str) -> None:
        content, _, [call] = parse_text(text, format=format)
        assert call.status is UNCLOSED
        assert content in (None, "I look.")

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            (" to=functions.f<|channel|>commentary json", "f"),
            ('<|channel|>commentary to=functions.f <|constrain|>json{"x": 1}', "f"),
            ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f", "f"),
        ],
    )
    def test_a_header_that_does_not_come_to_its_message(self, text: str, name: str) -> None:
        content, _, [call] = parse_text(text, format="gpt_oss")
        assert (content, call.name, call.status) == (None, name, UNCLOSED)
        assert "<|message|>" in (call.error or "")

    def test_a_header_that_was_cut_off_is_no_answer(self) -> None:
        assert parse_text("<|channel|>fin", format="gpt_oss") == (None, None, [])
        written = 'I look.\n{"type": "function", "name": "f", "parameters": '
        for end in range(written.index("f", 30), len(written)):
            content, _, [call] = parse_text(written[:end], format="llama3_json")
            assert (content, call.status) == ("I look.", UNCLOSED)


class TestValuesWithinValues:
    """MiniMax-M3 writes objects and lists as tags within tags."""

    PLACE: ClassVar = {"type": "object", "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}}
    PROPERTIES: ClassVar = {
        "places": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
        "item": {"type": "object", "properties": {"item": {"type": "string"}}},
        "names": {"type": "array", "items": {"type": "string"}},
        "none": {"type": "array"},
    }
    TOOLS: ClassVar = [
        {
            "type": "function",
            "function": {
                "name": "look",
                "parameters": {"type": "object", "properties": PROPERTIES, "$defs": {"Place": PLACE}},
            },
        }
    ]

    @staticmethod
    def written(tags: str) -> str:
        call = f'<tool_call>\n<invoke name="look">{tags}</invoke>\n</tool_call>'
        return re.sub("<(?=[^<>]*>)", "]<]minimax[>[<", call)

    def test_they_are_of_the_types_that_the_schema_has_for_them(self) -> None:
        tags = (
            "<places><item><path>7</path><line>7</line></item><item><path>a b\n</path></item></places>"
            "<item><item>7</item></item><names><item>true</item></names><none></none><other><x>7</x></other>"
        )
        [call] = parse_text(self.written(tags), format="minimax_m3", tools=self.TOOLS).calls
        assert call.ok
        assert call.arguments == {
            "places": [{"path": "7", "line": 7}, {"path": "a b\n"}],
            "item": {"item": "7"},
            "names": ["true"],
            "none": [],
            "other": {"x": 7},
        }

    @pytest.mark.parametrize(
        ("tags", "fault"),
        [
            ("<places><item>7</places>", "'item' is not closed"),
            ("<places>", "'places' is not closed"),
            ("<places><item>7</item>rest</places>", "Beside the values in 'places' there is 'rest'"),
            ("words", "there is 'words'"),
            ("<deep>" * 200 + "</deep>" * 200, "'deep' is not closed"),
        ],
    )
    def test_damaged_they_are_no_call(self, tags: str, fault: str) -> None:
        content, _, [call] = parse_text(self.written(tags), format="minimax_m3", tools=self.TOOLS)
        assert (call.name, call.status, call.arguments, content) == ("look", ODD, {}, None)
        assert fault in (call.error or "")

    def test_a_call_that_is_not_closed_ends_where_the_next_begins(self) -> None:
        text = self.written('<names><item>a</item></names><invoke name="look"><names></names>')
        _, _, [broken, whole] = parse_text(text, format="minimax_m3", tools=self.TOOLS)
        assert (broken.status, whole.status, whole.arguments) == (UNCLOSED, OK, {"names": []})


class TestMentions:
    """A call begins where the format lets it: prose may speak of its tags."""

    @pytest.mark.parametrize(
        ("format", "text"),
        [
            ("hermes", "Some models write `<tool_call>` and then JSON; others write Python."),
            ("hermes", "Put the JSON between `<tool_call>` and `</tool_call>`."),
            ("hermes", 'The tag "<tool_call>" begins it.'),
            ("hermes", "They begin with <tool_call> each."),
            ("qwen3_coder", "Some models write `<tool_call>` and then JSON."),
            ("glm", "Some models write `<tool_call>` and then JSON."),
            ("glm", "Put it between `<tool_call>` and `</tool_call>`."),
            ("seed_oss", "The tag `<seed:tool_call>` begins it."),
            ("minimax", "The tag `<minimax:tool_call>` begins it."),
            ("apriel", "The tag `<tool_calls>` begins it."),
            ("lfm2", "The tag `<function_calls>` begins it."),
        ],
    )
    def test_it_is_an_answer(self, format: str, text: str) -> None:
        assert parse_text(text, format=format) == (text, None, [])

    @pytest.mark.parametrize(
        "text",
        [
            'I look. <tool_call>{"name": "f"',
            "I look.\n<tool_call>\nf(x=1)",
            "I look. <tool_call>f(x=1)</tool_call>",
            "I look. <tool_call>",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call> <tool_call>f',
        ],
    )
    def test_what_was_meant_as_a_call_is_one(self, text: str) -> None:
        assert not parse_text(text).calls[-1].ok


class TestReasoning:
    @pytest.mark.parametrize("opened", [False, True])
    def test_in_the_tags_that_it_is_told(self, opened: bool) -> None:
        text = ("" if opened else "<mm:think>") + "Hm.</mm:think>Hello." + minimax([("f", {})])
        parsed = parse_text(text, format="minimax", thinking_open=opened, reasoning_tags=("<mm:think>", "</mm:think>"))
        assert (parsed.content, parsed.reasoning, read(parsed.calls)) == ("Hello.", "Hm.", [("f", {}, OK)])

    @pytest.mark.parametrize(
        ("format", "opening", "closing"),
        [
            ("seed_oss", "<seed:think>", "</seed:think>"),
            ("command_r", "<|START_THINKING|>", "<|END_THINKING|>"),
            ("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
            ("gemma", "<|channel>thought\n", "<channel|>"),
            ("lfm2", "<|thought_start|>", "<|thought_end|>"),
            ("mistral", "[THINK]", "[/THINK]"),
            ("glm", "<think>", "</think>"),
        ],
    )
    def test_in_the_tags_of_the_format(self, format: str, opening: str, closing: str) -> None:
        assert parse_text(f"{opening}Hm.{closing}Hello.", format=format) == ("Hello.", "Hm.", [])


class TestWhatIsNoCall:
    @pytest.mark.parametrize(
        ("format", "text"),
        [
            ("llama3_json", 'The file says {"name": "f", "parameters": {}} in one line.'),
            ("llama3_json", '{"name": "Ada", "born": 1815}'),
            ("llama3_json", '{"files": ["a"]}'),
            ("pythonic", "See [print()](https://docs.python.org)."),
            ("pythonic", "[print()](https://docs.python.org)"),
            ("pythonic", "[1, 2, f(3)]"),
            ("mistral", "A list: [1, 2]"),
            ("qwen3_coder", "In XML one would write <function=f> here."),
            ("gpt_oss", "<|channel|>final<|message|>Use to=functions.f for that."),
        ],
    )
    def test_an_answer_that_looks_a_little_like_one(self, format: str, text: str) -> None:
        content, _, calls = parse_text(text, format=format)
        assert calls == []
        assert content == text.rpartition("<|message|>")[2]


class TestDetails:
    def test_the_ids_that_a_model_writes_are_kept_beside_our_own(self) -> None:
        calls: list[Call] = [("f", {}), ("g", {})]
        assert [call.sampled_id for call in parse_text(kimi(calls), format="kimi").calls] == [
            "functions.f:0",
            "functions.g:1",
        ]
        for write in (mistral_v7, mistral_v11):
            assert [call.sampled_id for call in parse_text(write(calls), format="mistral").calls] == ["a1B2c3D4e"] * 2

    def test_pythonic_forgives_json_words_and_keeps_raw_strings(self) -> None:
        text = r"""[a.b(x=true, y=null, z=-1.5, s='\d+', r=r'\n', t=("a" 'b', 1))]"""
        [call] = parse_text(text, format="pythonic").calls
        expected = {"x": True, "y": None, "z": -1.5, "s": r"\d+", "r": r"\n", "t": ["ab", 1]}
        assert (call.name, call.arguments) == ("a.b", expected)

    def test_gemma_writes_none_as_python_does(self) -> None:
        [call] = parse_text('<|tool_call>call:f{x:[None,true,<|"|>None<|"|>]}<tool_call|>', format="gemma").calls
        assert call.arguments == {"x": [None, True, "None"]}

    def test_mistral_reasons_between_tags_of_its_own(self) -> None:
        text = "[THINK]Hm.[/THINK]" + mistral_v13([("f", {"x": "[/THINK]"})])
        content, reasoning, [call] = parse_text(text, format="mistral")
        assert (content, reasoning, call.arguments) == (None, "Hm.", {"x": "[/THINK]"})

    @pytest.mark.parametrize(
        "head",
        [
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
            "<|channel|>commentary to=functions.f<|constrain|>json<|message|>",
            " to=functions.f<|channel|>commentary json<|message|>",
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>",
            "<|channel|>analysis to=f code<|message|>",
        ],
    )
    @pytest.mark.parametrize("end", ["", "<|call|>", "<|end|>"])
    def test_harmony_names_the_recipient_in_several_places(self, head: str, end: str) -> None:
        text = f'{head}{{"x": "<|call|>"}}{end}'
        content, reasoning, [call] = parse_text(text, format="gpt_oss")
        assert (content, reasoning, call.name, call.arguments, call.status) == (None, None, "f", {"x": "<|call|>"}, OK)
        assert call.raw == text

    def test_harmony_without_channels_is_an_answer(self) -> None:
        assert parse_text("Hello.", format="gpt_oss") == ("Hello.", None, [])
        assert parse_text("Hm", format="gpt_oss", thinking_open=True) == (None, "Hm", [])


class TestFromOutside:
    """A format that is not the package's own, registered as those are."""

    END = block_end("</invoke>", "<invoke ")

    @classmethod
    def read(cls, scan: Scan, opening: re.Match[str]) -> Read:
        return read_json(scan, opening.start(), opening.end(), cls.END, opening["name"])

    @pytest.fixture(autouse=True)
    def registered(self) -> Iterator[Format]:
        invoke = Format(
            name="invoke",
            parse=Blocks(r'<invoke tool="(?P<name>[^"<]*)">', self.read).parse,
            mark="<invoke tool=",
            parsers=("invoke_v1",),
        )
        register(invoke)
        yield invoke
        del FORMATS["invoke"]

    def test_it_is_read(self) -> None:
        text = 'I look. <invoke tool="ls">{"x": "</invoke>"}</invoke><invoke tool="f">{"x": </invoke>'
        content, _, calls = parse_text(text, format="invoke")
        assert content == "I look."
        assert read(calls) == [("ls", {"x": "</invoke>"}, OK), ("f", {}, BAD)]
        assert "Call again with arguments as valid JSON that fit" in error_result(calls[1], None)

    def test_a_template_that_writes_it_is_recognised(self) -> None:
        tokenizer = copy.deepcopy(chatml_tokenizer())
        head, middle = '<tool_call>\\n{"name": "\' + call.name + \'", "arguments": ', "}\\n</tool_call>"
        template = tokenizer.chat_template.replace(head, "<invoke tool=\"' + call.name + '\">")
        tokenizer.chat_template = template.replace(middle, "</invoke>")
        renderer = renderer_for(tokenizer)
        assert renderer.tool_format == "invoke"
        ids = tokenizer.encode('<invoke tool="ls">{"x": 1}</invoke><|im_end|>', add_special_tokens=False)
        assert read(renderer.parse(ids, None, []).calls) == [("ls", {"x": 1}, OK)]

    @pytest.mark.parametrize("name", ["invoke", "invoke_v1"])
    def test_it_is_found_by_the_names_of_its_parsers(self, registered: Format, name: str) -> None:
        assert format_named(name) is registered
        managed = ExactManagedServer(ScriptedServer([]), chatml_tokenizer(), tool_parser=name)
        assert managed.backend.renderer.tool_format == "invoke"

    @pytest.mark.parametrize(
        ("name", "parsers"), [("invoke", ()), ("glm45", ()), ("x", ("invoke_v1",)), ("x", ("glm",))]
    )
    def test_a_name_is_taken_once(self, registered: Format, name: str, parsers: tuple[str, ...]) -> None:
        with pytest.raises(ConfigurationError, match="already a tool-call format named"):
            register(Format(name=name, parse=registered.parse, mark="x", parsers=parsers))
