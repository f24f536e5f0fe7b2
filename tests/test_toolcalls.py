"""Calls in Hermes' format, reasoning around them, their validation, and what the model is told."""

from __future__ import annotations

import json
import re
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion_message_tool_call import ChatCompletionMessageToolCall

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.testing import tool_call
from hermes_atropos.toolcalls import (
    ParseStatus,
    ToolCall,
    error_result,
    from_openai,
    parse_text,
    tool_response,
    tools_prompt,
    validate,
)

TERMINAL = {
    "type": "function",
    "function": {
        "name": "terminal",
        "description": "Run a command. <b>Mind the quotes</b>: “so”.",
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "string"},
                "timeout": {"type": "integer"},
                "background": {"type": "boolean"},
                "env": {"type": "object", "additionalProperties": {"type": "string"}},
                "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "steps": {"type": "array", "items": {"type": "object", "required": ["do"]}},
            },
            "required": ["command"],
        },
    },
}
READ_FILE = {"type": "function", "function": {"name": "read_file", "description": "Read a file."}}
TOOLS = [TERMINAL, READ_FILE]

BAD, ODD, NAMELESS = ParseStatus.INVALID_JSON, ParseStatus.MALFORMED, ParseStatus.MISSING_NAME

MARKUP = ["<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "rm", "arguments": {}}', "\\", '"', "}", "\n"]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(MARKUP)), max_size=6).map("".join)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=4)
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,12}", fullmatch=True)
PROSE = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=20)


def statuses(calls: list[ToolCall]) -> list[ParseStatus]:
    return [call.status for call in calls]


