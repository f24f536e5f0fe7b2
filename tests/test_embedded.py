"""The embedded model as a server: exact logprobs, whatever else runs; seeds, ends, new weights, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from atroposlib.envs.server_handling.server_manager import APIServerConfig, ServerManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hermes_atropos import AgentConfig, AtroposAgent, AtroposAIAgent, EmbeddedServer
from hermes_atropos.embedded.llama import BLOCK, Llama
from hermes_atropos.errors import BackendResponseError, ContextLengthError, SamplingError
from hermes_atropos.listening import hearing, token_listener


@pytest.fixture
def server(checkpoint: Path) -> EmbeddedServer:
    return EmbeddedServer(checkpoint=checkpoint)


async def ask(server: Any, prompt: list[int], **sampling: Any) -> Any:
    return await server._tokens_and_logprobs_completion_wrapper(input_ids=prompt, **sampling)


async def until(come_true: Callable[[], object]) -> None:
    while not come_true():  # noqa: ASYNC110 (another thread makes it true)
        await asyncio.sleep(0.001)


async def test_answers_stop_and_have_the_logprobs_of_the_model(server: EmbeddedServer) -> None:
    prompt = [5, 6, 7, 8]
    echo, [first, second], logprobs, reasons = await ask(server, prompt, n=2, max_tokens=30, temperature=0.7, seed=1)
    assert echo == prompt
    assert first != second
    for ids, told, reason in zip([first, second], logprobs, reasons, strict=True):
        assert reason == {"type": "length", "weights": [{"version": "default", "start": 0, "end": 30}]}
        expected = server.engine.model.logprobs(prompt + ids, 0.7)[len(prompt) - 1 :]
        assert np.abs(np.array(told) - expected).max() < 1e-5
    _, [again, _], _, _ = await ask(server, prompt, n=2, max_tokens=30, temperature=0.7, seed=1)
    assert again == first


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"beam_width": 3}, "does not know beam_width"),
        ({"min_p": 0.1}, "has no min_p"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
async def test_what_it_can_not_do_is_refused(server: EmbeddedServer, given: dict[str, Any], why: str) -> None:
    with pytest.raises(SamplingError, match=why):
        await ask(server, [5], **given)


async def test_prompts_that_can_not_be_are_refused(server: EmbeddedServer) -> None:
    with pytest.raises(ContextLengthError, match="4096"):
        await ask(server, [5] * 4096)
    with pytest.raises(BackendResponseError, match="token 9999"):
        await ask(server, [5, 9999])


async def test_new_weights_in_the_middle_of_an_answer(server: EmbeddedServer, other_checkpoint: Path) -> None:
    old, new = server.engine.model, Llama(other_checkpoint)
    prompt = [9] * 40
    answer = asyncio.create_task(ask(server, prompt, max_tokens=1500, ignore_eos=True))
    await until(lambda: server.engine.load["running"])
    await server.load_weights(other_checkpoint)
    _, [ids], [logprobs], [reason] = await answer
    *before, after = reason["weights"]
    assert after["version"] == "1"
    assert after["end"] == 1500
    for part in [*before, after]:
        model = old if part["version"] == "default" else new
        expected = model.logprobs(prompt + ids)[len(prompt) - 1 :][part["start"] : part["end"]]
        assert np.abs(np.array(logprobs[part["start"] : part["end"]]) - expected).max() < 1e-4


async def test_a_cancelled_request_leaves_nothing(server: EmbeddedServer) -> None:
    answer = asyncio.create_task(ask(server, [5] * 20, max_tokens=4000, ignore_eos=True))
    await until(lambda: server.engine.load["running"])
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    await until(lambda: all(thread.name != "embedded-model" for thread in threading.enumerate()))
    assert (server.engine.load["running"], server.engine.load["waiting"]) == (0, 0)


async def test_a_thousand_requests_given_up_at_any_moment_leave_nothing(server: EmbeddedServer) -> None:
    random = Random(0)
    base = [random.randrange(3, 500) for _ in range(300)]
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()

    async def one(number: int) -> bool:
        prompt = base[: random.randrange(1, 300)] + [random.randrange(3, 500) for _ in range(random.randrange(4))]
        call = asyncio.create_task(ask(server, prompt, seed=number, max_tokens=random.randrange(1, 12)))
        done, _ = await asyncio.wait([call], timeout=random.choice([0, 0.001, 0.01, 0.1, None]))
        call.cancel()
        [answer] = await asyncio.gather(call, return_exceptions=True)
        if done and number % 20 == 0:
            _, [ids], [told], _ = answer
            expected = server.engine.model.logprobs(prompt + ids)[len(prompt) - 1 :]
            assert np.abs(np.array(told) - expected).max() < 1e-5
        return bool(done)

    answered: list[bool] = []
    for start in range(0, 1000, 50):
        answered += await asyncio.gather(*map(one, range(start, start + 50)))
    assert 100 < sum(answered) < 900
    await until(lambda: set(threading.enumerate()) <= threads)
    assert asyncio.all_tasks() == tasks
    assert server.engine.load["running"] == server.engine.load["waiting"] == 0
    assert server.engine.load["kept_tokens"] <= server.engine.cache_tokens


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_what_else_runs_changes_nothing(server: EmbeddedServer, data: st.DataObject) -> None:
    """A seed gives the same tokens alone and among others that share its prompt, some of which are given up."""
    ids = st.integers(3, 500)
    trunk = data.draw(st.lists(ids, min_size=1, max_size=60)) * 8
    prompts = [trunk[: data.draw(st.integers(1, len(trunk)))] + data.draw(st.lists(ids, max_size=5)) for _ in range(6)]
    sampling = {
        "seed": data.draw(st.integers(0, 99)),
        "temperature": data.draw(st.sampled_from([0, 0.7, 1.0])),
        "top_p": data.draw(st.sampled_from([1.0, 0.5])),
        "top_k": data.draw(st.sampled_from([-1, 5])),
        "n": data.draw(st.integers(1, 3)),
        "max_tokens": 12,
    }
    together = [asyncio.create_task(ask(server, prompt, **sampling)) for prompt in prompts]
    for task in together[4:]:
        await asyncio.sleep(data.draw(st.sampled_from([0, 0.002])))
        task.cancel()
    answers = await asyncio.gather(*together, return_exceptions=True)
    for prompt, answer in zip(prompts[:4], answers, strict=False):
        server.engine.forget()
        _, outputs, logprobs, reasons = await ask(server, prompt, **sampling)
        assert answer[1] == outputs
        assert answer[3] == reasons
        for ours, theirs in zip(logprobs, answer[2], strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-5)


async def test_greedy_takes_the_likeliest_and_cuts_leave_it_alone(server: EmbeddedServer) -> None:
    prompt, model = [5, 6, 7], server.engine.model
    _, [greedy], [logprobs], _ = await ask(server, prompt, temperature=0, max_tokens=10)
    for place, (token, logprob) in enumerate(zip(greedy, logprobs, strict=True)):
        told = [model.logprobs([*prompt, *greedy[:place], other])[-1] for other in range(model.config.vocab_size)]
        assert int(np.argmax(told)) == token
        assert abs(max(told) - logprob) < 1e-5
        if place == 1:
            break
    for cut in ({"top_k": 1}, {"top_p": 1e-9}):
        assert (await ask(server, prompt, max_tokens=10, **cut))[1] == [greedy]


async def test_tokens_are_drawn_as_often_as_they_should_be(server: EmbeddedServer) -> None:
    model, draws = server.engine.model, 1000
    _, outputs, _, _ = await ask(server, [9, 8, 7], n=draws, seed=1, max_tokens=1, temperature=0.3)
    drawn = Counter(ids[0] for ids in outputs)
    chances = np.exp([model.logprobs([9, 8, 7, token], 0.3)[-1] for token in range(model.config.vocab_size)])
    assert abs(chances.sum() - 1) < 1e-4
    for token, count in drawn.most_common(5):
        assert abs(count - draws * chances[token]) < 5 * np.sqrt(draws * chances[token])
    cut = await ask(server, [9, 8, 7], n=300, seed=1, max_tokens=1, temperature=0.3, top_k=3)
    assert {ids[0] for ids in cut[1]} <= set(np.argsort(-chances)[:3])


async def test_stop_tokens_and_stop_texts_end_an_answer(server: EmbeddedServer) -> None:
    _, [ids], _, _ = await ask(server, [5], seed=2, max_tokens=40, ignore_eos=True)
    token = ids[10]
    _, [until_token], [logprobs], [reason] = await ask(
        server, [5], seed=2, max_tokens=40, ignore_eos=True, stop_token_ids=[token]
    )
    assert until_token == ids[: ids.index(token) + 1]
    assert reason["type"] == "stop"
    assert len(logprobs) == len(until_token)
    text = next(one for one in map(server.tokenizer.decode, ids[5:]) if one.isascii() and one.strip())
    _, [until_text], _, [reason] = await ask(server, [5], seed=2, max_tokens=40, ignore_eos=True, stop=[text])
    assert until_text == ids[: len(until_text)]
    assert reason["type"] == "stop"
    assert text in server.tokenizer.decode(until_text)
    assert text not in server.tokenizer.decode(until_text[:-1])


async def test_the_end_token_of_the_checkpoint_ends_an_answer(server: EmbeddedServer) -> None:
    answers = await asyncio.gather(*(ask(server, [5], seed=seed, max_tokens=3000) for seed in range(4)))
    assert {reason["type"] for _, _, _, [reason] in answers} >= {"stop"}
    for _, [ids], _, [reason] in answers:
        assert (ids[-1] == 2) is (reason["type"] == "stop")
        assert 2 not in ids[:-1]


async def test_a_listener_hears_the_tokens_in_the_process_too(server: EmbeddedServer) -> None:
    heard: list[Any] = []

    class Listener:
        def begin(self, prompt_ids: Any) -> None:
            heard.append(list(prompt_ids))

        def more(self, ids: Any) -> None:
            heard.extend(ids)

    with hearing(token_listener, Listener()):
        _, [ids], _, _ = await ask(server, [5, 6], max_tokens=8)
    assert heard == [[5, 6], *ids]


async def test_what_was_used_longest_ago_leaves_the_cache(checkpoint: Path) -> None:
    server = EmbeddedServer(checkpoint=checkpoint, cache_tokens=3 * BLOCK)
    for first in range(10, 16):
        await ask(server, [first] * 50, max_tokens=2)
    assert server.engine.load["kept_tokens"] == 3 * BLOCK


async def test_pauses_wait_keep_and_abort(server: EmbeddedServer) -> None:
    engine = server.engine
    for mode in ("abort", "wait", "keep"):
        answer = asyncio.create_task(ask(server, [5] * 9, max_tokens=300, ignore_eos=True, seed=1))
        await until(lambda: engine.load["running"])
        await asyncio.to_thread(engine.pause, mode)
        later = asyncio.create_task(ask(server, [5], max_tokens=2))
        await asyncio.sleep(0.05)
        assert answer.done() is (mode != "keep")
        assert not later.done()
        engine.resume()
        _, [ids], _, [reason] = await answer
        await later
        await until(lambda: not engine.load["running"])
        assert (reason["type"], len(ids) == 300) == (("abort", False) if mode == "abort" else ("length", True))


async def test_chat_and_completion_are_text(server: EmbeddedServer) -> None:
    chat = await server.chat_completion(messages=[{"role": "user", "content": "Hello"}], n=2, max_tokens=5)
    assert [type(choice.message.content) for choice in chat.choices] == [str, str]
    completion = await server.completion(prompt="Hello", max_tokens=5, temperature=0)
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].text


async def test_hermes_runs_on_it(server: EmbeddedServer) -> None:
    agent = AtroposAIAgent(server=server, enabled_toolsets=["file"], quiet_mode=True, max_tokens=30, max_iterations=2)
    result = await agent.run_conversation_async("Hello")
    trajectory = result["trajectory"]
    assert trajectory.tracked
    assert trajectory.untrainable is None
    for sequence in trajectory.sequences:
        expected = server.engine.model.logprobs(sequence.tokens)
        for span in sequence.spans:
            told = np.array(span.logprobs)
            assert np.abs(told - expected[span.start - 1 : span.end - 1]).max() < 1e-4


async def test_agents_run_on_it_alone_and_in_a_server_manager(checkpoint: Path) -> None:
    config = APIServerConfig(model_name=str(checkpoint), base_url="embedded://model", health_check=False)
    for server in (EmbeddedServer(checkpoint=checkpoint), ServerManager([config], server_class=EmbeddedServer)):
        result = await AtroposAgent(server, config=AgentConfig(sampling={"max_tokens": 20})).run("Hello")
        assert result.sequences[0].trainable_tokens > 0
        assert result.sequences[0].weights_versions == ["default"]
