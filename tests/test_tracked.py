"""Token ids in and out: what the server was sent, what is kept of it, and what becomes of a call that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from atroposlib.envs.server_handling.server_manager import ServerManager
from families import QWEN3_FAMILY
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import Future, RetryError
from yarl import URL

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.backends.pool import ATTEMPTS
from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    ContextLengthError,
    NoServerError,
    SamplingError,
    TokenFidelityError,
    UnsupportedServerError,
)
from hermes_atropos.exports import atropos
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.react import AtroposAgent
from hermes_atropos.rendering import renderer_for
from hermes_atropos.servers.sampling import NEUTRAL
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.tokens import BreakCause

TOKENIZER = chatml_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
LIMIT = 30

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def stored(turn: ModelTurn, content: str = "what the harness kept") -> Message:
    return {"role": "assistant", "content": content, TURN_KEY: turn.ref}


def on(server: Any, **options: Any) -> TrackedBackend:
    return TrackedBackend(server, TOKENIZER, **{"patience_s": 5.0, **options})


def manager_of(*servers: Any, max_n: int = 8) -> ServerManager:
    manager = ServerManager([], server_class=ScriptedServer, max_n_completions=max_n)
    manager.servers = list(servers)
    return manager


def stream(server: ScriptedServer, request: int = -1, choice: int = 0) -> list[int]:
    return server.requests[request].prompt_ids + server.requests[request].output_ids[choice]


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_prompt_is_the_last_prompt_the_sampled_ids_and_the_rendering_of_what_is_new() -> None:
    server = ScriptedServer(["  Hello. \n", "Bye."])
    backend = on(server)
    messages = [{"role": "system", "content": "Be kind."}, user("Hi")]
    first = await backend.sample(messages)
    assert server.requests[0].prompt_ids == TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    await backend.sample([*messages, stored(first), user("And?")])
    new = encode("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert server.requests[1].prompt_ids == stream(server, 0) + new
    (sequence,) = backend.ledger.sequences()
    assert sequence.tokens == stream(server, 1)
    assert sequence.tokens.count(END) == 5


async def test_a_truncated_turn_is_closed_once() -> None:
    server = ScriptedServer([Reply("I was about to", finish_reason="length"), "Done."])
    backend = on(server)
    first = await backend.sample([user("Hi")])
    assert first.finish_reason == "length"
    await backend.sample([user("Hi"), stored(first), user("Go on")])
    new = encode("<|im_end|>\n<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n")
    assert server.requests[1].prompt_ids == stream(server, 0) + new


async def test_an_answer_is_read_and_its_calls_are_continued_by_their_results() -> None:
    server = ScriptedServer(["<think>\nHm.\n</think>\n\nI look. " + tool_call("ls", path="/tmp"), "Three files."])
    tools = [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}]
    backend = on(server)
    turn = await backend.sample([user("Look")], tools)
    assert (turn.reasoning or "").strip() == "Hm."
    assert (turn.content or "").strip() == "I look."
    assert [(call.name, call.arguments) for call in turn.calls] == [("ls", {"path": "/tmp"})]
    assert turn.raw == TOKENIZER.decode(server.requests[0].output_ids[0])
    assert turn.prompt_tokens == len(server.requests[0].prompt_ids)
    assert turn.completion_tokens == len(server.requests[0].output_ids[0])
    result = {"role": "tool", "tool_call_id": turn.calls[0].id, "name": "ls", "content": "a b c"}
    await backend.sample([user("Look"), stored(turn), result], tools)
    new = encode("\n<|im_start|>user\n<tool_response>\na b c\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert server.requests[1].prompt_ids == stream(server, 0) + new


async def test_a_message_that_lost_its_reference_is_known_by_its_content_and_calls() -> None:
    server = ScriptedServer(["I look. " + tool_call("ls", path="/tmp", all=True), "Done."])
    tools = [{"type": "function", "function": {"name": "ls"}}]
    backend = on(server)
    turn = await backend.sample([user("Look")], tools)
    call = {"id": "x", "type": "function", "function": {"name": "ls", "arguments": '{"all":true,"path":"/tmp"}'}}
    bare = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    await backend.sample([user("Look"), bare, {"role": "tool", "tool_call_id": "x", "content": "a"}], tools)
    assert server.requests[1].prompt_ids[: len(stream(server, 0))] == stream(server, 0)
    assert turn.ref == backend.ledger.turns[1].prompt.parent.ref  # type: ignore[union-attr]


async def test_several_answers_to_one_prompt_are_siblings() -> None:
    server = ScriptedServer(["a", "b", "c", "d", "e"])
    backend = on(manager_of(server, max_n=2))
    answers = await backend.sample_group([user("Hi")], n=5)
    assert [answer.content for answer in answers] == ["a", "b", "c", "d", "e"]
    assert [len(request.output_ids) for request in server.requests] == [2, 2, 1]
    assert len({tuple(request.prompt_ids) for request in server.requests}) == 1
    sampled = [stream(server, request, choice) for request, choice in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    assert [sequence.tokens for sequence in backend.ledger.sequences()] == sampled
    assert backend.ledger.report().breaks == {}


async def test_a_server_that_ignores_n_is_asked_n_times() -> None:
    server = ScriptedServer(["a", "b", "c"])
    server.config.n_kwarg_is_ignored = True
    answers = await on(server).sample_group([user("Hi")], n=3)
    assert [answer.content for answer in answers] == ["a", "b", "c"]
    assert [request.sampling["n"] for request in server.requests] == [1, 1, 1]


async def test_sampling_parameters_reach_the_server_and_nothing_else_does() -> None:
    server = ScriptedServer(["a", "b"])
    backend = on(server)
    await backend.sample(
        [user("Hi")],
        temperature=0.7,
        top_p=0.9,
        max_completion_tokens=64,
        stop=["\n\n"],
        seed=None,
        tool_choice="auto",
        stream=True,
        n=4,
        extra_body={"lora_path": "adapter"},
    )
    assert server.requests[0].sampling == {
        "model": "scripted",
        "n": 1,
        **NEUTRAL,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "stop": ["\n\n"],
        "lora_path": "adapter",
        "stop_token_ids": sorted(renderer_for(TOKENIZER).stop_token_ids),
    }
    await backend.sample([user("Hello")], stop_token_ids=[7])
    assert server.requests[1].sampling["stop_token_ids"] == [7]


async def test_what_no_token_server_knows_is_refused_before_the_call() -> None:
    server = ScriptedServer(["a"])
    with pytest.raises(SamplingError, match="no token server knows beam_width: leave it out"):
        await on(server).sample([user("Hi")], beam_width=3, temperature=0.5)
    assert server.requests == []


async def test_evaluation_takes_the_servers_evaluation_slots() -> None:
    server = ScriptedServer(["a", "b"])
    backend = on(server)
    await backend.sample([user("Hi")], split="eval")
    assert (len(server.request_timings), len(server.eval_request_timings)) == (0, 1)
    await backend.sample([user("Hello")])
    assert (len(server.request_timings), len(server.eval_request_timings)) == (1, 1)
    assert "split" not in server.requests[0].sampling


# ── Branches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class NoBridge:
    """A renderer that can't append, perhaps because it writes a conversation's beginning anew once it has grown."""

    def __init__(self, *, anew: bool) -> None:
        self.inner = renderer_for(TOKENIZER)
        self.anew = anew
        self.stop_token_ids, self.vocab_size = self.inner.stop_token_ids, self.inner.vocab_size
        self.parse, self.decode = self.inner.parse, self.inner.decode
        self.threads: list[int] = []

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        self.threads.append(threading.get_ident())
        ids = self.inner.render(messages, tools)
        return [len(messages) + 10, *ids] if self.anew else ids

    def bridge(self, *_: Any) -> BreakCause:
        return BreakCause.TEMPLATE if self.anew else BreakCause.UNPROVABLE


@pytest.mark.parametrize(
    ("anew", "reply", "cause"),
    [
        (True, Reply("Hello."), BreakCause.TEMPLATE),
        (False, Reply("Hello."), BreakCause.UNPROVABLE),
        (False, Reply("Hello", finish_reason="length"), BreakCause.TRUNCATED),
    ],
)
async def test_what_cannot_be_appended_is_rendered_anew_and_the_break_has_a_cause(
    anew: bool, reply: Reply, cause: BreakCause
) -> None:
    server = ScriptedServer([reply, "Bye."])
    backend = on(server, renderer=NoBridge(anew=anew))
    first = await backend.sample([user("Hi")])
    messages = [user("Hi"), stored(first, "Hello."), user("And?")]
    await backend.sample(messages)
    assert server.requests[1].prompt_ids == backend.renderer.render(messages)
    assert [sequence.tokens for sequence in backend.ledger.sequences()] == [stream(server, 0), stream(server, 1)]
    assert backend.ledger.report().breaks == {cause: 1}
    check_trained_once(backend, server)


async def test_a_break_where_the_harness_dropped_turns_is_the_harnesss() -> None:
    server = ScriptedServer(["a", "b", "c", "d", "e"])
    backend = on(server, renderer=NoBridge(anew=False))
    messages = [user("Hi")]
    for text in ("One", "Two"):
        messages += [stored(await backend.sample(messages), "."), user(text)]
    last = stored(await backend.sample(messages), ".")
    await backend.sample([*messages[:2], user("Summary: One."), last, user("Three")])
    await backend.sample([*messages[:2], user("Summary: One and two.")])
    causes = [turn.prompt.cause for turn in backend.ledger.turns[3:]]
    assert causes == [BreakCause.HISTORY_REWRITTEN] * 2
    check_trained_once(backend, server)


async def test_long_conversations_are_rendered_off_the_event_loop_and_short_ones_on_it() -> None:
    backend = on(ScriptedServer(["a", "b"]), renderer=(renderer := NoBridge(anew=False)))
    await backend.sample([user("short")])
    await backend.sample([user("long " * 10_000)], max_tokens=10)
    assert renderer.threads[0] == threading.get_ident() != renderer.threads[1]


# ── Context length ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    server = ScriptedServer(["a", "b"])
    backend = on(server, context_length=100)
    first = await backend.sample([user("Hi")], max_tokens=1000)
    room = 100 - len(server.requests[0].prompt_ids)
    assert server.requests[0].sampling["max_tokens"] == room
    await backend.sample([user("Hi"), stored(first), user("And?")])
    assert server.requests[1].sampling["max_tokens"] == 100 - len(server.requests[1].prompt_ids)


async def test_a_prompt_that_fills_the_context_is_not_sent_and_the_turns_before_it_stay() -> None:
    server = ScriptedServer(["a"])
    backend = on(server, context_length=40)
    first = await backend.sample([user("Hi")])
    with pytest.raises(ContextLengthError, match="context 40") as overlong:
        await backend.sample([user("Hi"), stored(first), user("word " * 40)])
    assert overlong.value.attempts == 0
    assert len(server.requests) == 1
    assert backend.ledger.sequences()[0].tokens == stream(server, 0)


async def test_the_server_knows_its_context_better_than_the_tokenizer() -> None:
    server = ScriptedServer(["a", "b"])
    backend = on(server)
    await backend.sample([user("Hi")], max_tokens=10**6)
    assert server.requests[0].sampling["max_tokens"] == TOKENIZER.model_max_length - len(server.requests[0].prompt_ids)
    server.context_length = 64
    await backend.sample([user("Hello")], max_tokens=10**6)
    assert server.requests[1].sampling["max_tokens"] == 64 - len(server.requests[1].prompt_ids)


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def aiohttp_error(status: int, **headers: str) -> aiohttp.ClientResponseError:
    url = URL("http://model/generate")
    request = aiohttp.RequestInfo(url, "POST", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(request, (), status=status, message="no", headers=CIMultiDict(headers))


def httpx_error(status: int, body: str = "no", **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://model/generate")
    response = httpx.Response(status, text=body, headers=headers, request=request)
    return httpx.HTTPStatusError("no", request=request, response=response)


def openai_error(status: int, body: str = "no") -> openai.APIStatusError:
    return openai.APIStatusError("no", response=httpx_error(status, body).response, body=None)


def retried(error: Exception) -> RetryError:
    future = Future(3)
    future.set_exception(error)
    return RetryError(future)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut off"),
        aiohttp_error(503),
        aiohttp_error(429, **{"Retry-After": "0"}),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("cut off"),
        httpx.ReadTimeout("slow"),
        httpx_error(500),
        openai_error(502),
        openai.APIConnectionError(request=httpx.Request("POST", "http://model")),
        retried(ConnectionRefusedError()),
        BackendConnectionError("nobody there"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_may_pass_is_tried_again_with_the_same_ids(error: Exception) -> None:
    server = ScriptedServer([Reply(error=error), "Hello."])
    backend = on(server)
    assert (await backend.sample([user("Hi")])).content == "Hello."
    failed, answered = server.requests
    assert failed.prompt_ids == answered.prompt_ids
    assert len(backend.ledger.turns) == 1


@pytest.mark.parametrize(
    ("error", "kind", "status", "body"),
    [
        (aiohttp_error(400), BackendResponseError, 400, "no"),
        (httpx_error(404, "no such model"), BackendResponseError, 404, "no such model"),
        (openai_error(401, "who are you"), BackendResponseError, 401, "who are you"),
        (retried(httpx_error(422, "no")), BackendResponseError, 422, "no"),
        (httpx_error(400, "maximum context length is 4096 tokens"), ContextLengthError, 400, None),
        (ValueError("a bug of the server class"), BackendError, None, None),
        (BackendResponseError("refused", status=403, body="no"), BackendResponseError, 403, "no"),
    ],
)
async def test_what_cannot_succeed_is_not_tried_again_and_keeps_its_cause(
    error: Exception, kind: type[BackendError], status: int | None, body: str | None
) -> None:
    server = ScriptedServer([Reply(error=error), "never asked for"])
    with pytest.raises(BackendError) as failure:
        await on(server).sample([user("Hi")])
    assert type(failure.value) is kind
    assert failure.value.status == status
    assert body in (failure.value.body or "") if body else True
    assert failure.value.attempts == len(server.requests) == 1
    assert failure.value is error or failure.value.__cause__ is error


async def test_a_part_of_a_group_that_fails_fails_the_group_with_its_cause() -> None:
    cause = ValueError("a bug of the server class")
    server = ScriptedServer(["a", "b", Reply(error=cause)])
    with pytest.raises(BackendError, match="a bug") as failure:
        await on(manager_of(server, max_n=2)).sample_group([user("Hi")], n=3)
    assert failure.value.__cause__ is cause


async def test_a_failure_that_lasts_ends_with_its_cause_and_the_number_of_requests() -> None:
    cause = ConnectionResetError("reset")
    server = ScriptedServer(lambda _: Reply(error=cause))
    with pytest.raises(BackendConnectionError, match="scripted://model: reset") as failure:
        await on(server, patience_s=1.0).sample([user("Hi")])
    assert failure.value.__cause__ is cause
    assert 1 < failure.value.attempts == len(server.requests) <= ATTEMPTS
    assert failure.value.url == "scripted://model"


async def test_a_server_that_asks_for_more_patience_than_there_is_is_not_waited_for() -> None:
    server = ScriptedServer(lambda _: Reply(error=httpx_error(429, **{"Retry-After": "3600"})))
    with pytest.raises(BackendResponseError, match="429"):
        async with asyncio.timeout(LIMIT):
            await on(server).sample([user("Hi")])
    assert len(server.requests) == 1


async def test_a_server_that_dies_is_replaced_and_the_tokens_go_on() -> None:
    dying = ScriptedServer(["Hello.", Reply(error=ConnectionRefusedError()), "never asked for"])
    other = ScriptedServer(["Bye."], max_requests=1000)
    backend = on(manager_of(dying, other))
    first = await backend.sample([user("Hi")])
    await backend.sample([user("Hi"), stored(first), user("And?")])
    assert len(dying.requests) == 2
    assert other.requests[0].prompt_ids == dying.requests[1].prompt_ids
    assert other.requests[0].prompt_ids[: len(stream(dying, 0))] == stream(dying, 0)
    (sequence,) = backend.ledger.sequences()
    assert sequence.tokens == stream(other, 0)


async def test_the_healthy_server_with_the_most_room_is_asked() -> None:
    servers = [ScriptedServer(lambda _: "x", max_requests=room) for room in (100, 1, 50)]
    servers[0].server_healthy = False
    servers[0].initialized = True
    backend = on(manager_of(*servers))
    await backend.sample([user("Hi")])
    assert [len(server.requests) for server in servers] == [0, 0, 1]


async def test_conversations_that_begin_alike_stay_on_one_server() -> None:
    servers = [ScriptedServer(lambda _: "x") for _ in range(3)]
    backend = on(manager_of(*servers))
    homes = []
    for topic in range(24):
        before = [len(server.requests) for server in servers]
        for twin in (backend.fresh(), backend.fresh()):  # two rollouts of one group
            messages = [user(f"Topic {topic}")]
            for _ in range(2):
                turn = await twin.sample(messages)
                messages += [{"role": "assistant", "content": turn.content, TURN_KEY: turn.ref}, user("Go on")]
        asked = [len(server.requests) - count for server, count in zip(servers, before, strict=True)]
        assert sorted(asked) == [0, 0, 4]
        homes.append(asked.index(4))
    assert set(homes) == {0, 1, 2}


async def test_a_server_with_less_than_half_the_room_is_no_ones_home() -> None:
    servers = [ScriptedServer(lambda _: "x", max_requests=room) for room in (49, 100)]
    backend = on(manager_of(*servers))
    for topic in range(8):
        await backend.fresh().sample([user(f"Topic {topic}")])
    assert [len(server.requests) for server in servers] == [0, 8]


async def test_waiting_for_a_healthy_server_has_an_end() -> None:
    server = ScriptedServer(["never asked for"])
    server.server_healthy = False
    server.initialized = True
    with pytest.raises(BackendConnectionError, match=r"no server became healthy.*scripted://model"):
        async with asyncio.timeout(LIMIT):
            await on(server, patience_s=0.3).sample([user("Hi")])
    assert server.requests == []


class Dying(ScriptedServer):
    """Answers a request with an error, and is unhealthy from then on."""

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        self.server_healthy = False
        return await super()._tokens_and_logprobs_completion_wrapper(**kwargs)


async def test_a_server_that_died_and_stays_dead_leaves_the_cause_of_its_death() -> None:
    server = Dying([Reply(error=ConnectionResetError("reset"))])
    with pytest.raises(BackendConnectionError, match="no server became healthy") as failure:
        await on(server, patience_s=0.5).sample([user("Hi")])
    assert failure.value.attempts == len(server.requests) == 1
    assert "reset" in str(failure.value.__cause__)


class Recovering(ScriptedServer):
    """Unhealthy until its second health check."""

    def __init__(self) -> None:
        super().__init__(lambda _: "x")
        self.config.health_check = True
        self.checks = 0

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        while True:
            self.checks += 1
            self.server_healthy = self.checks > 1
            await asyncio.sleep(0)


async def test_a_server_that_recovers_is_asked() -> None:
    server = Recovering()
    server.server_healthy = False
    await on(server).sample([user("Hi")])
    server.check_task.cancel()
    assert server.checks > 1


def test_a_health_check_whose_event_loop_is_gone_is_started_again() -> None:
    server = Recovering()

    async def ask() -> int:
        checks = server.checks
        server.server_healthy = False
        await on(server).sample([user("Hi")])
        return server.checks - checks

    assert asyncio.run(ask()) > 0
    server.checks = 0
    assert asyncio.run(ask()) > 0


def test_a_server_serves_one_event_loop_after_another_under_contention() -> None:
    server = ScriptedServer(lambda _: "x", latency=0.001, max_requests=2)

    async def crowd() -> None:
        await asyncio.gather(*(on(server).sample([user(f"Hi {number}")]) for number in range(8)))

    asyncio.run(crowd())
    asyncio.run(crowd())
    assert len(server.requests) == 16


async def test_cancelling_a_call_gives_the_request_up_and_frees_its_slot() -> None:
    asked = asyncio.Event()

    def reply(_: Any) -> Reply:
        hang = not asked.is_set()
        asked.set()
        return Reply("Hello.", hang=hang)

    server = ScriptedServer(reply, max_requests=1)
    backend = on(server)
    call = asyncio.create_task(backend.sample([user("Hi")]))
    async with asyncio.timeout(LIMIT):
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert server.requests[0].cancelled
        assert (await backend.sample([user("Hi")])).content == "Hello."
    assert len(server.requests) == 2
    assert len(backend.ledger.turns) == 1


async def test_cancelling_while_a_retry_is_waited_for() -> None:
    asked = asyncio.Event()

    def reply(_: Any) -> Reply:
        asked.set()
        return Reply(error=httpx_error(429, **{"Retry-After": "20"}))

    server = ScriptedServer(reply)
    call = asyncio.create_task(on(server, patience_s=LIMIT).sample([user("Hi")]))
    async with asyncio.timeout(LIMIT / 2):
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(server.requests) == 1


def test_what_is_no_server_is_refused_at_once() -> None:
    with pytest.raises(NoServerError):
        on(manager_of())
    with pytest.raises(NoServerError):
        ExactManagedServer(manager_of())
    with pytest.raises(UnsupportedServerError, match="dict"):
        on({})


class Untokenized(ScriptedServer):
    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        raise NotImplementedError("not for this server")


async def test_a_server_whose_token_call_is_not_implemented() -> None:
    with pytest.raises(UnsupportedServerError, match="Untokenized has no token call"):
        await on(Untokenized([])).sample([user("Hi")])


# ── Strictness ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Tampering(ScriptedServer):
    """Alters its answers before it gives them."""

    def __init__(self, replies: Any, tamper: Callable[..., Any]) -> None:
        super().__init__(replies)
        self.tamper = tamper

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        return self.tamper(*await super()._tokens_and_logprobs_completion_wrapper(**kwargs))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda echo, ids, logprobs, reasons: (echo[1:], ids, logprobs, reasons), "another length"),
        (lambda echo, ids, logprobs, reasons: ([7, *echo[1:]], ids, logprobs, reasons), "another prompt"),
        (lambda echo, ids, logprobs, reasons: (echo, ids, [logprobs[0][:-1]], reasons), "as many logprobs"),
        (lambda echo, ids, logprobs, reasons: (echo, [[*ids[0][:-1], 10**6]], logprobs, reasons), "vocabulary"),
        (lambda echo, ids, logprobs, reasons: (echo, ids, [[1.0] * len(ids[0])], reasons), "finite number up to 0"),
    ],
)
async def test_an_answer_that_does_not_fit_is_refused_and_kept_for_inspection(
    tamper: Callable[..., Any], message: str
) -> None:
    server = Tampering(["Hello.", "Hello."], lambda *answer: answer)
    backend = on(server)
    first = await backend.sample([user("Hi")])
    server.tamper = tamper
    with pytest.raises(TokenFidelityError, match=message) as refusal:
        await backend.sample([user("Hi"), stored(first), user("And?")])
    assert refusal.value.turn == 1
    assert len(server.requests) == 2, "it was asked again, as if it could be mended"
    assert backend.ledger.turns[1].fault == str(refusal.value)
    (sequence,) = backend.ledger.sequences(include_discarded=True)
    assert sequence.tokens == stream(server, 0)
    assert backend.ledger.report().mismatches == 1


@pytest.mark.parametrize("echo", [None, []])
async def test_a_server_that_does_not_echo_the_prompt(echo: Any) -> None:
    server = Tampering(["Hello."], lambda _, *answer: (echo, *answer))
    assert (await on(server).sample([user("Hi")])).content == "Hello."


async def test_the_good_answers_beside_a_refused_one_are_not_trained_as_nobody_saw_them() -> None:
    server = Tampering(["a", "b"], lambda echo, ids, logprobs, reasons: (echo, ids, [logprobs[0], []], reasons))
    backend = on(server)
    with pytest.raises(TokenFidelityError):
        await backend.sample_group([user("Hi")], n=2)
    assert backend.ledger.sequences() == []
    assert len(backend.ledger.report().left_out) == 2


@pytest.mark.parametrize(
    "tamper",
    [
        lambda *_: None,
        lambda *answer: answer[:3],
        lambda echo, ids, logprobs, reasons: (echo, ids, [None], reasons),
        lambda echo, ids, logprobs, reasons: (echo, ids * 2, logprobs * 2, reasons * 2),
        lambda echo, ids, logprobs, reasons: (echo, ids, logprobs, []),
    ],
)
async def test_an_answer_of_another_shape_is_an_error_of_the_server(tamper: Callable[..., Any]) -> None:
    server = Tampering(["Hello."], tamper)
    with pytest.raises(BackendResponseError):
        await on(server).sample([user("Hi")])
    assert len(server.requests) == 1


async def test_an_answer_that_cannot_be_read_is_kept_and_not_trained() -> None:
    backend = on(ScriptedServer(["Hello."]), renderer=(renderer := NoBridge(anew=False)))

    def parse(*_: Any) -> Any:
        raise RuntimeError("what is this")

    renderer.parse = parse  # type: ignore[assignment]
    with pytest.raises(RuntimeError):
        await backend.sample([user("Hi")])
    assert backend.ledger.sequences() == []
    assert "what is this" in backend.ledger.report().left_out[0]


@pytest.mark.parametrize(
    ("reason", "ended", "expected", "metadata"),
    [
        ("stop", True, "stop", {}),
        ("length", False, "length", {}),
        ("length", True, "length", {}),
        ({"type": "stop", "matched": 2, "weights_version": "7"}, True, "stop", {"matched": 2, "weights_version": "7"}),
        (None, True, "stop", {}),
        (None, False, "length", {}),
    ],
)
async def test_finish_reasons_and_what_stands_beside_them(
    reason: Any, ended: bool, expected: str, metadata: dict[str, Any]
) -> None:
    reply = Reply("Hello.", finish_reason="stop" if ended else "length")
    server = Tampering([reply], lambda *answer: (*answer[:3], [reason]))
    backend = on(server)
    assert (await backend.sample([user("Hi")])).finish_reason == expected
    assert backend.ledger.turns[0].metadata == {"server_url": "scripted://model", **metadata}


# ── The record ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_trained_once(backend: TrackedBackend, server: ScriptedServer) -> None:
    """The sequences against the server's record: its tokens in its order, each sampled token trained once."""
    answers = [request for request in server.requests if request.output_ids]
    turns = {turn.ref: (turn, request) for turn, request in zip(backend.ledger.turns, answers, strict=True)}
    trained = []
    for sequence in backend.ledger.sequences():
        last = turns[sequence.turns[-1]][1]
        assert sequence.tokens == last.prompt_ids + last.output_ids[0]
        open_places = set(range(len(sequence.tokens)))
        masks, logprobs = atropos.masks(sequence), atropos.logprobs(sequence)
        for ref, span in zip(sequence.turns, sequence.spans, strict=True):
            start, stop = span.start, span.end
            request = turns[ref][1]
            assert sequence.tokens[start:stop] == request.output_ids[0]
            if start < stop and masks[start] != MASK:
                assert masks[start:stop] == request.output_ids[0]
                assert logprobs[start:stop] == request.logprobs[0]
                open_places -= set(range(start, stop))
                trained.append(ref)
        assert {masks[place] for place in open_places} <= {MASK}
        assert {logprobs[place] for place in open_places} <= {PROMPT_LOGPROB}
        assert len(sequence.tokens) == len(masks) == len(logprobs)
    wanted = [ref for ref, (turn, request) in turns.items() if turn.discarded is None and request.output_ids[0]]
    assert sorted(trained) == sorted(wanted)
    assert backend.ledger.report().mismatches == 0