class TestContent:
    def test_an_answer_without_calls_is_its_content(self) -> None:
        assert parse_text(" Three files.\n") == ("Three files.", None, [])

    def test_an_empty_answer_has_nothing(self) -> None:
        assert parse_text(" \n") == (None, None, [])

    def test_a_call_leaves_the_text_around_it(self) -> None:
        content, _, [call] = parse_text(f"I look.\n{tool_call('terminal', command='ls')}\nDone.")
        assert content == "I look.\n\nDone."
        assert (call.name, call.arguments, call.ok, call.error) == ("terminal", {"command": "ls"}, True, None)
        assert call.raw == tool_call("terminal", command="ls")

    def test_the_same_call_twice_is_two_calls_with_ids_of_their_own(self) -> None:
        calls = parse_text(tool_call("terminal", command="ls") * 2).calls
        assert len({call.id for call in calls}) == 2
        assert calls[0].arguments == calls[1].arguments
        assert all(call.id.startswith("call_") and len(call.id) == 29 for call in calls)

    @given(st.lists(st.tuples(PROSE, NAME, ARGUMENTS), max_size=4), PROSE)
    def test_whatever_arguments_are_written_are_read(self, written: list[tuple[str, str, dict]], last: str) -> None:
        text = "".join(before + tool_call(name, **arguments) for before, name, arguments in written) + last
        content, reasoning, calls = parse_text(text)
        assert [(call.name, call.arguments) for call in calls] == [(name, given) for _, name, given in written]
        assert all(call.ok for call in calls)
        assert (content or "") == ("".join(before for before, _, _ in written) + last).strip()
        assert reasoning is None

    @given(NAME, ARGUMENTS)
    def test_escaped_characters_are_read_like_others(self, name: str, arguments: dict) -> None:
        [call] = parse_text(f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>").calls
        assert call.arguments == arguments

    @given(st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=5), st.characters(categories=["Cs"]))))
    def test_no_text_makes_it_raise_and_every_call_says_where_it_stood(self, pieces: list[str]) -> None:
        text = "".join(pieces)
        for thinking in (False, True):
            content, reasoning, calls = parse_text(text, thinking_open=thinking)
            json.dumps(
                [content, reasoning, [call.model_dump(mode="json") for call in calls]], ensure_ascii=False
            ).encode()
            for call in calls:
                assert call.raw
                assert call.raw in text.encode("utf-8", "replace").decode()
                assert call.ok == (call.error is None)
                assert ToolCall.model_validate_json(call.model_dump_json()) == call

    def test_an_unknown_format_is_refused_with_those_that_there_are(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'hermse'.*, hermes, "):
            parse_text("", format="hermse")

    def test_parse_from_text_gives_the_calls_alone(self) -> None:
        assert [call.name for call in ToolCall.parse_from_text(f"a{tool_call('f')}b{tool_call('g')}")] == ["f", "g"]


class TestForms:
    """What is forgiven, and what is not."""

    def test_arguments_as_a_json_string_are_decoded(self) -> None:
        [call] = parse_text(tool_call("f").replace("{}", json.dumps('{"x": "</tool_call>"}'))).calls
        assert (call.status, call.arguments) == (ParseStatus.OK, {"x": "</tool_call>"})

    def test_parameters_stand_for_arguments(self) -> None:
        [call] = parse_text('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>').calls
        assert (call.status, call.arguments) == (ParseStatus.OK, {"x": 1})

    @pytest.mark.parametrize(
        "body", ['{"name": "f"}', '{"name": "f", "arguments": null}', '{"name": "f", "arguments": ""}']
    )
    def test_no_arguments_are_empty_arguments(self, body: str) -> None:
        [call] = parse_text(f"<tool_call>{body}</tool_call>").calls
        assert (call.status, call.arguments) == (ParseStatus.OK, {})

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            ('{"arguments": {}}', NAMELESS, "does not name a tool"),
            ('{"name": " ", "arguments": {}}', NAMELESS, "does not name a tool"),
            ('{"name": 3, "arguments": {}}', NAMELESS, "must be a string"),
            ('[{"name": "f"}]', ODD, "must be a JSON object .*, not an array"),
            ('"f"', ODD, "not a string"),
            ('{"name": "f", "arguments": [1]}', ODD, "arguments of 'f' must be a JSON object, not an array"),
            ('{"name": "f", "arguments": "3"}', ODD, "not a number"),
            ('{"name": "f", "arguments": "{x}"}', BAD, "arguments of 'f' .* column 2: expected a prop"),
            ("", BAD, "line 1, column 1: expected a value, found the end"),
            ('{"name": "f", "arguments": {"x": 1}', BAD, "column 36: expected ',' or .*, found the end"),
            ('{"name": "f"}}', BAD, "column 14: expected nothing after the JSON, found '}'"),
            ('{"name": "f"} {"name": "g"}', BAD, "expected nothing after the JSON"),
            ('\n{"name": "f",\n "arguments": {"x": \'1\'}}\n', BAD, "line 2, column 21: .*'1'}}"),
            ('{"name": "f", "arguments": {"x": "a\nb"}}', BAD, r"escaped, a newline as \\n"),
            ('{"name": "f", "arguments": {"x": "\\d"}}', BAD, "expected one of the escapes"),
            ('{"name": "f", "arguments": {"x": NaN}}', BAD, "NaN is not a JSON value"),
            ('{"name": "f", "arguments": {"x": 1e999}}', BAD, "1e999 is too large"),
            ('{"name": "f", "arguments": {"x": "\\ud83d"}}', BAD, "half of a surrogate pair"),
            ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", BAD, "too many digits"),
            ('{"name": "f", "arguments": ' + '{"x":' * 200 + "1" + "}" * 201, BAD, "deeper than 128"),
            ('{"name": "f", "arguments": ' + '{"x":' * 50000, BAD, "deeper than 128"),
        ],
    )  # fmt: skip
    def test_a_broken_call_says_what_is_wrong(self, body: str, status: ParseStatus, words: str) -> None:
        content, _, [call] = parse_text(f"a<tool_call>{body}</tool_call>b")
        assert (call.status, call.arguments, call.ok) == (status, {}, False)
        assert call.error is not None
        assert re.search(words, call.error)
        assert call.error.count("\n") == 0
        assert len(call.error) < 250
        assert call.raw == f"<tool_call>{body}</tool_call>"
        assert content == "ab"

    def test_a_broken_call_still_says_which_tool_it_meant(self) -> None:
        [call] = parse_text('<tool_call>{"name": "terminal", "arguments": {"command": "a"b"}}</tool_call>').calls
        assert (call.status, call.name) == (ParseStatus.INVALID_JSON, "terminal")

    def test_a_deep_call_survives_a_record(self) -> None:
        deep: dict[str, Any] = {}
        for _ in range(120):
            deep = {"x": deep}
        [call] = parse_text(tool_call("f", deep=deep)).calls
        assert ToolCall.model_validate_json(call.model_dump_json()).arguments == {"deep": deep}
        assert json.loads(call.to_openai()["function"]["arguments"]) == {"deep": deep}

    def test_valid_and_broken_calls_stay_in_their_order(self) -> None:
        text = tool_call("f") + '<tool_call>{"name": "g", "arguments": {"x": "oops}}</tool_call>' + tool_call("h")
        calls = parse_text(text).calls
        assert [call.name for call in calls] == ["f", "g", "h"]
        assert statuses(calls) == [ParseStatus.OK, ParseStatus.INVALID_JSON, ParseStatus.OK]

    def test_a_call_that_the_end_cuts_off_is_unclosed(self) -> None:
        content, _, [call] = parse_text('I write. <tool_call>\n{"name": "f", "arguments": {"x": "abc')
        assert (content, call.status, call.name) == ("I write.", ParseStatus.UNCLOSED_BLOCK, "f")
        assert "</tool_call> is missing" in (call.error or "")
        assert "expected a closing quote" in (call.error or "")

    def test_a_whole_call_without_its_closing_tag_keeps_what_it_says(self) -> None:
        content, _, calls = parse_text('<tool_call>{"name": "f", "arguments": {"x": 1}} and' + tool_call("g"))
        assert statuses(calls) == [ParseStatus.UNCLOSED_BLOCK, ParseStatus.OK]
        assert (calls[0].name, calls[0].arguments, content) == ("f", {"x": 1}, "and")

    def test_a_call_within_a_string_of_a_broken_call_is_never_run(self) -> None:
        inner = json.dumps(tool_call("delete_everything"))
        calls = parse_text(f'<tool_call>{{"name": "write", "arguments": {{"text": {inner},}}}}</tool_call>').calls
        assert [(call.name, call.status) for call in calls] == [("write", ParseStatus.INVALID_JSON)]

    def test_a_closing_tag_that_nothing_opened_is_text(self) -> None:
        assert parse_text("a</tool_call>b") == ("a</tool_call>b", None, [])


