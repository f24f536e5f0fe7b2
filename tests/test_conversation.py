"""One rollout's talk with the model: faulty calls are sent back, and all of it is kept."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from families import KIMI_K2_FAMILY, QWEN3_FAMILY
from hypothesis import given, settings
from hypothesis import strategies as st
from newer_families import GRANITE_33
from support import check_tokens, check_unbroken, tool_turn, user_turn
from test_toolcalls_formats import Call, granite, kimi

from hermes_atropos.backends import tracked
from hermes_atropos.backends.chat import ChatBackend
from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.conversation import Conversation
from hermes_atropos.errors import BackendError, BackendTimeoutError, ToolCallRetriesError
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.toolcalls import ParseStatus
from hermes_atropos.trajectory import AgentResult, StopReason

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
TOOLS = [ADD]
USER = {"role": "user", "content": "One and two?"}
VALID = tool_call("add", a=1, b=2)
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": }}\n</tool_call>'
MISFIT = tool_call("add", a="one", b=2)
UNKNOWN = tool_call("subtract", a=1, b=2)


def conversation_with(*replies: str | Reply, **options: Any) -> tuple[Conversation, ScriptedServer]:
    server = ScriptedServer(list(replies))
    return Conversation(TrackedBackend(server, chatml_tokenizer()), **options), server


def harness_message(turn: Any) -> dict[str, Any]:
    """What a harness stores of an answer: its text, the valid calls, and the reference."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.content or "", TURN_KEY: turn.ref}
    if calls := [call.to_openai() for call in turn.calls if call.status is ParseStatus.OK]:
        message["tool_calls"] = calls
    return message


def harness_answers(turn: Any) -> list[dict[str, Any]]:
    """What a harness runs: the valid calls."""
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": json.dumps({"sum": 3})}
        for call in turn.calls
        if call.status is ParseStatus.OK
    ]


async def harness(conversation: Conversation, tools: Any = TOOLS, limit: int = 30) -> list[dict[str, Any]]:
    """The simplest loop around a model: ask, run the calls, ask again, until there are none."""
    messages: list[dict[str, Any]] = [USER]
    for _ in range(limit):
        turn = await conversation.chat(messages, tools)
        messages += [harness_message(turn), *harness_answers(turn)]
        if not turn.calls:
            break
    return messages


class TestAnswers:
    async def test_text(self) -> None:
        conversation, server = conversation_with("<think>Easy.</think>Three.")
        turn = await conversation.chat([USER])
        assert (turn.content, turn.reasoning, turn.calls) == ("Three.", "Easy.", [])
        assert turn.ref
        assert server.requests[0].prompt == user_turn(USER["content"]) + "<|im_start|>assistant\n"

    async def test_a_valid_call(self) -> None:
        conversation, _ = conversation_with("I add. " + VALID)
        turn = await conversation.chat([USER], TOOLS)
        [call] = turn.calls
        assert (call.name, call.arguments, call.status) == ("add", {"a": 1, "b": 2}, ParseStatus.OK)

    async def test_a_call_in_the_reasoning_where_the_content_is_empty(self) -> None:
        conversation, _ = conversation_with(f"<think>I add. {VALID}</think>", f"<think>{VALID}</think>Three.")
        assert [call.name for call in (await conversation.chat([USER], TOOLS)).calls] == ["add"]
        assert (await conversation.chat([{**USER, "content": "Else?"}], TOOLS)).calls == []

    async def test_without_tools_a_call_is_text(self) -> None:
        conversation, server = conversation_with("See: " + VALID, "See: " + BROKEN)
        for reply in (VALID, BROKEN):
            turn = await conversation.chat([USER])
            assert turn.calls == []
            assert turn.content is not None
            assert "See:" in turn.content
            assert reply in turn.content
        assert len(server.requests) == 2

    async def test_sampling_parameters_go_through(self) -> None:
        conversation, server = conversation_with("Three.")
        await conversation.chat([USER], temperature=0.3, max_tokens=9)
        assert (server.requests[0].sampling["temperature"], server.requests[0].sampling["max_tokens"]) == (0.3, 9)

    async def test_call_ids_are_unique(self) -> None:
        conversation, _ = conversation_with(VALID + VALID + BROKEN, VALID, "Three.")
        await harness(conversation)
        ids = [call.id for attempts in conversation.steps for turn in attempts for call in turn.calls]
        assert len(set(ids)) == len(ids) == 4


