"""Plain chat: through atroposlib's own OpenAI server, and through ours, against a local endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import wire
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ReasoningConfig, ServerManager
from wire import MODEL, OpenAIWire

from hermes_atropos.backends.chat import ChatBackend
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    ContextLengthError,
    NoServerError,
)
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.servers import OpenAIEndpoint
from hermes_atropos.testing import Reply, ScriptedServer, tool_call
from hermes_atropos.toolcalls import ParseStatus

ASK = [{"role": "user", "content": "How many files?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "terminal",
            "description": "Run a command",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    }
]
NATIVE = {"id": "call_1", "type": "function", "function": {"name": "terminal", "arguments": '{"command": "ls"}'}}


def config(wired: wire.Wire, **fields: Any) -> APIServerConfig:
    return APIServerConfig(base_url=f"{wired.url}/v1", model_name=MODEL, api_key="k", health_check=False, **fields)


@pytest.fixture
def wired() -> Iterator[OpenAIWire]:
    with OpenAIWire(reply="There are three.") as running:
        yield running


@pytest.fixture(params=["manager", "openai", "endpoint"])
def backend(request: pytest.FixtureRequest, wired: OpenAIWire) -> ChatBackend:
    match request.param:
        case "manager":
            return ChatBackend(ServerManager([config(wired)]))
        case "openai":
            return ChatBackend(OpenAIServer(config(wired)))
    return ChatBackend(OpenAIEndpoint(config(wired)))


def body(wired: wire.Wire) -> Any:
    return wired.to("/v1/chat/completions")[-1].body


async def answer_with(message: dict[str, Any], tools: Any = TOOLS) -> Any:
    with OpenAIWire(message={"role": "assistant", **message}) as wired:
        return await ChatBackend(OpenAIServer(config(wired))).sample(ASK, tools)


# What is asked, and what comes back


async def test_an_answer_without_tokens(backend: ChatBackend, wired: OpenAIWire) -> None:
    turn = await backend.sample(ASK, temperature=0.2, max_tokens=50)
    assert (turn.content, turn.raw, turn.finish_reason) == ("There are three.", "There are three.", "stop")
    assert (turn.prompt_tokens, turn.completion_tokens) == (11, 7)
    assert turn.ref is None
    assert not backend.tracks_tokens
    assert body(wired) == {"model": MODEL, "messages": ASK, "temperature": 0.2, "max_tokens": 50}


async def test_what_openai_does_not_know_travels_all_the_same(backend: ChatBackend, wired: OpenAIWire) -> None:
    await backend.sample(ASK, top_k=20, extra_body={"min_p": 0.1}, split="eval")
    assert {"top_k": 20, "min_p": 0.1}.items() <= body(wired).items()
    assert "split" not in body(wired)


async def test_a_harness_own_keys_stay_at_home(backend: ChatBackend, wired: OpenAIWire) -> None:
    await backend.sample(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**NATIVE, "call_id": "x", "response_item_id": "y"}],
                TURN_KEY: "turn-1",
                "finish_reason": "tool_calls",
                "reasoning": "hm",
                "_thinking_prefill": True,
            },
            {"role": "tool", "tool_call_id": "call_1", "name": "terminal", "content": "a b c", "tool_name": "terminal"},
        ],
        TOOLS,
    )
    assert body(wired)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [NATIVE]},
        {"role": "tool", "tool_call_id": "call_1", "name": "terminal", "content": "a b c"},
    ]
    assert body(wired)["tools"] == TOOLS


async def test_native_calls() -> None:
    turn = await answer_with({"content": None, "tool_calls": [NATIVE, {**NATIVE, "id": "call_2"}]})
    assert [(call.id, call.name, call.arguments) for call in turn.calls] == [
        ("call_1", "terminal", {"command": "ls"}),
        ("call_2", "terminal", {"command": "ls"}),
    ]
    assert turn.finish_reason == "tool_calls"
    assert turn.content is None


async def test_native_calls_with_broken_arguments_are_told_as_such() -> None:
    broken = {**NATIVE, "function": {"name": "terminal", "arguments": '{"command": '}}
    [call] = (await answer_with({"content": None, "tool_calls": [broken]})).calls
    assert call.status is ParseStatus.INVALID_JSON


async def test_an_answer_to_a_call_that_was_none_comes_from_the_user(backend: ChatBackend, wired: OpenAIWire) -> None:
    """Strict servers refuse a tool's message that answers no call."""
    said = {"role": "assistant", "content": "{bad", "tool_calls": [NATIVE]}
    wrong = {"role": "tool", "tool_call_id": "call_2", "content": "Error: no JSON"}
    worse = {"role": "tool", "tool_call_id": "call_3", "content": [{"type": "text", "text": "x"}]}
    right = {"role": "tool", "tool_call_id": "call_1", "content": "a.txt"}
    await backend.sample([*ASK, said, wrong, right, *ASK, {"role": "assistant", "content": "{"}, wrong, worse], TOOLS)
    sent = [(message["role"], message["content"]) for message in body(wired)["messages"]]
    told = ("user", "Error: no JSON")
    asked = ("user", "How many files?")
    assert sent == [
        asked,
        ("assistant", "{bad"),
        ("tool", "a.txt"),
        told,
        asked,
        ("assistant", "{"),
        ("user", told[1] + '\n[{"type": "text", "text": "x"}]'),
    ]