class TestReasoning:
    def test_before_a_call(self) -> None:
        content, reasoning, [call] = parse_text(f"<think>\nI list.\n</think>\n\n{tool_call('f')}")
        assert (content, reasoning, call.name) == (None, "I list.", "f")

    def test_between_calls(self) -> None:
        text = f"<think>one</think>{tool_call('f')}<think>two</think>{tool_call('g')}Done."
        content, reasoning, calls = parse_text(text)
        assert (content, reasoning, [call.name for call in calls]) == ("Done.", "one\ntwo", ["f", "g"])

    def test_opened_by_the_prompt(self) -> None:
        text = f"I list.</think>{tool_call('f')}"
        content, reasoning, [call] = parse_text(text, thinking_open=True)
        assert (content, reasoning, call.name) == (None, "I list.", "f")

    def test_closed_but_opened_by_nobody_we_know_of(self) -> None:
        assert parse_text("I think.</think>Hello.") == ("Hello.", "I think.", [])

    def test_a_second_closing_tag_is_text(self) -> None:
        assert parse_text("<think>a</think>It ends with </think>.") == ("It ends with </think>.", "a", [])

    @pytest.mark.parametrize(("text", "thinking_open"), [("<think>Hm, let", False), ("Hm, let", True)])
    def test_unclosed_it_goes_to_the_end(self, text: str, thinking_open: bool) -> None:
        assert parse_text(text, thinking_open=thinking_open) == (None, "Hm, let", [])

    def test_calls_in_it_count_where_the_content_is_empty(self) -> None:
        content, reasoning, [call] = parse_text(f"<think>I list.\n{tool_call('f', x=1)}")
        assert (content, reasoning, call.name, call.arguments) == (None, "I list.", "f", {"x": 1})

    @pytest.mark.parametrize("answer", ["Hello.", tool_call("g")])
    def test_calls_in_it_are_drafts_where_there_is_an_answer(self, answer: str) -> None:
        draft = f"Perhaps {tool_call('f')}?"
        content, reasoning, calls = parse_text(f"<think>{draft}</think>{answer}")
        assert reasoning == draft
        assert [call.name for call in calls] == (["g"] if content is None else [])

    def test_a_broken_draft_does_not_hide_its_end(self) -> None:
        content, reasoning, [call] = parse_text(f'<think>{{ <tool_call>{{"name": "f</think>{tool_call("g")}')
        assert (content, reasoning, call.name) == (None, '{ <tool_call>{"name": "f', "g")

    @pytest.mark.parametrize("tag", ["</think>", "<think>", "<think>a</think>"])
    @pytest.mark.parametrize("before", ["", "<think>", "<think>Hm.</think>", "Hello. "])
    def test_its_tags_within_arguments_are_data(self, tag: str, before: str) -> None:
        [call] = parse_text(before + tool_call("write", text=tag)).calls
        assert call.arguments == {"text": tag}

    @given(PROSE, PROSE, NAME, ARGUMENTS)
    def test_reasoning_never_takes_part_of_a_call(self, thought: str, answer: str, name: str, arguments: dict) -> None:
        written = tool_call(name, **arguments)
        for text, opened in [
            (f"<think>{thought}</think>{answer}{written}", False),
            (f"{thought}</think>{answer}{written}", True),
        ]:
            content, reasoning, [call] = parse_text(text, thinking_open=opened)
            assert (call.name, call.arguments) == (name, arguments)
            assert (content or "", reasoning or "") == (answer.strip(), thought.strip())