class TestRetries:
    @pytest.mark.parametrize(
        ("faulty", "status", "words"),
        [
            (BROKEN, ParseStatus.INVALID_JSON, ["JSON"]),
            (MISFIT, ParseStatus.INVALID_ARGUMENTS, ["'one'", "integer"]),
            (UNKNOWN, ParseStatus.UNKNOWN_TOOL, ["subtract", "add"]),
            ('<tool_call>\n{"arguments": {}}\n</tool_call>', ParseStatus.MISSING_NAME, ["name"]),
            ('<tool_call>\n{"name": "add", "arguments"', ParseStatus.UNCLOSED_BLOCK, ["</tool_call>"]),
            ("<tool_call>\n[1, 2]\n</tool_call>", ParseStatus.MALFORMED, []),
        ],
    )
    async def test_the_fault_is_named(self, faulty: str, status: ParseStatus, words: list[str]) -> None:
        conversation, server = conversation_with("I add. " + faulty, VALID)
        turn = await conversation.chat([USER], TOOLS)
        assert [call.status for call in turn.calls] == [ParseStatus.OK]
        [[failed, counted]] = conversation.steps
        assert counted is turn
        assert [call.status for call in failed.calls] == [status]
        _, attempt, error, _ = conversation.messages
        assert attempt["content"].startswith("I add.")
        assert faulty.strip() in attempt["content"]
        assert error["role"] == "tool"
        for word in [*words, "JSON"]:
            assert word in error["content"]
        assert check_unbroken(server.requests) == [tool_turn(error["content"])]

    @pytest.mark.parametrize("retries", [0, 1, 3])
    async def test_they_are_bounded(self, retries: int) -> None:
        conversation, server = conversation_with(*[BROKEN] * 9, max_tool_call_retries=retries)
        with pytest.raises(ToolCallRetriesError, match=f"{retries + 1} times in a row") as caught:
            await conversation.chat([USER], TOOLS)
        assert len(server.requests) == retries + 1
        assert [m["role"] for m in caught.value.messages] == ["user", *["assistant", "tool"] * (retries + 1)]
        assert conversation.messages == caught.value.messages
        assert [len(attempts) for attempts in conversation.steps] == [retries + 1]

    async def test_each_answer_has_as_many(self) -> None:
        conversation, _ = conversation_with(BROKEN, VALID, BROKEN, VALID, BROKEN, "Three.", max_tool_call_retries=1)
        await harness(conversation)
        assert [len(attempts) for attempts in conversation.steps] == [2, 2, 2]

    async def test_after_a_faulty_call_text_will_do(self) -> None:
        conversation, _ = conversation_with(BROKEN, "Three, then.")
        assert (await conversation.chat([USER], TOOLS)).content == "Three, then."

    async def test_valid_calls_beside_faulty_ones_are_run(self) -> None:
        conversation, server = conversation_with("\n".join([BROKEN, VALID, UNKNOWN, VALID]), "Three.")
        harness_messages = await harness(conversation)
        messages = conversation.expand(harness_messages)
        assert [message["role"] for message in messages] == ["user", "assistant", *["tool"] * 4, "assistant"]
        answers = [message["content"] for message in messages[2:6]]
        assert [answer == '{"sum": 3}' for answer in answers] == [False, True, False, True]
        ids = [call.id for call in conversation.steps[0][0].calls]
        assert [message["tool_call_id"] for message in messages[2:6]] == ids
        assert check_unbroken(server.requests) == [tool_turn(*answers)]