async def test_calls_in_the_text() -> None:
    turn = await answer_with({"content": "<think>Look.</think>I look. " + tool_call("terminal", command="ls")})
    assert [call.arguments for call in turn.calls] == [{"command": "ls"}]
    assert (turn.content, turn.reasoning) == ("I look.", "Look.")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Three.", "reasoning_content": "I count."},
        {"content": "Three.", "reasoning": "I count."},
        {"content": "Three.", "reasoning_details": [{"type": "reasoning.text", "text": "I count.", "format": "x"}]},
        {"content": "Three.", "reasoning_details": [{"type": "reasoning.summary", "summary": "I count."}]},
        {"content": "<think>I count.</think>\n\nThree."},
        {"content": "I count.</think>\n\nThree."},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "I count."}]},
                {"type": "text", "text": "Three."},
            ]
        },
    ],
)
async def test_reasoning_is_read_wherever_servers_put_it(message: dict[str, Any]) -> None:
    turn = await answer_with(message)
    assert (turn.content, turn.reasoning, turn.calls) == ("Three.", "I count.", [])


@pytest.mark.parametrize("channel", ["reasoning_content", "reasoning"])
async def test_calls_in_the_reasoning_count_where_the_content_is_empty(channel: str) -> None:
    thoughts = "I must look. " + tool_call("terminal", command="ls")
    assert [call.name for call in (await answer_with({"content": "", channel: thoughts})).calls] == ["terminal"]
    assert (await answer_with({"content": "Done.", channel: thoughts})).calls == []


async def test_nothing_at_all() -> None:
    turn = await answer_with({"content": None})
    assert (turn.content, turn.reasoning, turn.calls, turn.raw) == (None, None, [], "")


# Servers that take no tools


async def test_a_server_that_refuses_tools_finds_them_in_the_system_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with OpenAIWire(reply=tool_call("terminal", command="ls"), takes_tools=False) as wired:
        backend = ChatBackend(OpenAIServer(config(wired)))
        messages = [{"role": "system", "content": "Be brief."}, *ASK]
        [call] = (await backend.sample(messages, TOOLS, tool_choice="auto")).calls
        assert len(wired.to("/v1/chat/completions")) == 2
        assert "tools" not in body(wired)
        assert "tool_choice" not in body(wired)
        [system, user] = body(wired)["messages"]
        assert user == ASK[0]
        assert system["content"].startswith("Be brief.\n\n")
        assert '"terminal"' in system["content"]
        assert "The server takes no tools" in caplog.text

        messages += [
            {"role": "assistant", "content": "I look.", "tool_calls": [call.to_openai(), NATIVE]},
            {"role": "tool", "tool_call_id": call.id, "content": "a"},
            {"role": "tool", "tool_call_id": "call_1", "content": "b"},
            {"role": "user", "content": "Go on."},
        ]
        await backend.sample(messages, TOOLS)
        assert len(wired.to("/v1/chat/completions")) == 3, "it is not asked again whether it takes tools"
        _, _, assistant, results, last = body(wired)["messages"]
        assert assistant["content"].startswith("I look.\n<tool_call>")
        assert assistant["content"].count("<tool_call>") == 2
        assert "tool_calls" not in assistant
        assert results["role"] == "user"
        assert results["content"].count("<tool_response>") == 2
        assert results["content"].index('"a"') < results["content"].index('"b"')
        assert last == {"role": "user", "content": "Go on."}


async def test_another_refusal_is_no_reason_to_hide_the_tools(wired: OpenAIWire) -> None:
    backend = ChatBackend(OpenAIServer(config(wired)))
    wired.faults = [wire.status(400, "temperature must not be negative")]
    with pytest.raises(BackendResponseError, match="temperature"):
        await backend.sample(ASK, TOOLS)
    await backend.sample(ASK, TOOLS)
    wired.faults = [wire.status(400, "a tool message must follow its call")]
    with pytest.raises(BackendResponseError, match="must follow"):
        await backend.sample(ASK, TOOLS)


# Failures


async def test_a_passing_failure_is_retried(backend: ChatBackend, wired: OpenAIWire) -> None:
    wired.faults = [wire.status(429, "busy", Retry_After="0"), wire.dropped, wire.status(503, "starting")]
    assert (await backend.sample(ASK)).content == "There are three."
    assert len(wired.to("/v1/chat/completions")) == 4


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
async def test_a_refusal_is_not(backend: ChatBackend, wired: OpenAIWire, code: int) -> None:
    wired.faults = [wire.status(code, '{"error": "no"}')]
    with pytest.raises(BackendResponseError, match=f"answered {code}") as failure:
        await backend.sample(ASK)
    assert (failure.value.status, failure.value.body, failure.value.attempts) == (code, '{"error": "no"}', 1)
    assert failure.value.url == f"{wired.url}/v1/chat/completions"
    assert len(wired.to("/v1/chat/completions")) == 1