class TestSize:
    """What would take minutes in quadratic time."""

    def test_a_megabyte_of_argument(self) -> None:
        text = 'a"\\\n</tool_call><tool_call>{"name": "g"}' * 30_000
        [call] = parse_text(tool_call("write", text=text)).calls
        assert call.arguments == {"text": text}

    def test_a_megabyte_of_nested_argument(self) -> None:
        rows = [{"id": number, "tags": ["<tool_call>", None, True, 1.5]} for number in range(20_000)]
        [call] = parse_text(f"<think>hm</think>{tool_call('write', rows=rows)}").calls
        assert call.arguments == {"rows": rows}

    @pytest.mark.parametrize(
        "block", ["<tool_call>", "<tool_call>{", '<tool_call>{"a": "', '<tool_call>"', '<tool_call>{"name": "f"}']
    )
    @pytest.mark.parametrize("before", ["", "<think>"])
    def test_ten_thousand_unclosed_calls(self, block: str, before: str) -> None:
        text = before + (block + " " * 300) * 10_000
        calls = parse_text(text).calls
        assert ParseStatus.OK not in statuses(calls)
        assert "".join(call.raw for call in calls).replace(" ", "") == text.removeprefix("<think>").replace(" ", "")

    def test_ten_thousand_thoughts(self) -> None:
        text = "<think>a <tool_call>{</think>b" * 10_000
        content, reasoning, calls = parse_text(text)
        assert (content, reasoning, calls) == ("b" * 10_000, "\n".join(["a <tool_call>{"] * 10_000), [])


