"""The proxy as its clients see it: answers, streams, errors, keys, limits, and the ends of sessions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from atroposlib.envs.server_handling.server_manager import ServerManager
from openai import AsyncOpenAI
from support import check_tokens, until
from test_servers import connect
from wire import VLLMWire, broken_off

from hermes_atropos.errors import ConfigurationError, ContextLengthError
from hermes_atropos.proxy import Limits, Proxy, ProxySession
from hermes_atropos.proxy.sessions import Sessions
from hermes_atropos.servers import StockVLLMServer
from hermes_atropos.testing import Reply, ScriptedServer, tool_call
from hermes_atropos.tokens import BreakCause
from hermes_atropos.trajectory import StopReason, read_record

FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
CALL = tool_call("add", a=1, b=2)
USER = {"role": "user", "content": "1 + 2?"}


def client_of(session: ProxySession) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0)


async def chat(client: AsyncOpenAI, messages: list[Any], **options: Any) -> Any:
    return await client.chat.completions.create(model="scripted", messages=messages, **options)


def result_of(message: Any, content: str = "3") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": content}


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Of a proxy whose model says "Yes." for ever."""
    async with Proxy(ScriptedServer(lambda _: "Yes."), key="") as proxy:
        yield proxy.url


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_conversation_with_tools_is_one_sequence() -> None:
    server = ScriptedServer([f"<think>Hm.</think>I add.\n{CALL}", "It is 3.", "Bye."])
    async with Proxy(server) as proxy, proxy.session() as session:
        client = client_of(session)
        first = (await chat(client, [USER], tools=TOOLS)).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.content == "I add."
        assert first.message.reasoning_content == "Hm."
        assert json.loads(first.message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}
        messages = [USER, first.message.model_dump(exclude_none=True), result_of(first.message)]
        second = await chat(client, messages, tools=TOOLS)
        assert second.choices[0].finish_reason == "stop"
        assert second.usage.prompt_tokens == len(server.requests[1].prompt_ids)
        messages += [{"role": "assistant", "content": "It is 3."}, {"role": "user", "content": "Bye."}]
        await chat(client, messages, tools=TOOLS)
    trajectory = session.trajectory
    assert trajectory is not None
    check_tokens(trajectory, server.requests)
    assert len(trajectory.sequences) == 1
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert trajectory.final_response == "Bye."
    roles = [message["role"] for message in trajectory.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert trajectory.steps[0].tool_results[0].content == "3"
    assert trajectory.tools == TOOLS


async def test_a_stream_has_the_same_answer_in_pieces() -> None:
    server = ScriptedServer([f"<think>Hm.</think>I add.\n{CALL}\n{CALL}", "It is 3."])
    async with Proxy(server) as proxy, proxy.session() as session:
        stream = await chat(
            client_of(session), [USER], tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "I add."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add"), (1, "add")]
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage.completion_tokens == len(server.requests[0].output_ids[0])


async def test_a_stream_tells_the_text_while_it_is_sampled_and_the_calls_when_they_are_whole() -> None:
    said = f"<think>Let me see.</think>I add these two numbers.\n{CALL}"
    heard, sent = asyncio.Event(), itertools.count()

    async def flow() -> None:
        if next(sent) == 20:  # within the thought: the server goes on only once some of it was heard
            await asyncio.to_thread(until, heard.is_set)

    with VLLMWire(reply=said) as wire:
        wire.flow = flow
        async with Proxy(connect(StockVLLMServer, wire), wire.tokenizer) as proxy, proxy.session() as session:
            client = client_of(session)
            chunks = []
            async for chunk in await chat(client, [USER], tools=TOOLS, stream=True):
                chunks.append(chunk)
                if len(chunks) == 2:
                    assert (chunks[0].choices[0].delta.role, heard.is_set()) == ("assistant", False)
                    heard.set()
            deltas = [chunk.choices[0].delta for chunk in chunks]
            message = {
                "role": "assistant",
                "content": "".join(delta.content or "" for delta in deltas),
                "reasoning_content": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
                "tool_calls": [call.model_dump() for delta in deltas for call in delta.tool_calls or []],
            }
            assert message["content"] == "I add these two numbers."
            assert message["reasoning_content"] == "Let me see."
            assert sum(bool(delta.content) for delta in deltas) > 1
            wire.reply = "It is 3."
            call_id = deltas[-2].tool_calls[0].id
            await chat(client, [USER, message, {"role": "tool", "tool_call_id": call_id, "content": "3"}], tools=TOOLS)
        requests = wire.to("/v1/completions")
    assert session.trajectory is not None
    [sequence] = session.trajectory.sequences
    assert [token for token in sequence.masked_tokens if token >= 0] == [
        token for request in requests for token in request.sampled[0][0]
    ]


async def test_a_stream_whose_answer_the_server_begins_anew_is_an_error_and_not_trained() -> None:
    async def fault(request: Any, answer: Any) -> Any:
        wire.reply = "Seven."
        return await broken_off(request, answer)

    with VLLMWire(reply="One two three four five six.") as wire:
        wire.faults = [fault]
        async with Proxy(connect(StockVLLMServer, wire), wire.tokenizer) as proxy, proxy.session() as session:
            stream = await chat(client_of(session), [USER], stream=True)
            with pytest.raises(openai.APIError, match="ask again"):
                [chunk async for chunk in stream]
    assert session.trajectory is not None
    assert session.trajectory.fidelity is not None
    assert session.trajectory.fidelity.tokens_trained == 0


async def test_several_answers_with_logprobs() -> None:
    server = ScriptedServer(["One.", "Two."])
    async with Proxy(server) as proxy, proxy.session() as session:
        answer = await chat(client_of(session), [USER], n=2, logprobs=True, max_tokens=50, temperature=0.5)
    assert [choice.message.content for choice in answer.choices] == ["One.", "Two."]
    request = server.requests[0]
    for choice, logprobs in zip(answer.choices, request.logprobs, strict=True):
        assert [token.logprob for token in choice.logprobs.content] == logprobs
    assert request.sampling["temperature"] == 0.5
    assert request.sampling["max_tokens"] == 50
    assert session.trajectory is not None
    assert len(session.trajectory.sequences) == 2


async def test_text_ends_at_a_stop_and_the_history_without_the_rest_goes_on() -> None:
    server = ScriptedServer(["Thought\nObservation: none", "Yes."])
    async with Proxy(server) as proxy, proxy.session() as session:
        client = client_of(session)
        said = (await chat(client, [USER], stop=["Observation:"])).choices[0].message.content
        assert said == "Thought\n"
        await chat(client, [USER, {"role": "assistant", "content": said.strip()}, USER])
    assert server.requests[0].sampling["stop"] == ["Observation:"]
    assert session.trajectory is not None
    assert session.trajectory.fidelity is not None
    assert session.trajectory.fidelity.sequences == 1


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_what_looks_like_a_call_is_text_where_nothing_can_be_called(options: dict[str, Any]) -> None:
    async with Proxy(ScriptedServer([CALL])) as proxy, proxy.session() as session:
        choice = (await chat(client_of(session), [USER], **options)).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


async def test_a_malformed_call_is_text_beside_the_others() -> None:
    broken = '<tool_call>\n{"name": "add", "arguments": {\n</tool_call>'
    async with Proxy(ScriptedServer([f"{broken}\n{CALL}"])) as proxy, proxy.session() as session:
        message = (await chat(client_of(session), [USER], tools=TOOLS)).choices[0].message
    assert message.content == broken
    assert len(message.tool_calls) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
async def test_an_answer_without_the_call_that_is_demanded_is_thrown_away_and_asked_for_again(choice: Any) -> None:
    server = ScriptedServer(["No.", tool_call("take", a=1), CALL])
    take = {"type": "function", "function": {"name": "take"}}
    tools = [*TOOLS, take] if isinstance(choice, dict) else TOOLS
    async with Proxy(server) as proxy, proxy.session() as session:
        said = (await chat(client_of(session), [USER], tools=tools, tool_choice=choice)).choices[0]
        assert said.message.tool_calls[0].function.name == "add"
    assert session.trajectory is not None
    assert session.trajectory.fidelity is not None
    assert len(server.requests) == 3
    assert ["tool_choice demands" in left for left in session.trajectory.fidelity.left_out] == [True, True]
    assert session.trajectory.fidelity.tokens_trained == len(server.requests[2].output_ids[0])


async def test_a_demand_for_a_call_that_the_model_does_not_meet_is_refused(tmp_path: Path) -> None:
    server = ScriptedServer(lambda _: "No.")
    async with Proxy(server, records=tmp_path) as proxy, proxy.session() as session:
        with pytest.raises(openai.UnprocessableEntityError, match="demands a call of add") as caught:
            await chat(client_of(session), [USER], tools=TOOLS, tool_choice="required", n=2)
        again = Sessions(server, records=tmp_path)
        again.restore()
        [restored] = again
    assert caught.value.code == "tool_choice_not_met"
    assert session.trajectory is not None
    for trajectory in (session.trajectory, restored.trajectory()):
        assert trajectory.fidelity is not None
        assert (trajectory.fidelity.turns, trajectory.fidelity.tokens_trained) == (8, 0)


async def test_what_no_sampler_knows_is_left_out_and_named() -> None:
    server = ScriptedServer(["Yes."])
    async with Proxy(server) as proxy, proxy.session() as session:
        await chat(client_of(session), [USER], reasoning_effort="high", top_p=0.9, user="me")
    assert server.requests[0].sampling["top_p"] == 0.9
    assert session.trajectory is not None
    assert session.trajectory.metadata["not_sent"] == ["reasoning_effort"]
    assert "top_p=0.9" in session.trajectory.fidelity.left_out[0]  # type: ignore[union-attr]


async def test_the_models_list_tells_the_context() -> None:
    async with Proxy(ScriptedServer([]), context_length=5000) as proxy, proxy.session() as session:
        [model] = (await client_of(session).models.list()).data
        assert (model.id, model.context_length, model.max_model_len) == ("scripted", 5000, 5000)
        assert (await client_of(session).models.retrieve("scripted")).id == "scripted"


async def test_responses_go_on_like_chats() -> None:
    server = ScriptedServer([f"<think>Hm.</think>I add.\n{CALL}", "It is 3.", "Bye."])
    tools: list[Any] = [{"type": "function", **FUNCTION}]
    async with Proxy(server) as proxy, proxy.session() as session:
        client = client_of(session)
        asked: list[Any] = [{"role": "user", "content": "1 + 2?"}]
        first = await client.responses.create(model="m", instructions="Add.", input=asked, tools=tools)
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        asked += [item.model_dump(exclude_none=True) for item in first.output]
        asked += [{"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "3"}]
        stream = await client.responses.create(model="m", instructions="Add.", input=asked, tools=tools, stream=True)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "It is 3."
        asked += [item.model_dump() for item in events[-1].response.output]
        asked += [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Bye."}]}]
        last = await client.responses.create(model="m", instructions="Add.", input=asked, tools=tools)
        assert last.output_text == "Bye."
    assert session.trajectory is not None
    check_tokens(session.trajectory, server.requests)
    assert len(session.trajectory.sequences) == 1


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "not JSON"),
        ({}, "messages must be a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "robot"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [USER], "n": 0}, "n must be"),
        ({"messages": [USER], "stop": [1]}, "stop must be"),
        ({"messages": [USER], "tools": [{}]}, "tools must be"),
        ({"messages": [USER], "response_format": {"type": "poem"}}, "response_format={'type': 'poem'}"),
        ({"messages": [USER], "tools": TOOLS, "tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        ({"messages": [USER], "tool_choice": "required"}, "tools are []"),
        (
            {"messages": [USER], "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "take"}}},
            "a call of ['take'], tools are ['add']",
        ),
        ({"messages": [USER], "top_logprobs": 3}, "top_logprobs is not supported"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong_with_it(url: str, body: Any, said: str) -> None:
    async with httpx.AsyncClient() as client:
        session = (await client.post(f"{url}/sessions")).json()
        answer = await client.post(
            f"{session['base_url']}/chat/completions",
            content=body if isinstance(body, bytes) else json.dumps(body),
            headers={"Authorization": f"Bearer {session['api_key']}"},
        )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]


async def test_a_body_that_is_too_long_is_refused(url: str) -> None:
    async with httpx.AsyncClient() as client:
        session = (await client.post(f"{url}/sessions")).json()
        answer = await client.post(
            f"{session['base_url']}/chat/completions",
            content=b" " * (33 * 2**20),
            headers={"Authorization": f"Bearer {session['api_key']}"},
        )
    assert answer.status_code == 413


@pytest.mark.parametrize("house", ["house", None])
async def test_a_sessions_key_opens_no_other_and_the_proxys_own_none(house: str | None) -> None:
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(ScriptedServer(lambda _: "Yes."), key=house))
        one, other = [await stack.enter_async_context(proxy.session()) for _ in range(2)]
        for key in (other.api_key, "house", "wrong", "Ünïcode"):
            stranger = AsyncOpenAI(base_url=one.base_url, api_key="x", max_retries=0)
            headers = {"Authorization": f"Bearer {key}".encode()}
            with pytest.raises(openai.AuthenticationError, match="another API key"):
                await chat(stranger, [USER], extra_headers=headers)
        await chat(client_of(one), [USER])
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {one.api_key}"}) as client:
            for method, path in [
                ("GET", "/sessions"),
                ("POST", "/sessions"),
                ("POST", "/setup"),
                ("GET", "/servers"),
            ]:
                assert (await client.request(method, f"{proxy.url}{path}")).status_code == 401
            assert (await client.delete(f"{proxy.url}/{other.id}")).status_code == 401
    assert (len(one.trajectory.steps), len(other.trajectory.steps)) == (1, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("limits", [{"max_requests": 1}, {"max_tokens": 1}, {"max_seconds": 1e-9}])
async def test_a_session_ends_at_its_limits(limits: dict[str, Any]) -> None:
    async with Proxy(ScriptedServer(lambda _: "Yes."), limits=Limits(**limits)) as proxy, proxy.session() as session:
        if "max_seconds" not in limits:
            await chat(client_of(session), [USER])
        with pytest.raises(openai.PermissionDeniedError, match=f"limit of {next(iter(limits))}"):
            await chat(client_of(session), [USER])


async def test_a_full_context_has_openais_code() -> None:
    async with Proxy(ScriptedServer(["Yes."]), context_length=10) as proxy, proxy.session() as session:
        with pytest.raises(openai.BadRequestError) as caught:
            await chat(client_of(session), [{"role": "user", "content": "word " * 50}])
    assert caught.value.code == "context_length_exceeded"
    assert session.trajectory is not None
    assert session.trajectory.stop_reason is StopReason.CONTEXT_LENGTH


async def test_a_failure_within_a_stream_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hermes_atropos.proxy.app.HEARTBEAT_S", 0.01)
    server = ScriptedServer([Reply(error=ContextLengthError("full"), latency=0.1)])
    async with Proxy(server) as proxy, proxy.session() as session:
        stream = await chat(client_of(session), [USER], stream=True)
        with pytest.raises(openai.APIError, match="full"):
            [chunk async for chunk in stream]


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_goes_away_ends_its_request() -> None:
    server = ScriptedServer([Reply("Never heard.", hang=True), "Yes."])
    async with Proxy(server) as proxy, proxy.session() as session:
        with pytest.raises(openai.APITimeoutError):
            await chat(client_of(session), [USER], timeout=0.3)
        assert (await chat(client_of(session), [USER])).choices[0].message.content == "Yes."
        assert server.requests[0].cancelled
    assert session.trajectory is not None
    check_tokens(session.trajectory, server.requests)
    assert session.trajectory.stop_reason is StopReason.COMPLETED


async def test_the_end_of_a_session_ends_its_requests_and_gives_its_record(tmp_path: Path) -> None:
    server = ScriptedServer(["Yes.", Reply(hang=True)])
    async with Proxy(server, records=tmp_path, key="") as proxy, httpx.AsyncClient() as client:
        opened = (await client.post(f"{proxy.url}/sessions", json={"max_requests": 5})).json()
        client.headers["Authorization"] = f"Bearer {opened['api_key']}"
        ask = {"json": {"messages": [USER]}}
        await client.post(f"{opened['base_url']}/chat/completions", **ask)
        hanging = asyncio.create_task(client.post(f"{opened['base_url']}/chat/completions", **ask))
        await asyncio.to_thread(until, lambda: len(server.requests) == 2)
        ended = (await client.delete(f"{proxy.url}/{opened['id']}")).json()
        assert ended["status"] == "deleted"
        assert (await hanging).status_code == 410
        assert (await client.post(f"{opened['base_url']}/chat/completions", **ask)).status_code == 404
    kept = read_record(tmp_path / f"{opened['id']}.jsonl")
    assert kept.final_response == ended["trajectory"]["rollout"]["final_response"] == "Yes."
    check_tokens(kept, server.requests)
    assert {name.rpartition(".")[2] for name in os.listdir(tmp_path)} == {"jsonl"}


async def test_an_idle_session_ends_and_is_kept(tmp_path: Path) -> None:
    async with Proxy(ScriptedServer(["Yes."]), records=tmp_path, idle_s=1.0) as proxy:
        opened = proxy.sessions.open()
        session = ProxySession(opened.facts.id, f"{proxy.url}/{opened.facts.id}/v1", str(opened.facts.key))
        await chat(client_of(session), [USER])
        path = tmp_path / f"{session.id}.jsonl"
        await asyncio.to_thread(until, path.exists)
        with pytest.raises(openai.NotFoundError):
            await chat(client_of(session), [USER])
    assert read_record(path).stop_reason is StopReason.TIMEOUT
    assert read_record(path).final_response == "Yes."


async def test_atroposlibs_client_has_exact_nodes() -> None:
    server = ScriptedServer(["One.", "Two.", "Three."])
    async with Proxy(server, key="") as proxy:
        manager = ServerManager([server.config], proxy_url=proxy.url)
        async with manager.managed_server(tokenizer=server.tokenizer) as managed:
            said = await managed.chat_completion(messages=[USER], n=2)
            answer = {"role": "assistant", "content": said.choices[0].message.content}
            await managed.chat_completion(messages=[USER, answer, USER])
            nodes = (await managed.fetch_state())["nodes"]
        assert len(proxy.sessions) == 0
    assert [len(node.tokens) == len(node.masked_tokens) for node in nodes] == [True, True]
    assert sum(token != -100 for node in nodes for token in node.masked_tokens) == sum(
        len(ids) for request in server.requests for ids in request.output_ids
    )


async def test_a_unix_socket_needs_no_network(tmp_path: Path) -> None:
    path = str(tmp_path / "model.sock")
    wire = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path))
    async with wire, Proxy(ScriptedServer(["Yes."]), socket=path) as proxy, proxy.session() as session:
        client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, http_client=wire)
        assert (await chat(client, [USER])).choices[0].message.content == "Yes."


@pytest.mark.parametrize("options", [{"max_tokens": "many"}, {"max_seconds": 0}, {"tool_parser": "no such format"}])
async def test_a_session_that_cannot_be_opened_says_why(url: str, options: dict[str, Any]) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/sessions", json=options)
    assert answer.status_code == 400
    assert str(next(iter(options.values()))) in answer.json()["error"]["message"]


async def test_an_address_in_use_is_an_error_that_says_so(url: str) -> None:
    with pytest.raises(ConfigurationError, match="in use"):
        async with Proxy(ScriptedServer([]), port=int(url.rpartition(":")[2])):
            pass


async def test_a_history_that_was_changed_is_a_branch_with_its_cause() -> None:
    server = ScriptedServer(["One.", "Two."])
    async with Proxy(server) as proxy, proxy.session() as session:
        await chat(client_of(session), [USER])
        await chat(client_of(session), [USER, {"role": "assistant", "content": "Another one."}, USER])
    assert session.trajectory is not None
    check_tokens(session.trajectory, server.requests)
    assert session.trajectory.fidelity is not None
    assert session.trajectory.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 1}
