"""The trainer's tokens under Hermes' own loop, against the record of the server that was asked and that sampled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    END,
    SINCE_0_21,
    agent_on,
    between_answers,
    check_tokens,
    check_unbroken,
    stream,
    terminal,
    tool_texts,
    tool_turn,
    user_turn,
)

from hermes_atropos import StopReason
from hermes_atropos.testing import Reply, ScriptedRequest, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.tokens import BreakCause

MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'


async def rollout(*replies: str | Reply, **options: Any) -> tuple[dict[str, Any], list[ScriptedRequest]]:
    """What a rollout leaves, and what the server was asked; its tokens are checked against each other."""
    server = ScriptedServer(list(replies))
    async with agent_on(server, **options).task() as task:
        result = await task.run("Please do it.")
    check_tokens(result["trajectory"], server.requests)
    return result, server.requests


class TestUnbroken:
    """Each later prompt is the last prompt, the sampled ids, and the rendering of the new messages."""

    async def test_tool_results(self) -> None:
        result, requests = await rollout(terminal("echo 1"), terminal("echo 2"), "Done.")
        assert check_unbroken(requests) == [tool_turn(content) for content in tool_texts(result["messages"])]
        assert len(result["trajectory"].sequences) == 1

    async def test_the_first_prompt_is_the_template_s(self) -> None:
        result, requests = await rollout("Done.")
        trajectory = result["trajectory"]
        expected = chatml_tokenizer().apply_chat_template(
            trajectory.messages[:2], tools=trajectory.tools, add_generation_prompt=True, return_dict=False
        )
        assert requests[0].prompt_ids == expected

    async def test_one_end_token_closes_each_turn(self) -> None:
        result, requests = await rollout(terminal("echo 1"), Reply("I was cut", finish_reason="length"), "Done.")
        [sequence] = result["trajectory"].sequences
        text = chatml_tokenizer().decode(sequence.tokens)
        assert text.count("<|im_start|>") == text.count("<|im_end|>")
        assert "<|im_end|><|im_end|>" not in text
        assert sequence.tokens == stream(requests[-1])

    async def test_a_retry(self) -> None:
        result, requests = await rollout("I look. " + MALFORMED, MALFORMED, terminal("echo 1"), "Done.")
        refused = tool_texts(result["messages"])[:2]
        assert all("JSON" in content for content in refused)
        assert check_unbroken(requests) == [tool_turn(content) for content in tool_texts(result["messages"])]
        assert result["api_calls"] == 4, "with those that Hermes never saw"
        assert [len(step.turns) for step in result["trajectory"].steps] == [3, 1]
        assert len(result["trajectory"].sequences) == 1

    async def test_retries_are_bounded(self) -> None:
        result, requests = await rollout(*[MALFORMED] * 9, max_tool_call_retries=2)
        assert len(requests) == 3
        check_unbroken(requests)
        assert result["stop_reason"] is StopReason.TOOL_CALL_RETRIES
        assert len(result["trajectory"].sequences) == 1

    async def test_valid_and_invalid_calls_in_one_turn(self) -> None:
        """The model hears of both, in the order in which it called."""
        calls = [terminal("echo 1"), MALFORMED, tool_call("read_file"), terminal("echo 2"), tool_call("no_tool", x=1)]
        result, requests = await rollout("\n".join(calls), "Done.")
        one, malformed, incomplete, two, unknown = contents = tool_texts(result["messages"])
        assert [json.loads(content)["output"] for content in (one, two)] == ["1", "2"]
        assert "JSON" in malformed
        assert "path" in incomplete
        assert "no_tool" in unknown
        assert check_unbroken(requests) == [tool_turn(*contents)]
        assert [call.status.value for call in result["trajectory"].steps[0].tool_calls] == [
            "ok",
            "invalid_json",
            "invalid_arguments",
            "ok",
            "unknown_tool",
        ]

    async def test_parallel_tools(self) -> None:
        calls = "\n".join(
            tool_call("search_files", pattern=f"*.{kind}", target="files") for kind in ("py", "txt", "md")
        )
        result, requests = await rollout(calls, "Done.")
        contents = tool_texts(result["messages"])
        assert len(contents) == 3
        assert check_unbroken(requests) == [tool_turn(*contents)]

    async def test_the_same_call_twice_in_one_turn(self) -> None:
        """Hermes runs duplicates once; what the model reads has to fit what it said all the same."""
        result, requests = await rollout(terminal("echo 1") + terminal("echo 1"), "Done.")
        assert check_unbroken(requests) == [tool_turn(*tool_texts(result["messages"]))]

    async def test_steer(self) -> None:
        agents: list[Any] = []
        server = ScriptedServer([terminal("echo 1"), terminal("echo 2"), "Done."])
        agent = agent_on(server, tool_complete_callback=lambda *_: agents[0].steer("Be quick."))
        agents.append(agent)
        async with agent.task() as task:
            result = await task.run("Go.")
        new = check_unbroken(server.requests)
        assert ["Be quick." in text for text in new] == [True, True]
        assert new == between_answers(result["messages"])
        check_tokens(result["trajectory"], server.requests)

    async def test_the_nudge_after_an_empty_answer(self) -> None:
        result, requests = await rollout(terminal("echo 1"), "", "Done.")
        assert result["final_response"] == "Done."
        _, nudge = check_unbroken(requests)
        assert nudge.startswith("<|im_start|>user\n")
        assert requests[1].output_ids == [[END]]
        assert len(result["trajectory"].sequences) == 1

    async def test_a_user_turn_after_the_answer(self) -> None:
        server = ScriptedServer([terminal("echo 1"), "  First.\n\n", "Second."])
        async with agent_on(server).task() as task:
            first = await task.run("One.")
            second = await task.run("Two.", conversation_history=first["messages"])
        assert check_unbroken(server.requests)[1] == user_turn("Two.")
        check_tokens(second["trajectory"], server.requests)

    async def test_a_user_turn_after_a_rollout_with_retries(self) -> None:
        """The messages that a run returns hold what Hermes never saw, and can be handed back to it all the same."""
        calls = terminal("echo 1") + tool_call("no_tool")
        server = ScriptedServer([MALFORMED, calls, "First.", terminal("echo 2"), "Second."])
        async with agent_on(server).task() as task:
            first = await task.run("One.")
            second = await task.run("Two.", conversation_history=first["messages"])
        assert check_unbroken(server.requests)[2] == user_turn("Two.")
        assert second["messages"][: len(first["messages"])] == first["messages"]
        check_tokens(second["trajectory"], server.requests)
        assert len(second["trajectory"].sequences) == 1


class TestCutOff:
    async def test_text(self) -> None:
        """Hermes keeps it and asks to go on: the turn is closed for the model, and the end token is not trained."""
        result, requests = await rollout(Reply("The answer is", finish_reason="length"), " four.")
        assert requests[0].output_ids[0][-1] != END
        [request_to_go_on] = check_unbroken(requests)
        assert request_to_go_on.startswith("<|im_start|>user\n")
        [sequence] = result["trajectory"].sequences
        close = len(stream(requests[0]))
        assert (sequence.tokens[close], sequence.masked_tokens[close]) == (END, -100)

    async def test_for_good(self) -> None:
        result, _ = await rollout(*[Reply("and so on", finish_reason="length")] * 9)
        assert result["stop_reason"] is StopReason.TRUNCATED
        assert not result["trajectory"].success

    @pytest.mark.parametrize("cut", [20, 30, 40])
    async def test_in_a_tool_call(self, cut: int) -> None:
        call = terminal("echo a rather long command line that takes many tokens")
        cut_off = Reply("I run it. " + call[:cut], finish_reason="length")
        result, requests = await rollout(cut_off, terminal("echo 1"), "Done.")
        assert result["final_response"] == "Done."
        assert len(requests) == 3
        assert [json.loads(content)["output"] for content in tool_texts(result["messages"])[-1:]] == ["1"]

    async def test_behind_a_whole_tool_call(self) -> None:
        """The server ran out of tokens behind a call that is whole: whatever Hermes makes of it, no token is lost."""
        result, requests = await rollout(Reply(terminal("echo 1"), finish_reason="length"), terminal("echo 2"), "Done.")
        assert result["trajectory"].fidelity.turns == len(requests)

    async def test_by_max_tokens(self) -> None:
        server = ScriptedServer(lambda messages: "word " * 50 if len(messages) < 3 else "Done.")
        async with agent_on(server, max_tokens=20).task() as task:
            result = await task.run("Go.")
        assert len(server.requests[0].output_ids[0]) == 20
        assert all(request.sampling["max_tokens"] >= 20 for request in server.requests)
        check_tokens(result["trajectory"], server.requests)

    async def test_in_thinking(self) -> None:
        result, requests = await rollout(Reply("<think>I wonder", finish_reason="length"), "Done.", "Done.", "Done.")
        assert result["trajectory"].fidelity.turns == len(requests)


class TestWhatHermesRewrites:
    """Between two calls Hermes strips, re-serialises and repairs; the tokens stay those that were sampled."""

    @pytest.mark.parametrize(
        "said",
        [
            pytest.param(
                '<tool_call>\n{"name":"terminal","arguments":{"timeout":5,"command":"echo 1"}}\n</tool_call>', id="keys"
            ),
            pytest.param(
                '<tool_call>{ "arguments" : {"command":"echo 1"} , "name" : "terminal" }</tool_call>', id="order"
            ),
            pytest.param(
                '<tool_call>\n{"name": "terminal", "arguments": {"command": "echo \\ud83d\\ude00"}}\n</tool_call>',
                id="escapes",
            ),
            pytest.param(terminal("echo 'grüße 😀 日本語  \t'"), id="unicode"),
            pytest.param(terminal("printf '<tool_call></tool_call>\\n<think>'"), id="tags"),
            pytest.param("\n\n  I look.  \n\n" + terminal("echo 1") + "  \n", id="whitespace"),
            pytest.param("<think>\nHm.\n</think>\n\n" + terminal("echo 1"), id="think"),
            pytest.param("<think>Hm.</think>One <think>Or?</think> two " + terminal("echo 1"), id="think twice"),
            pytest.param(terminal("echo 1") + "<think>Was that it?</think>", id="think behind"),
            pytest.param("<think>I go on thinking " + terminal("echo 1"), id="think unclosed"),
            pytest.param(terminal("echo 1") + "\nThat should do.", id="text behind"),
            pytest.param("<REASONING_SCRATCHPAD>Hm.</REASONING_SCRATCHPAD>" + terminal("echo 1"), id="scratchpad"),
            pytest.param("The key is sk-proj-abcdefghijklmnopqrstuvwx. " + terminal("echo 1"), id="secret"),
            pytest.param(
                '<tool_call>\n{"name": "terminal", "arguments": "{\\"command\\": \\"echo 1\\"}"}\n</tool_call>',
                id="string",
            ),
        ],
    )
    async def test_what_was_sampled_stays(self, said: str) -> None:
        result, requests = await rollout(said, said + "", "Done.")
        assert [chatml_tokenizer().decode(request.output_ids[0][:-1]) for request in requests[:2]] == [said, said]
        assert check_unbroken(requests) == [tool_turn(content) for content in tool_texts(result["messages"])]
        assert len(result["trajectory"].sequences) == 1

    @pytest.mark.parametrize(
        "said", ["<think>Hm.</think>Four.", "  Four.  ", "<think>Hm.</think>\n\n  Four.", "Vier ü 😀  \u3000"]
    )
    async def test_the_answer_of_an_earlier_run(self, said: str) -> None:
        server = ScriptedServer([terminal("echo 1"), said, said, "Done.", "Done.", "Done."])
        async with agent_on(server).task() as task:
            first = await task.run("One.")
            second = await task.run("Two.", conversation_history=first["messages"])
        check_tokens(second["trajectory"], server.requests)
        check_unbroken(server.requests)

    async def test_think_blocks_are_no_content(self) -> None:
        result, _ = await rollout("<think>Hm.</think>I look. " + terminal("echo 1"), "<think>So.</think>Done.")
        assert [m["content"] for m in result["messages"] if m["role"] == "assistant"] == ["I look.", "Done."]
        assert [m["reasoning_content"] for m in result["messages"] if m["role"] == "assistant"] == ["Hm.", "So."]


class TestBranches:
    async def test_answers_that_hermes_threw_away_are_kept_apart(self) -> None:
        """Empty answers without a tool before them are sampled again, from the same prompt."""
        result, requests = await rollout("", "", "Done.")
        assert len({tuple(request.prompt_ids) for request in requests}) == 1
        report = result["trajectory"].fidelity
        assert (report.turns, report.sequences) == (3, 1)
        assert report.tokens_discarded == 2
        assert len(result["trajectory"].sequences) == 1
        assert len(result["trajectory"].all_sequences) == 3

    async def test_an_empty_response_for_good(self) -> None:
        result, _ = await rollout(*[""] * 9)
        assert result["stop_reason"] is StopReason.EMPTY_RESPONSE
        assert not result["trajectory"].success

    async def test_the_limit_after_an_empty_answer(self) -> None:
        """Hermes takes the empty text for an answer, and asks for no summary."""
        result, _ = await rollout(terminal("echo 1"), "", terminal("echo 2"), "Not asked.", max_iterations=3)
        assert result["completed"] is False
        assert result["stop_reason"] is StopReason.ITERATION_LIMIT

    async def test_a_rewritten_history_starts_a_sequence_of_its_own(self) -> None:
        server = ScriptedServer([terminal("echo 1"), "First.", "Second."])
        async with agent_on(server).task() as task:
            first = await task.run("One.")
            history = [{**first["messages"][0], "content": "Something else."}, *first["messages"][1:]]
            second = await task.run("Two.", conversation_history=history)
        check_unbroken(server.requests[:2])
        check_tokens(second["trajectory"], server.requests)
        assert len(second["trajectory"].sequences) == 2
        assert second["trajectory"].fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 1}

    async def test_compression(self) -> None:
        """Hermes asks the same server for its summary, which is a conversation of its own, and goes on from it."""

        def model(messages: list[dict[str, str]]) -> str:
            if "<tools>" not in messages[0]["content"]:
                return "## Goal\nCount.\n## Progress\nCounted so far."
            return terminal(f"seq {len(server.requests)} 400") if len(server.requests) < 25 else "Done."

        server = ScriptedServer(model)
        agent = agent_on(server)
        agent.compression_enabled = True
        agent.context_compressor.threshold_tokens = 30_000
        agent.context_compressor.tail_token_budget = 2_000
        result = await agent.run_conversation_async("Please count.")
        trajectory = result["trajectory"]
        summaries = [r for r in server.requests if "<tools>" not in r.prompt]
        assert summaries
        assert result["final_response"] == "Done."
        check_tokens(trajectory, server.requests)
        assert trajectory.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: len(summaries)}
        assert len(trajectory.sequences) == 1 + 2 * len(summaries)


class TestEverythingAtOnce:
    async def test_retry_parallel_tools_steer_child_nudge_cut_off_history_and_summary(self) -> None:
        def model(messages: list[dict[str, str]]) -> str | Reply:
            if not any("Do all of it" in message["content"] for message in messages):
                said = [message for message in messages if message["role"] == "assistant"]
                return "<think>Alone.</think>The child is done." if said else terminal("echo child > child.txt")
            return next(replies)

        replies = iter(
            [
                "<think>First this.</think>" + MALFORMED,
                "I read. " + "\n".join(tool_call("read_file", path=f"{name}.txt") for name in "ab"),
                terminal("echo 'ü  😀'") + "\n" + tool_call("terminal"),
                tool_call("delegate_task", goal="Write child.txt"),
                "",
                Reply("I was about to say", finish_reason="length"),
                terminal("cat child.txt"),
                "<think>So.</think>  The answer. ",
                *(terminal(f"echo {number}") for number in range(8)),
                "The summary.",
            ]
        )
        agents: list[Any] = []

        def steer(_id: str, name: str, *_: Any) -> None:
            if name == "terminal":
                agents[0].steer("Carry on.")

        server = ScriptedServer(model)
        agents.append(
            agent_on(
                server,
                enabled_toolsets=["terminal", "file", "delegation"],
                tool_complete_callback=steer,
                max_iterations=8,
            )
        )
        async with agents[0].task() as task:
            for name in "ab":
                await task.write_file(f"{name}.txt", name * 3)
            first = await task.run("Do all of it.")
            second = await task.run("And on.", conversation_history=first["messages"])
        between = "\n" if SINCE_0_21 else ""  # Hermes puts the parts together
        assert first["final_response"] == f"I was about to say{between}The answer."
        assert second["final_response"] == "The summary."
        *parent, summary = [request for request in server.requests if "Do all of it" in request.prompt]
        child = [request for request in server.requests if "Do all of it" not in request.prompt]
        assert (len(parent), len(child)) == (16, 2)
        assert sum("Carry on." in new for new in check_unbroken(parent)) == 9
        check_unbroken(child)
        check_tokens(second["trajectory"], server.requests)
        kept = SINCE_0_21  # before, Hermes takes the tools away for its summary: another prompt
        assert ("<tools>" in summary.prompt) == kept
        assert second["trajectory"].fidelity.breaks == ({} if kept else {BreakCause.HISTORY_REWRITTEN: 1})
        assert len(second["trajectory"].sequences) == (2 if kept else 3)


ARGUMENTS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
WORDS = st.text(alphabet='abc \n\tü😀<>/"{}', max_size=20)


@st.composite
def tool_turns(draw: st.DrawFn) -> str:
    """An answer with one to three calls, valid or not, and text and thinking around them."""
    calls = draw(
        st.lists(
            st.one_of(
                ARGUMENTS.map(
                    lambda text: tool_call("todo", todos=[{"id": "1", "content": text or "x", "status": "pending"}])
                ),
                ARGUMENTS.map(lambda text: tool_call("search_files", pattern=text + "x", target="files")),
                st.just(tool_call("read_file", path="missing.txt")),
                st.just(MALFORMED),
                ARGUMENTS.map(lambda text: tool_call("unknown", text=text)),
            ),
            min_size=1,
            max_size=3,
        )
    )
    thinking = draw(st.sampled_from(["", "<think>Hm.</think>", "<think>\nHm.\n</think>\n\n", "<think>Hm. "]))
    return (
        thinking
        + draw(WORDS)
        + draw(st.sampled_from(["", "\n", "  "])).join(calls)
        + draw(st.sampled_from(["", "\n", " x"]))
    )


ANSWERS = st.one_of(
    tool_turns(),
    tool_turns(),
    WORDS.map(lambda text: Reply("Say " + text, finish_reason="length")),
    st.just(""),
    st.builds(lambda text, cut: Reply(text[: max(cut, 1)], finish_reason="length"), tool_turns(), st.integers(1, 60)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(replies=st.lists(ANSWERS, max_size=5), last=WORDS, steers=st.booleans())
async def test_any_conversation(replies: list[str | Reply], last: str, steers: bool) -> None:
    """Whatever the model says and Hermes makes of it, the trainer's tokens are those of the server's record."""
    script = iter([*replies, *[f"Done. {last}"] * 20])
    server = ScriptedServer(lambda _: next(script))
    agents: list[Any] = []
    agent = agent_on(
        server,
        enabled_toolsets=["file", "todo"],
        tool_complete_callback=lambda *_: steers and agents[0].steer("Go on."),
    )
    agents.append(agent)
    async with agent.task() as task:
        result = await task.run("Go.")
    check_tokens(result["trajectory"], server.requests)
    elsewhere = 0
    for number, request in enumerate(server.requests[1:], start=1):
        earlier = server.requests[:number]
        resampled = any(request.prompt_ids == before.prompt_ids for before in earlier)
        goes_on = any(request.prompt_ids[: len(stream(before))] == stream(before) for before in earlier)
        elsewhere += not (resampled or goes_on)
    report = result["trajectory"].fidelity
    # From 0.21, an answer that was cut off before it said anything is dropped, and the question extended.
    assert elsewhere <= (len(report.left_out) if SINCE_0_21 else 0)
    assert report.breaks == {}