class TestNative:
    def test_dicts_and_objects_are_read_alike(self) -> None:
        written = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": "</tool_call>"}'}}
        native = ChatCompletionMessageToolCall.model_validate(written)
        for call in from_openai([written]) + from_openai([native]):
            assert (call.id, call.name, call.arguments, call.ok) == ("call_1", "f", {"x": "</tool_call>"}, True)
            assert call.raw == written["function"]["arguments"]

    def test_none_is_no_call(self) -> None:
        assert from_openai(None) == []

    @pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}', ' {"x": 1}\n'])
    def test_arguments_are_text_or_an_object(self, arguments: Any) -> None:
        [call] = from_openai([{"id": "a", "function": {"name": "f", "arguments": arguments}}])
        assert (call.arguments, call.ok) == ({"x": 1}, True)

    @pytest.mark.parametrize("arguments", ["", None, "{}", "null"])
    def test_none_at_all_are_empty_ones(self, arguments: Any) -> None:
        [call] = from_openai([{"id": "a", "function": {"name": "f", "arguments": arguments}}])
        assert (call.arguments, call.ok) == ({}, True)

    def test_broken_arguments_never_become_empty_ones_in_silence(self) -> None:
        [call] = from_openai([{"id": "a", "function": {"name": "f", "arguments": '{"x": 1'}}])
        assert (call.id, call.name, call.status, call.raw) == ("a", "f", ParseStatus.INVALID_JSON, '{"x": 1')
        assert "line 1, column 8" in (call.error or "")

    @pytest.mark.parametrize(
        "item", [{}, {"function": None}, {"function": {"arguments": "{}"}}, SimpleNamespace(id=None)]
    )
    def test_a_call_without_a_name_is_kept(self, item: Any) -> None:
        assert statuses(from_openai([item])) == [ParseStatus.MISSING_NAME]

    def test_ids_that_are_empty_or_stand_twice_are_replaced(self) -> None:
        function = {"name": "f", "arguments": "{}"}
        ids = [call.id for call in from_openai([{"id": each, "function": function} for each in ["a", "a", "", None]])]
        assert ids[0] == "a"
        assert len(set(ids)) == 4

    @given(NAME, ARGUMENTS)
    def test_what_is_handed_on_comes_back(self, name: str, arguments: dict) -> None:
        call = ToolCall(name=name, arguments=arguments)
        [back] = from_openai([call.to_openai()])
        assert (back.id, back.name, back.arguments, back.ok) == (call.id, name, arguments, True)


