"""New weights in the middle of an answer: the server aborts it, and it is gone on with."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import agent_on, until
from test_servers import PROTOCOLS, connect, generations, prompt_of, tracked
from wire import SGLangWire, VLLMWire, Wire

from hermes_atropos import AtroposAgent, read_record, write_record
from hermes_atropos.backends.token_calls import ABORTS
from hermes_atropos.errors import BackendResponseError, TokenFidelityError
from hermes_atropos.listening import Delta, hearing, text_listener
from hermes_atropos.servers import StockSGLangServer, StockVLLMServer, VLLMGenerateServer
from hermes_atropos.testing import tool_call
from hermes_atropos.tokens import UNKNOWN
from hermes_atropos.trajectory import SequenceData, StopReason

ENGINES = ["vllm", "vllm-generate", "sglang"]
USER = {"role": "user", "content": "Hello"}
SAID = "I will look at the files first, and then I will say what I think of them."


def sampled(wired: Wire) -> list[tuple[list[int], list[float]]]:
    return [(ids, logprobs) for request in generations(wired) for ids, logprobs, _ in request.sampled]


def limit_of(request: wire.WireRequest) -> int:
    sampling = request.body.get("sampling_params", request.body)
    limit: int = sampling.get("max_new_tokens") or sampling["max_tokens"]
    return limit


@pytest.mark.parametrize("name", ENGINES)
def test_wherever_an_answer_is_aborted_its_parts_are_one_turn(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make(reply=SAID) as wired:
        whole = [*wired.encode(SAID), wired.tokenizer.eos_token_id]

        @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(cuts=st.lists(st.integers(0, 12), max_size=4))
        def holds(cuts: list[int]) -> None:
            wired.requests.clear()
            wired.aborts = list(cuts)
            backend = tracked(cls, wired)
            turn = asyncio.run(backend.sample([USER], max_tokens=len(whole)))
            requests = generations(wired)
            aborts = len(requests) - 1
            assert (turn.content, turn.finish_reason) == (SAID, "stop")
            for before, after in itertools.pairwise(requests):
                assert prompt_of(after) == prompt_of(before) + before.sampled[0][0]
                assert limit_of(after) == limit_of(before) - len(before.sampled[0][0])
            [recorded] = backend.ledger.turns
            assert list(recorded.output_ids) == whole == [token for ids, _ in sampled(wired) for token in ids]
            assert list(recorded.logprobs) == [value for _, logprobs in sampled(wired) for value in logprobs]
            assert backend.ledger.report().aborts == aborts
            assert aborts == sum(request.sampled[0][2] == "abort" for request in requests)

        holds()


@pytest.mark.parametrize("name", ENGINES)
async def test_each_of_several_answers_is_gone_on_with(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make(reply=SAID) as wired:
        wired.aborts = [3, 40, 0]
        backend = tracked(cls, wired)
        answers = await backend.sample_group([USER], n=3)
        assert [answer.content for answer in answers] == [SAID] * 3
        assert backend.ledger.report().aborts == 2
        assert len(backend.ledger.sequences()) == 3


@pytest.mark.parametrize("name", ENGINES)
async def test_who_hears_an_aborted_answer_hears_it_once(name: str) -> None:
    cls, make = PROTOCOLS[name]
    heard: list[Delta] = []
    with make(reply=SAID) as wired:
        wired.aborts = [3, 0, 4]
        backend = tracked(cls, wired)
        with hearing(text_listener, heard.append):
            turn = await backend.sample([USER])
        assert all(request.body.get("stream") for request in generations(wired))
    assert "".join(delta.text for delta in heard if delta.kind == "content") == turn.content == SAID
    assert backend.ledger.report().aborts == 3
    assert list(backend.ledger.turns[0].output_ids) == [token for ids, _ in sampled(wired) for token in ids]


async def test_both_parts_know_their_weights_where_the_server_tells() -> None:
    for cls, make in (
        (StockSGLangServer, SGLangWire),
        (VLLMGenerateServer, lambda **kw: VLLMWire(generate="alone", **kw)),
    ):
        with make(reply=SAID, weight_version="step-1") as wired:
            backend = tracked(cls, wired)
            first = await backend.sample([USER])
            wired.aborts = [5]
            wired.faults = [updated(wired, "step-2")]
            follow_up = [USER, {"role": "assistant", "content": SAID}, {"role": "user", "content": "Go on"}]
            backend.ledger.answered(backend.ledger.turn(first.ref or ""), follow_up[1])
            await backend.sample(follow_up)
            turn = backend.ledger.turns[1]
            length = len(turn.output_ids)
            told = [(part.start, part.end, part.version) for part in turn.weights]
            assert told == [(0, 5, "step-1"), (5, length, "step-2")]
            [sequence] = map(data, backend.ledger.sequences())
        start = sequence.metadata["turns"][1]["start"]
        assert sequence.metadata["turns"][1]["weights"] == [
            {"start": start, "end": start + 5, "version": "step-1"},
            {"start": start + 5, "end": start + length, "version": "step-2"},
        ]
        assert sequence.weights_versions == ["step-1", "step-2"]
        assert sequence.mixed_weights


def updated(wired: Any, version: str) -> wire.Fault:
    async def fault(request: Any, answer: dict[str, Any]) -> Any:
        wired.weight_version = version
        return wire.web.json_response(answer)

    return fault


def data(sequence: Any) -> SequenceData:
    return SequenceData.cut(sequence, str)


async def test_an_abort_without_new_weights_is_no_mixture() -> None:
    with SGLangWire(reply=SAID, weight_version="step-1") as wired:
        wired.aborts = [5, 3]
        backend = tracked(StockSGLangServer, wired)
        await backend.sample([USER])
        [sequence] = map(data, backend.ledger.sequences())
    [turn] = backend.ledger.turns
    assert list(turn.output_ids) == [*wired.encode(SAID), wired.tokenizer.eos_token_id]
    assert [(part.start, part.end, part.version) for part in turn.weights] == [(0, len(turn.output_ids), "step-1")]
    assert (sequence.weights_versions, sequence.mixed_weights) == (["step-1"], False)


async def test_weights_that_nobody_names_are_unknown_and_may_be_mixed_after_an_abort() -> None:
    with VLLMWire(reply=SAID) as wired:
        backend = tracked(StockVLLMServer, wired)
        await backend.sample([USER])
        wired.aborts = [5]
        await backend.sample([{"role": "user", "content": "Another"}])
        whole, joined = map(data, backend.ledger.sequences())
    assert (whole.weights_versions, whole.mixed_weights) == ([UNKNOWN], False)
    assert (joined.weights_versions, joined.mixed_weights) == ([UNKNOWN], True)


async def test_weights_of_other_tokens_than_those_sampled_are_refused() -> None:
    def shifted(answer: dict[str, Any]) -> None:
        answer["choices"][0]["weight_versions"][0]["start"] = 1

    with VLLMWire(generate="alone") as wired:
        wired.faults = [wire.changed(shifted)]
        with pytest.raises(BackendResponseError, match="weights are told for other tokens"):
            await tracked(VLLMGenerateServer, wired).sample([USER])


@pytest.mark.parametrize(
    "given",
    [{"presence_penalty": 0.5}, {"frequency_penalty": 0.1}, {"stop": ["\n\n"]}, {"regex": "a+"}, {"bad_words": ["no"]}],
)
async def test_where_the_rest_would_be_another_draw_the_same_is_asked_again(given: dict[str, Any]) -> None:
    with VLLMWire(reply=SAID) as wired:
        wired.aborts = [5]
        backend = tracked(StockVLLMServer, wired)
        assert (await backend.sample([USER], **given)).content == SAID
        first, second = generations(wired)
    assert prompt_of(first) == prompt_of(second)
    assert list(backend.ledger.turns[0].output_ids) == second.sampled[0][0]
    assert backend.ledger.report().aborts == 1


async def test_a_part_that_already_has_all_tokens_asked_for_is_the_answer() -> None:
    def abort(answer: dict[str, Any]) -> None:
        answer["choices"][0]["finish_reason"] = "abort"

    with VLLMWire(reply=SAID) as wired:
        wired.faults = [wire.changed(abort)]
        turn = await tracked(StockVLLMServer, wired).sample([USER], max_tokens=4)
    assert (turn.finish_reason, turn.completion_tokens) == ("length", 4)
    assert len(generations(wired)) == 1


@pytest.mark.parametrize(("given", "cuts"), [({}, [2, *[0] * 50]), ({"stop": ["\n\n"]}, [1] * 50)])
async def test_a_server_that_aborts_for_ever_is_given_up_and_what_there_is_is_kept(
    given: dict[str, Any], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_atropos.backends.token_calls.ABORTS", 4)
    with VLLMWire(reply=SAID) as wired:
        wired.aborts = list(cuts)
        backend = tracked(StockVLLMServer, wired)
        with pytest.raises(BackendResponseError, match="times in a row before it said anything more"):
            await backend.sample([USER], **given)
        assert len(generations(wired)) == 5
    [turn] = backend.ledger.turns
    assert len(turn.output_ids) == max(cuts)
    assert "aborted it" in backend.ledger.report().left_out[0]


async def test_a_long_answer_may_be_aborted_any_number_of_times() -> None:
    with VLLMWire(reply="word " * 50) as wired:
        wired.aborts = [1, 0] * (ABORTS + 5)
        backend = tracked(StockVLLMServer, wired)
        assert (await backend.sample([USER])).content == ("word " * 50).strip()
    assert backend.ledger.report().aborts == 2 * (ABORTS + 5)


HALF = '<tool_call>\n{"name": "add", "arguments": {"a": Well.'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("second", ["Well.", HALF])
async def test_a_call_that_an_abort_spoilt_is_no_fault_of_the_model_and_the_same_is_asked_once_more(
    name: str, second: str
) -> None:
    cls, make = PROTOCOLS[name]
    with make(reply=HALF) as wired:
        wired.aborts = [12]
        wired.faults = [wire.changed(lambda _: None), wire.changed(lambda _: setattr(wired, "reply", second))]
        backend = tracked(cls, wired)
        turn = await backend.sample([USER], [ADD])
        first, rest, again = generations(wired)
    assert prompt_of(first) == prompt_of(again) == prompt_of(rest)[:-12]
    assert backend.tokenizer.decode(again.sampled[0][0], skip_special_tokens=True) == second
    assert [call.ok for call in turn.calls] == [False] * (second == HALF)
    spoilt, kept = backend.ledger.turns
    assert list(spoilt.output_ids) == first.sampled[0][0] + rest.sampled[0][0]
    assert kept.ref == turn.ref
    report = backend.ledger.report()
    assert (report.aborts, report.tokens_trained) == (1, len(kept.output_ids))
    assert "the server aborted it" in report.left_out[0]


async def test_a_rest_of_another_prompt_is_refused() -> None:
    def other(answer: dict[str, Any]) -> None:
        answer["choices"][0]["prompt_token_ids"][-1] += 1

    async def as_it_is(request: Any, answer: dict[str, Any]) -> Any:
        return wire.web.json_response(answer)

    with VLLMWire(reply=SAID) as wired:
        wired.aborts, wired.faults = [5], [as_it_is, wire.changed(other)]
        with pytest.raises(TokenFidelityError, match="answered"):
            await tracked(StockVLLMServer, wired).sample([USER])


@pytest.mark.parametrize("name", ENGINES)
async def test_a_paused_server_is_waited_for(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make(reply=SAID) as wired:
        wired.aborts = [5]
        wired.faults = [paused(wired)]
        backend = tracked(cls, wired)
        call = asyncio.create_task(backend.sample([USER]))
        await asyncio.to_thread(until, lambda: len(generations(wired)) == 2)
        assert await connect(cls, wired).is_healthy()
        assert not call.done()
        wired.resumed.set()
        assert (await call).content == SAID


def paused(wired: Wire) -> wire.Fault:
    async def fault(request: Any, answer: dict[str, Any]) -> Any:
        wired.resumed.clear()
        return wire.web.json_response(answer)

    return fault


# Both agents


@pytest.mark.parametrize("name", ENGINES)
async def test_32_rollouts_with_an_abort_in_each_end_as_without(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make(reply=SAID, context_length=16384) as wired:
        wired.abort_each = 5
        small = AtroposAgent(connect(cls, wired), tokenizer=wired.tokenizer)
        results = await asyncio.gather(*(small.run(f"Task {number}") for number in range(32)))
    assert {(result.stop_reason, result.final_response) for result in results} == {(StopReason.COMPLETED, SAID)}
    assert [result.fidelity.aborts for result in results if result.fidelity] == [1] * 32
    prompts = {tuple(prompt_of(request)): request for request in generations(wired)}
    for result in results:
        [sequence] = result.sequences
        start = sequence.metadata["turns"][0]["start"]
        first = prompts[tuple(sequence.tokens[:start])].sampled[0]
        second = prompts[tuple(sequence.tokens[: start + len(first[0])])].sampled[0]
        assert sequence.tokens[start:] == first[0] + second[0]
        assert sequence.logprobs[start:] == first[1] + second[1]


async def test_hermes_is_not_told_that_its_answer_was_cut_off(tmp_path: Any) -> None:
    with VLLMWire(reply=tool_call("terminal", command="true"), context_length=16384) as wired:
        wired.aborts = [9]
        agent = agent_on(connect(StockVLLMServer, wired), tokenizer=wired.tokenizer, max_iterations=1)
        async with agent.task() as task:
            wired.reply = tool_call("terminal", command="true")
            result = await task.run("Go.")
    trajectory = result["trajectory"]
    assert trajectory.steps[0].tool_calls[0].arguments == {"command": "true"}
    assert not any("truncated" in str(message["content"]) for message in result["messages"])
    assert trajectory.fidelity.aborts == 1
    write_record(trajectory, tmp_path / "rollout.jsonl")
    read = read_record(tmp_path / "rollout.jsonl")
    assert (read.sequences, read.fidelity) == (trajectory.sequences, trajectory.fidelity)
    assert read.sequences[0].mixed_weights