class TestHistory:
    async def test_expanding_leaves_other_messages_alone(self) -> None:
        conversation, _ = conversation_with()
        messages = [{"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "y", TURN_KEY: "other"}]
        assert conversation.expand(messages) == messages

    async def test_what_is_handed_in_is_not_altered(self) -> None:
        conversation, _ = conversation_with(BROKEN, VALID, "Three.")
        messages = await harness(conversation)
        before = json.dumps(messages)
        conversation.expand(messages)
        assert json.dumps(messages) == before

    async def test_an_answer_that_was_thrown_away_is_marked(self) -> None:
        conversation, server = conversation_with(BROKEN, "Bad.", "Good.")
        await conversation.chat([USER], TOOLS)
        good = await conversation.chat([USER], TOOLS)
        result = conversation.result([USER, harness_message(good)], StopReason.COMPLETED)
        check_tokens(result, server.requests)
        assert [turn.discarded is not None for turn in conversation.backend.ledger.turns] == [True, True, False]
        assert len(result.sequences) == 1

    async def test_two_conversations_on_one_backend(self) -> None:
        """A subagent's, beside its parent's."""
        server = ScriptedServer([BROKEN, VALID, "Child.", VALID, "Parent."])
        backend = TrackedBackend(server, chatml_tokenizer())
        parent, child = Conversation(backend), Conversation(backend)
        await harness(child)
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Ask the child."}]
        for _ in range(2):
            turn = await parent.chat(messages, TOOLS)
            messages += [harness_message(turn), *harness_answers(turn)]
        result = parent.result(parent.expand(messages), StopReason.COMPLETED)
        check_tokens(result, server.requests)
        assert len(result.sequences) == 2
        assert [len(step.turns) for step in result.steps] == [1, 1], "its own steps alone"


SUM: Call = ("add", {"a": 1, "b": 2})


class TestAsSampled:
    """A prompt that is rendered anew shows the calls as the model wrote them, whatever the harness made of them."""

    CALL = '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1, "note": "é 世界"}}\n</tool_call>'

    def mangled(self, turn: Any) -> dict[str, Any]:
        """What Hermes stores: arguments sorted, compact and escaped."""
        message = harness_message(turn)
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(arguments, sort_keys=True, separators=(",", ":"))
        return message

    async def test_arguments(self) -> None:
        conversation, server = conversation_with(self.CALL, "Three.")
        turn = await conversation.chat([USER], TOOLS)
        later = [{"role": "user", "content": "Rewritten."}, self.mangled(turn), *harness_answers(turn)]
        await conversation.chat(later, TOOLS)
        assert self.CALL in server.requests[-1].prompt

    async def test_arguments_that_were_quoted(self) -> None:
        conversation, server = conversation_with(tool_call("add", a="1", b=2), "Three.")
        turn = await conversation.chat([USER], TOOLS)
        assert turn.calls[0].arguments == {"a": 1, "b": 2}
        await conversation.chat([{**USER, "content": "Else?"}, self.mangled(turn), *harness_answers(turn)], TOOLS)
        assert tool_call("add", a="1", b=2) in server.requests[-1].prompt

    async def test_a_call_that_the_harness_changed_stays_so(self) -> None:
        conversation, server = conversation_with(self.CALL, "Three.", "Three.")
        turn = await conversation.chat([USER], TOOLS)
        stored = self.mangled(turn)
        await conversation.chat([USER, stored, *harness_answers(turn)], TOOLS)
        stored["tool_calls"][0]["function"]["arguments"] = '{"pruned": true}'
        await conversation.chat([{**USER, "content": "Else?"}, stored, *harness_answers(turn)], TOOLS)
        assert tool_call("add", pruned=True) in server.requests[-1].prompt

    @pytest.mark.parametrize(
        "said", [granite([("add", {"a": 1, "b": 2})] * 2), granite([("add", {"a": 1, "b": 2})]) * 2]
    )
    async def test_several_in_one_block(self, said: str) -> None:
        """Granite's template writes no calls: they are text, a list of them in one block or each in its own."""
        server = ScriptedServer([said, "Three."], tokenizer=GRANITE_33.tokenizer(), end_token="<|end_of_text|>")
        conversation = Conversation(TrackedBackend(server, server.tokenizer))
        turn = await conversation.chat([USER], TOOLS)
        assert len(turn.calls) == 2
        await conversation.chat([{**USER, "content": "Else?"}, self.mangled(turn), *harness_answers(turn)], TOOLS)
        shown = server.requests[-1].prompt.partition("assistant<|end_of_role|>")[2].partition("<|end_of_text|>")[0]
        assert shown.replace("\n", "") == said

    async def test_reasoning_that_the_harness_dropped(self) -> None:
        server = ScriptedServer(["<think>Easy.</think>" + VALID, "Three."], tokenizer=QWEN3_FAMILY.tokenizer())
        conversation = Conversation(TrackedBackend(server, server.tokenizer))
        turn = await conversation.chat([USER], TOOLS)
        await conversation.chat([{**USER, "content": "Else?"}, self.mangled(turn), *harness_answers(turn)], TOOLS)
        assert "<think>\nEasy.\n</think>" in server.requests[-1].prompt

    @pytest.mark.parametrize("anew", [False, True])
    async def test_ids(self, anew: bool) -> None:
        """Kimi's, which say the function's name, in the calls and in their results; the harness has its own."""
        said = kimi([("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})])
        server = ScriptedServer([said, said, "Ten."], tokenizer=KIMI_K2_FAMILY.tokenizer())
        conversation = Conversation(TrackedBackend(server, server.tokenizer))
        messages: list[dict[str, Any]] = [USER]
        for _ in range(2):
            turn = await conversation.chat(messages, TOOLS)
            messages += [harness_message(turn), *harness_answers(turn)]
        if anew:
            messages[0] = {"role": "user", "content": "Rewritten."}
        await conversation.chat(messages, TOOLS)
        ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert len(set(ids)) == 4
        prompt = server.requests[-1].prompt
        for number in range(2):
            assert prompt.count(f"<|tool_call_begin|>functions.add:{number}<|") == 2
            assert prompt.count(f"## Return of functions.add:{number}\n") == 2


class TestCutOff:
    async def test_a_call_that_was_cut_off_is_told_so(self) -> None:
        long = tool_call("add", a=1, b=2, note="word " * 100)
        conversation, server = conversation_with(long, "Too long, then.")
        await conversation.chat([USER], TOOLS, max_tokens=20)
        [error] = [message["content"] for message in conversation.messages if message["role"] == "tool"]
        assert "cut off by the token limit after 20 tokens" in error
        assert error in server.requests[-1].prompt

    async def test_one_that_was_not_is_told_its_fault(self) -> None:
        conversation, _ = conversation_with(BROKEN.removesuffix("</tool_call>"), "Three.")
        await conversation.chat([USER], TOOLS)
        [error] = [message["content"] for message in conversation.messages if message["role"] == "tool"]
        assert "token limit" not in error


class TestOtherFormats:
    async def test_an_answer_in_another_format_is_warned_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        tracked._warn_of_format.cache_clear()
        said = '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'
        conversation, _ = conversation_with(said, said)
        for content in ("One?", "Two?"):
            turn = await conversation.chat([{"role": "user", "content": content}], TOOLS)
            assert (turn.content, turn.calls) == (said, [])
        [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "format 'mistral', and calls are read in the format 'hermes'" in record.getMessage()
        assert "tool_format='mistral'" in record.getMessage()

    @pytest.mark.parametrize(
        "said", ["I would add them.", '[TOOL_CALLS]other[ARGS]{"a": 1}', "add(a=1, b=2)", "Three. " + VALID]
    )
    async def test_other_answers_are_not(self, said: str, caplog: pytest.LogCaptureFixture) -> None:
        tracked._warn_of_format.cache_clear()
        conversation, _ = conversation_with(said)
        await conversation.chat([USER], TOOLS)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class TestAfterRetries:
    @pytest.mark.parametrize("last", [BROKEN, Reply(error=RuntimeError("out of memory"))], ids=["calls", "server"])
    async def test_the_attempts_stay(self, last: str | Reply) -> None:
        """A run may go on from one that ended with faulty calls: they are in its prompt, and trained."""
        conversation, server = conversation_with(BROKEN, BROKEN, last, "Sorry.", max_tool_call_retries=2)
        with pytest.raises((ToolCallRetriesError, BackendError)):
            await conversation.chat([USER], TOOLS)
        ended = conversation.messages
        stored = conversation.contract(ended)
        assert [message["role"] for message in stored] == ["user", "assistant"]
        assert conversation.expand(stored) == ended
        await conversation.chat([*stored, {"role": "user", "content": "Again."}], TOOLS)
        result = conversation.result(conversation.messages, StopReason.COMPLETED)
        check_tokens(result, server.requests)
        assert result.fidelity is not None
        assert result.fidelity.tokens_discarded == 0
        assert server.requests[-1].prompt.count(BROKEN) == len(conversation.steps[0])


class TestResult:
    async def test_steps(self) -> None:
        conversation, server = conversation_with("I try. " + MISFIT, VALID + UNKNOWN, "Three.")
        messages = conversation.expand(await harness(conversation))
        result = conversation.result(messages, StopReason.COMPLETED, final_response="Three.")
        assert isinstance(result, AgentResult)
        assert (result.success, result.final_response, result.tracked) == (True, "Three.", True)
        first, second = result.steps
        assert [first.step_number, second.step_number] == [1, 2]
        assert [call.status.value for call in first.tool_calls] == ["invalid_arguments", "ok", "unknown_tool"]
        assert [tool.success for tool in first.tool_results] == [False, True, False]
        assert first.malformed_calls == 2
        assert len(first.turns) == 2
        assert second.assistant_message.startswith("Three.")
        assert second.tool_calls == []
        check_tokens(result, server.requests)

    @pytest.mark.parametrize("reason", [reason for reason in StopReason if reason is not StopReason.COMPLETED])
    async def test_only_an_answer_is_a_success(self, reason: StopReason) -> None:
        conversation, _ = conversation_with()
        assert not conversation.result([], reason).success

    async def test_what_a_tool_said_of_itself(self) -> None:
        conversation, _ = conversation_with(VALID * 3, "Three.")
        turn = await conversation.chat([USER], TOOLS)
        contents = ['{"output": "x", "exit_code": 2, "error": null}', '{"error": "no such file"}', "[1, 2]"]
        answers = [
            {"role": "tool", "tool_call_id": call.id, "content": content}
            for call, content in zip(turn.calls, contents, strict=True)
        ]
        [step] = conversation.result([USER, harness_message(turn), *answers], StopReason.COMPLETED).steps
        assert [tool.exit_code for tool in step.tool_results] == [2, None, None]
        assert [tool.error for tool in step.tool_results] == [None, "no such file", None]
        assert [tool.success for tool in step.tool_results] == [True, False, True]


class TestFailures:
    async def test_a_failed_call_leaves_what_was_before(self) -> None:
        conversation, server = conversation_with(VALID, Reply(error=RuntimeError("out of memory")))
        with pytest.raises(BackendError, match="out of memory"):
            await harness(conversation)
        assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool"]
        result = conversation.result(conversation.messages, StopReason.SERVER_ERROR, error="out of memory")
        assert [len(step.turns) for step in result.steps] == [1]
        check_tokens(result, server.requests)

    async def test_a_retry_that_fails_leaves_the_attempt(self) -> None:
        conversation, server = conversation_with(BROKEN, Reply(error=RuntimeError("out of memory")))
        with pytest.raises(BackendError):
            await conversation.chat([USER], TOOLS)
        assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool"]
        check_tokens(conversation.result(conversation.messages, StopReason.SERVER_ERROR), server.requests)

    async def test_a_time_limit_on_each_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "0.2")
        conversation, server = conversation_with(Reply(hang=True))
        with pytest.raises(BackendTimeoutError, match=r"ATROPOS_AGENT_CHAT_TIMEOUT_S=0\.2"):
            await conversation.chat([USER])
        assert server.requests[0].cancelled

    async def test_cancellation(self) -> None:
        asked = asyncio.Event()

        def model(_: Any) -> Reply:
            asked.set()
            return Reply(hang=True)

        server = ScriptedServer(model)
        conversation = Conversation(TrackedBackend(server, chatml_tokenizer()))
        question = asyncio.create_task(conversation.chat([USER]))
        await asked.wait()
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        assert server.requests[0].cancelled
        assert conversation.result(conversation.messages, StopReason.CANCELLED).steps == []


class TestLogging:
    async def test_reports_while_the_model_is_waited_for(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("ATROPOS_DEBUG_AGENT_WAIT_EVERY_S", "0.01")
        reported = asyncio.Event()
        loop = asyncio.get_running_loop()

        class Watch(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                loop.call_soon_threadsafe(reported.set)

        async def model(_: Any) -> str:
            await reported.wait()
            return "Three."

        watch = Watch()
        logging.getLogger("hermes_atropos.conversation").addHandler(watch)
        try:
            conversation = Conversation(TrackedBackend(ScriptedServer(model), chatml_tokenizer()))
            assert (await conversation.chat([USER])).content == "Three."
        finally:
            logging.getLogger("hermes_atropos.conversation").removeHandler(watch)
        assert "waiting for the model" in caplog.text

    @pytest.mark.parametrize("variable", ["ATROPOS_DEBUG_AGENT_REQUEST", "HERMES_DEBUG_ATROPOS_REQUEST"])
    async def test_requests(
        self, variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(variable, "1")
        conversation, _ = conversation_with("Three.")
        await conversation.chat([{"role": "user", "content": "One and two? My key is sk-abcdefghijklmnop123."}])
        assert "One and two?" in caplog.text
        assert "sk-abcdefghijklmnop123" not in caplog.text
        assert "Three." not in caplog.text

    async def test_quiet_by_default(self, caplog: pytest.LogCaptureFixture) -> None:
        conversation, _ = conversation_with("Three.")
        await conversation.chat([USER])
        assert [record for record in caplog.records if record.name.startswith("hermes_atropos")] == []


class TestWithoutTokens:
    async def test_the_same_conversation(self) -> None:
        server = ScriptedServer([BROKEN, VALID + UNKNOWN, "Three."])
        conversation = Conversation(ChatBackend(server, native_tools=False))
        messages = conversation.expand(await harness(conversation))
        roles = ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
        assert [message["role"] for message in messages] == roles
        refs = [turn.ref for attempts in conversation.steps for turn in attempts]
        assert len(set(refs)) == len(refs) == 3, "so that the harness' messages can be told apart"
        result = conversation.result(messages, StopReason.COMPLETED)
        assert (result.tracked, result.sequences, result.fidelity) == (False, [], None)


ANSWERS = st.lists(st.sampled_from([VALID, BROKEN, MISFIT, UNKNOWN]), min_size=1, max_size=4).map("\n".join)


@settings(max_examples=100, deadline=None)
@given(replies=st.lists(ANSWERS, max_size=6), text=st.sampled_from(["", "I try. ", "<think>Hm.</think>"]))
async def test_any_conversation(replies: list[str], text: str) -> None:
    """What was said stands once in the messages and once in the tokens, in order; and it can be taken apart again."""
    conversation, server = conversation_with(*(text + reply for reply in replies), "Three.", max_tool_call_retries=9)
    harness_messages = await harness(conversation)
    messages = conversation.expand(harness_messages)
    assert conversation.contract(messages) == harness_messages
    assert conversation.expand(conversation.contract(messages)) == messages
    result = conversation.result(messages, StopReason.COMPLETED)
    check_tokens(result, server.requests)
    assert len(result.sequences) == 1
    groups: list[list[str]] = []
    for message in messages[1:]:
        if message["role"] == "assistant":
            groups.append([])
        else:
            groups[-1].append(message["content"])
    assert check_unbroken(server.requests) == [tool_turn(*group) for group in groups[:-1]]
    assert len(groups) == len(server.requests) == len(replies) + 1
    statuses = [call.status for step in result.steps for call in step.tool_calls]
    assert len(statuses) == sum(reply.count("<tool_call>") for reply in replies)