class TestValidation:
    def check(self, *calls: ToolCall, tools: Any = TOOLS) -> list[ToolCall]:
        return validate(calls, tools)

    def test_what_fits_is_left_alone(self) -> None:
        call = ToolCall(name="terminal", arguments={"command": "ls", "timeout": 3, "limit": None, "unknown": [1]})
        assert self.check(call) == [call]

    def test_a_tool_without_a_schema_takes_any_object(self) -> None:
        assert self.check(ToolCall(name="read_file", arguments={"a": 1}))[0].ok

    def test_an_unknown_tool_is_answered_with_the_nearest(self) -> None:
        [call] = self.check(ToolCall(name="Termnal"))
        assert call.status is ParseStatus.UNKNOWN_TOOL
        assert call.error == "There is no tool named 'Termnal'. Did you mean 'terminal'?"

    def test_or_with_all_of_them(self) -> None:
        [call] = self.check(ToolCall(name="x" * 100_000))
        assert (call.error or "").endswith("The tools are: read_file, terminal.")
        assert len(call.error or "") < 200

    def test_without_tools_nothing_can_be_called(self) -> None:
        [call] = self.check(ToolCall(name="terminal"), tools=None)
        assert (call.status, call.error) == (
            ParseStatus.UNKNOWN_TOOL,
            "There is no tool named 'terminal'. No tools can be called here.",
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({}, "'command' is a required property"),
            ({"command": 3}, "command: 3 is not of type 'string'"),
            ({"command": "ls", "timeout": "soon"}, "timeout: 'soon' is not of type 'integer'"),
            ({"command": "ls", "env": {"A": 1}}, "env.A: 1 is not of type 'string'"),
            ({"command": "ls", "steps": [{"do": 1}, {}]}, "steps[1]: 'do' is a required property"),
            ({"command": "ls", "limit": "much"}, "limit: 'much' is not"),
        ],
    )
    def test_arguments_that_do_not_fit_are_named(self, arguments: dict, words: str) -> None:
        given = ToolCall(name="terminal", arguments=arguments)
        [call] = self.check(given)
        assert (call.status, call.arguments, call.id) == (ParseStatus.INVALID_ARGUMENTS, arguments, given.id)
        assert (call.error or "").startswith(f"The arguments of 'terminal' do not fit its schema: {words}")
        assert given.ok

    def test_three_faults_are_enough_and_a_huge_value_is_not_repeated(self) -> None:
        [call] = self.check(ToolCall(name="terminal", arguments={"command": ["x" * 10_000] * 100, "steps": [1] * 100}))
        assert (call.error or "").count(";") == 2
        assert len(call.error or "") < 1000

    @pytest.mark.parametrize(
        ("name", "written", "meant"),
        [
            ("timeout", "5", 5),
            ("background", "true", True),
            ("background", "False", False),
            ("limit", "2.5", 2.5),
            ("limit", "null", None),
            ("env", '{"A": "b"}', {"A": "b"}),
            ("steps", '[{"do": 1}]', [{"do": 1}]),
            ("steps", ['{"do": 1}', {"do": "2"}], [{"do": 1}, {"do": "2"}]),
        ],
    )
    def test_a_quoted_value_is_taken_as_what_it_says(self, name: str, written: Any, meant: Any) -> None:
        given = {"command": "5", name: written}
        call = ToolCall(name="terminal", arguments=dict(given))
        [valid] = self.check(call)
        assert call.arguments == given
        assert (valid.status, valid.arguments) == (ParseStatus.OK, {"command": "5", name: meant})

    def test_calls_that_were_broken_stay_as_they_are(self) -> None:
        call = ToolCall(name="terminal", status=ParseStatus.INVALID_JSON, error="…")
        assert self.check(call, tools=None) == [call]

    def test_definitions_without_their_envelope_are_tools_too(self) -> None:
        assert self.check(ToolCall(name="terminal", arguments={"command": "ls"}), tools=[TERMINAL["function"]])[0].ok

    @pytest.mark.parametrize(
        "parameters",
        [
            {"type": "objekt"},
            {"properties": {"x": {"type": 3}}},
            {"properties": {"x": {"pattern": "("}}},
            {"properties": {"x": {"$ref": "#/nowhere"}}},
            "nonsense",
            None,
        ],
    )
    def test_a_schema_that_is_itself_broken_asks_for_an_object_alone(self, parameters: Any) -> None:
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        assert self.check(ToolCall(name="f", arguments={"x": "y"}), tools=tools)[0].ok

    def test_a_schema_calls_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            pytest.fail("a socket was opened")

        monkeypatch.setattr(socket, "socket", refuse)
        tools = [{"function": {"name": "f", "parameters": {"$ref": "http://127.0.0.1:9/schema.json"}}}]
        assert self.check(ToolCall(name="f"), tools=tools)[0].ok

    def test_a_schema_that_changes_counts_as_it_is_now(self) -> None:
        tool: Any = {"function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}
        assert not self.check(ToolCall(name="f"), tools=[tool])[0].ok
        tool["function"]["parameters"]["required"].clear()
        assert self.check(ToolCall(name="f"), tools=[tool])[0].ok

    def test_references_within_the_schema_hold(self) -> None:
        parameters = {"$defs": {"n": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/n"}}}
        tools = [{"function": {"name": "f", "parameters": parameters}}]
        wrong, quoted = self.check(
            ToolCall(name="f", arguments={"x": "y"}), ToolCall(name="f", arguments={"x": "7"}), tools=tools
        )
        assert wrong.status is ParseStatus.INVALID_ARGUMENTS
        assert quoted.arguments == {"x": 7}

    @settings(max_examples=50)
    @given(JSON)
    def test_no_schema_makes_it_raise(self, parameters: Any) -> None:
        tools = [{"function": {"name": "f", "parameters": parameters}}]
        assert self.check(ToolCall(name="f", arguments={"x": 1}), tools=tools)[0].name == "f"


class TestWords:
    def test_the_answer_to_a_broken_call_names_the_fault_and_shows_the_call_it_asks_for(self) -> None:
        [call] = parse_text('<tool_call>{"name": "terminal", "arguments": {"command": ls}}</tool_call>').calls
        answer = error_result(call, TOOLS)
        assert answer.startswith(f"Error: {call.error} The tool was not run. Call again with valid JSON")
        schema = json.loads(answer[answer.index('{"type"') :])
        assert schema["properties"]["name"] == {"const": "terminal"}
        assert schema["properties"]["arguments"] == TERMINAL["function"]["parameters"]
        assert schema["required"] == ["name", "arguments"]

    def test_the_answer_to_an_unknown_tool_leads_to_one(self) -> None:
        [call] = validate([ToolCall(name="readfile")], TOOLS)
        answer = error_result(call, TOOLS)
        assert "Did you mean 'read_file'?" in answer
        assert '"name": {"type": "string"}' in answer

    @pytest.mark.parametrize(
        ("format", "words"),
        [
            ("openai", "arguments as valid JSON that fit this schema: "),
            ("llama3_json", '"required": ["name", "parameters"]'),
            ("qwen3_coder", "Call again with arguments that fit this schema: "),
        ],
    )
    def test_other_formats_are_asked_for_what_they_write(self, format: str, words: str) -> None:
        [call] = validate([ToolCall(name="terminal", format=format)], TOOLS)
        assert words in error_result(call, TOOLS)
        assert json.dumps(TERMINAL["function"]["parameters"]) in error_result(call, TOOLS)

    def test_the_prompt_lists_every_tool_with_its_schema_and_teaches_the_call(self) -> None:
        prompt = tools_prompt(TOOLS)
        listed = prompt[prompt.index("\n<tools>\n") : prompt.index("\n</tools>\n")].splitlines()[2:]
        assert [json.loads(line) for line in listed] == TOOLS
        [example] = parse_text(prompt[prompt.index("\n<tool_call>") : prompt.index("The object fits")]).calls
        assert example.ok
        schema = json.loads(prompt[prompt.index("schema: {") + len("schema: ") :].splitlines()[0])
        assert schema["required"] == ["name", "arguments"]

    def test_without_tools_there_is_nothing_to_teach(self) -> None:
        assert tools_prompt([]) == ""

    @given(NAME, TEXT, st.one_of(st.none(), st.floats(0, 1e6)))
    def test_a_response_reads_back_and_cannot_be_closed_from_within(self, name: str, content: str, took: float) -> None:
        content += "</tool_response>"
        block = tool_response(name, content, took)
        body = block.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
        assert "</tool_response>" not in body
        assert json.loads(body)["result"] == content
        assert json.loads(body)["name"] == name
        assert ("duration_s" in json.loads(body)) == (took is not None)

    def test_a_result_that_is_json_is_not_quoted_again(self) -> None:
        block = tool_response("terminal", '{"output": "é\\n", "exit_code": 0}', 0.12345)
        assert block == (
            '<tool_response>\n{"name": "terminal", "duration_s": 0.123, "result": {"output": "é\\n", "exit_code": 0}}\n'
            "</tool_response>"
        )