class TestTemplateOptions:
    @pytest.mark.parametrize(
        "make", [TrackedBackend, lambda *args, **options: ExactManagedServer(*args, **options).backend]
    )
    async def test_they_reach_the_template(self, make: Any) -> None:
        tokenizer = QWEN3_FAMILY.tokenizer()
        prompts = []
        for options in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
            server = ScriptedServer(["Yes."], tokenizer=tokenizer)
            await make(server, tokenizer, **options).sample([user("Go.")])
            prompts.append(server.requests[0].prompt)
        assert prompts[1] == prompts[0] + "<think>\n\n</think>\n\n"

    @pytest.mark.parametrize(
        "sent", [{"chat_template_kwargs": {}}, {"extra_body": {"chat_template_kwargs": {}}}], ids=str
    )
    async def test_a_call_cannot_have_its_own(self, sent: dict[str, Any]) -> None:
        """The server would not look at them."""
        with pytest.raises(SamplingError, match="where the agent or the managed server is constructed"):
            await on(ScriptedServer(["Yes."])).sample([user("Go.")], **sent)

    async def test_they_reach_the_record(self) -> None:
        agent = AtroposAgent(ScriptedServer(["Yes."]), chat_template_kwargs={"enable_thinking": False})
        result = await agent.run("Go.")
        assert result.sampling["chat_template_kwargs"] == {"enable_thinking": False}


class TestIdsAboveTheTokenizer:
    """A served model may have more ids than its tokenizer: its embedding is padded."""

    class Padded(ScriptedServer):
        def _sample(self, reply: Reply, max_tokens: int | None) -> Any:
            ids, reason = super()._sample(reply, max_tokens)
            return [*ids[:-1], len(self.tokenizer) + 60, ids[-1]], reason

    async def test_the_error_names_the_argument(self) -> None:
        with pytest.raises(TokenFidelityError, match="vocab_size="):
            await on(self.Padded(["Yes."])).sample([user("Go.")])

    async def test_with_it_they_are_tokens_as_others(self) -> None:
        backend = on(self.Padded(["Yes."]), vocab_size=len(TOKENIZER) + 64)
        turn = await backend.sample([user("Go.")])
        assert turn.content == "Yes."
        assert len(TOKENIZER) + 60 in backend.ledger.turns[0].output_ids