async def test_retries_end(wired: OpenAIWire) -> None:
    backend = ChatBackend(OpenAIServer(config(wired)))
    wired.faults = [wire.status(500, "CUDA on fire", Retry_After="0")] * 100
    with pytest.raises(BackendResponseError, match="CUDA on fire") as failure:
        await backend.sample(ASK)
    asked = len(wired.to("/v1/chat/completions"))
    assert asked == failure.value.attempts <= 6, "nobody else retries as well"


async def test_an_overlong_prompt_is_told_apart(backend: ChatBackend, wired: OpenAIWire) -> None:
    wired.faults = [wire.status(400, "This model's maximum context length is 4096 tokens.")]
    with pytest.raises(ContextLengthError):
        await backend.sample(ASK)


async def test_a_server_that_hangs(wired: OpenAIWire) -> None:
    server = OpenAIEndpoint(config(wired))
    server.config.timeout = 0.2
    wired.faults = [wire.hanging] * 100
    with pytest.raises(BackendTimeoutError):
        await ChatBackend(server, patience_s=0.1).sample(ASK)


async def test_no_message(backend: ChatBackend, wired: OpenAIWire) -> None:
    wired.faults = [wire.text('{"id": "1", "choices": [{"index": 0}]}')]
    with pytest.raises(BackendResponseError, match="without a message"):
        await backend.sample(ASK)


async def test_a_dead_server_is_replaced_by_another(wired: OpenAIWire) -> None:
    with wire.nobody() as url:
        dead = config(wired)
        dead.base_url = f"{url}/v1"
        backend = ChatBackend(ServerManager([dead, config(wired)]))
        for _ in range(3):
            assert (await backend.sample(ASK)).content == "There are three."


async def test_nobody_at_all() -> None:
    with wire.nobody() as url:
        server = OpenAIServer(APIServerConfig(base_url=f"{url}/v1", model_name=MODEL, api_key="k"))
        with pytest.raises(BackendConnectionError, match="no answer from"):
            await ChatBackend(server, patience_s=0.1).sample(ASK)


async def test_a_cancelled_call_hangs_up(backend: ChatBackend, wired: OpenAIWire) -> None:
    wired.faults = [wire.hanging]
    call = asyncio.create_task(backend.sample(ASK))
    request = await wired.arrival()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(request.hung_up.wait, 30)


def test_a_server_manager_without_servers() -> None:
    manager = ServerManager([APIServerConfig(base_url="http://x/v1", api_key="k", health_check=False)])
    manager.servers = []
    with pytest.raises(NoServerError, match="at least one"):
        ChatBackend(manager)


# Loops, slots, statistics


def test_one_backend_serves_several_event_loops(backend: ChatBackend, wired: OpenAIWire) -> None:
    async def use() -> list[Any]:
        return await asyncio.gather(*(backend.sample(ASK) for _ in range(20)))

    for _ in range(3):
        assert [turn.content for turn in asyncio.run(use())] == ["There are three."] * 20


def test_contention_on_several_event_loops(wired: OpenAIWire) -> None:
    backend = ChatBackend(OpenAIServer(config(wired, num_max_requests_at_once=2)))

    async def use() -> list[Any]:
        return await asyncio.gather(*(backend.sample(ASK) for _ in range(10)))

    for _ in range(2):
        assert len(asyncio.run(use())) == 10


@pytest.mark.parametrize(("split", "slots"), [("train", 2), ("eval", 1)])
async def test_no_more_requests_at_once_than_the_server_has_slots(split: str, slots: int) -> None:
    running = most = 0

    async def reply(messages: Any) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return "ok"

    server = ScriptedServer(reply)
    server.sem = type(server.sem)(2)
    server.eval_sem = type(server.eval_sem)(1)
    backend = ChatBackend(server)
    await asyncio.gather(*(backend.sample(ASK, split=split) for _ in range(8)))
    assert most == slots
    assert len(server.request_timings if split == "train" else server.eval_request_timings) == 8


async def test_the_server_with_the_most_room_is_asked() -> None:
    servers = [ScriptedServer(lambda messages, i=i: Reply(str(i), latency=0.05)) for i in range(3)]
    manager = ServerManager([APIServerConfig(base_url="http://x/v1", api_key="k", health_check=False)])
    manager.servers = servers
    backend = ChatBackend(manager)
    turns = await asyncio.gather(*(backend.sample(ASK) for _ in range(9)))
    assert sorted(turn.content for turn in turns) == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


async def test_atroposlibs_reasoning_config_is_respected(wired: OpenAIWire) -> None:
    manager = ServerManager([config(wired)], reasoning_config=ReasoningConfig(effort="high"))
    await ChatBackend(manager).sample(ASK)
    assert body(wired)["reasoning"] == {"enabled": True, "effort": "high"}


async def test_a_script_that_breaks_is_a_backend_error_with_its_cause() -> None:
    cause = RuntimeError("boom")
    with pytest.raises(BackendError, match="boom") as failure:
        await ChatBackend(ScriptedServer([Reply(error=cause)])).sample(ASK)
    assert failure.value.__cause__ is cause
