"""Text as it is sampled: what a listener hears, and that the recorded turn is the same with and without one."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from test_toolcalls_formats import WRITERS
from wire import MODEL, OpenAIWire, SGLangWire, VLLMWire, Wire, broken_off

from hermes_atropos.backends.chat import ChatBackend
from hermes_atropos.backends.hearing import Hearing
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.hermes.agent import AtroposAIAgent
from hermes_atropos.listening import Delta, hearing, text_listener
from hermes_atropos.servers import OpenAIEndpoint
from hermes_atropos.testing import chatml_tokenizer, tool_call
from hermes_atropos.toolcalls import parse_text

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("ls", "terminal")
]


def sglang_incremental(**options: Any) -> SGLangWire:
    wire = SGLangWire(**options)
    wire.incremental = True
    return wire


#: The servers that stream tokens, as their engines do.
TOKEN_WIRES: dict[str, Callable[..., Wire]] = {
    "vllm": VLLMWire,
    "vllm before 0.10.2": lambda **options: VLLMWire(release="old", **options),
    "vllm generate": lambda **options: VLLMWire(generate="alone", **options),
    "sglang": SGLangWire,
    "sglang incremental": sglang_incremental,
}


def backend_on(wire: Wire, **options: Any) -> Any:
    return resolve(base_url=f"{wire.url}/v1", model=MODEL, tokenizer=chatml_tokenizer(), **options)


def heard(deltas: list[Delta], kind: str) -> str:
    return "".join(delta.text for delta in deltas if delta.kind == kind)


def fresh_turn(backend: Any, listener: Any, **sampling: Any) -> tuple[Any, Any]:
    """One answer in a ledger of its own; the turn and what the ledger has of it."""
    backend = backend.fresh()

    async def ask() -> Any:
        with hearing(text_listener, listener):
            return await backend.sample([{"role": "user", "content": "Go on."}], TOOLS, **sampling)

    turn = asyncio.run(ask())
    recorded = backend.ledger.turn(turn.ref)
    return turn, (recorded.output_ids, list(recorded.logprobs), recorded.finish_reason, recorded.metadata)


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", TOKEN_WIRES)
def test_an_answer_is_heard_piece_by_piece_and_recorded_as_without_a_listener(kind: str) -> None:
    with TOKEN_WIRES[kind](reply="<think>Hm, é🙂.</think>I look around. " + tool_call("ls", path="/tmp")) as wire:
        backend = backend_on(wire)
        deltas: list[Delta] = []
        turn, recorded = fresh_turn(backend, deltas.append)
        assert [request.body.get("stream") for request in wire.requests if request.sampled][-1] is True
        whole, same = fresh_turn(backend, None)
        assert "stream" not in wire.requests[-1].body
    assert recorded == same
    assert (turn.content, turn.reasoning, turn.raw) == (whole.content, whole.reasoning, whole.raw)
    assert heard(deltas, "reasoning") == "Hm, é🙂."
    assert heard(deltas, "content") == "I look around."
    assert [delta for delta in deltas if delta.kind == "call"] == [Delta("call", "ls")]
    assert len(deltas) >= 3


def random_reply(random: random.Random) -> str:
    """An answer of a model that thinks, talks and calls, well or badly."""
    words = ["look", "a < b", "<b>", "x[0]", "{", "é🙂", "\n", "`<tool_call>`", "done.", "[link](url)", "</p>", "<"]
    pieces = [" ".join(random.choices(words, k=random.randrange(8))) for _ in range(3)]
    call = tool_call(random.choice(["ls", "nothing"]), path="<tool_call>" * random.randrange(2), text="a\n[b]")
    broken = call[: random.randrange(5, len(call))] + "</tool_call>"
    thought = f"<think>{pieces[0]}</think>" if random.random() < 0.5 else ""
    calls = [random.choice([call, call, broken]) for _ in range(random.randrange(3))]
    return thought + pieces[1] + "\n".join(calls) + random.choice(["", pieces[2]])


@pytest.mark.parametrize(("kind", "turns"), [("vllm", 100), ("sglang", 100)])
def test_the_same_is_recorded_over_200_random_turns(kind: str, turns: int) -> None:
    chance = random.Random(7)
    with TOKEN_WIRES[kind](context_length=100_000) as wire:
        backend = backend_on(wire)
        for _ in range(turns):
            wire.reply = random_reply(chance)
            limit = chance.choice([None, chance.randrange(1, 60)])
            deltas: list[Delta] = []
            turn, recorded = fresh_turn(backend, deltas.append, max_tokens=limit)
            _, same = fresh_turn(backend, None, max_tokens=limit)
            assert recorded == same
            for said, told in (
                (turn.content or "", heard(deltas, "content")),
                (turn.reasoning or "", heard(deltas, "reasoning")),
            ):
                # What was mentioned, not called, shows only at the end, below what was there.
                assert told == said or told.endswith("\n" + said), (wire.reply, told)
            assert "<tool_call>\n{" not in heard(deltas, "content") or "<tool_call>\n{" in (turn.content or "")


@pytest.mark.parametrize(("format", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_character_of_a_call_is_shown_as_content(format: str, write: Any) -> None:
    """Each family's calls, by the character: the smallest pieces that there are."""
    calls = write(
        [("ls", {"path": "/tmp", "depth": 2}), ("terminal", {"command": "if [ a < b ]; then {echo} 'x'; fi"})]
    )
    for before, content in (("", ""), ("I look.\n", "I look."), ("<think>Hm.</think>\n", "")):
        text = before + calls
        said = parse_text(text, format=format, tools=TOOLS)
        if (said.content or "") != content:  # harmony has no such text
            continue
        deltas: list[Delta] = []
        listening = Hearing(deltas.append, TOOLS, functools.partial(parse_text, format=format, tools=TOOLS))
        for end in range(len(text) + 1):
            listening.so_far(text[:end])
        assert len(said.calls) == 2
        assert heard(deltas, "content") == content
        assert [delta.text for delta in deltas if delta.kind == "call"] == ["ls", "terminal"]
        listening.end(said)
        assert heard(deltas, "content") == content


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    with VLLMWire(reply="I look around in this folder.") as wire:
        backend = backend_on(wire)
        wire.faults = [broken_off]
        deltas: list[Delta] = []
        turn, _ = fresh_turn(backend, deltas.append)
        assert turn.content == heard(deltas, "content") == "I look around in this folder."
        assert len([request for request in wire.to("/v1/completions") if request.body.get("stream")]) == 2


def test_a_refusal_within_a_stream_is_typed(caplog: pytest.LogCaptureFixture) -> None:
    from hermes_atropos.errors import ContextLengthError

    with SGLangWire(context_length=None) as wire:
        backend = backend_on(wire)
        wire.context_length = 12
        with pytest.raises(ContextLengthError):
            fresh_turn(backend, print)
        assert len(wire.to("/generate")) <= 3, "and not tried again and again"


# ── Chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

MESSAGES: dict[str, dict[str, Any]] = {
    "text": {"content": "I look around <here>, é🙂."},
    "reasoning": {"content": "Four.", "reasoning_content": "Two and two."},
    "newer reasoning": {"content": "Four.", "reasoning": "Two and two."},
    "thinking in the text": {"content": "<think>Two and two.</think>Four."},
    "native calls": {
        "content": "I look.",
        "tool_calls": [
            {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": '{"path": "/tmp"}'}}
            for name in ("ls", "terminal")
        ],
    },
    "calls of one index, as Ollama sends them": {
        "content": None,
        "tool_calls": [
            {"index": 0, "id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": '{"n": 1}'}}
            for name in ("ls", "terminal")
        ],
    },
    "calls in the text": {"content": "I look. " + tool_call("ls", path="/tmp")},
}


def endpoint(url: str) -> Any:
    return OpenAIEndpoint(APIServerConfig(base_url=f"{url}/v1", model_name=MODEL, api_key="x", health_check=False))


def atroposlibs(url: str) -> Any:
    return OpenAIServer(APIServerConfig(base_url=f"{url}/v1", model_name=MODEL, api_key="x", health_check=False))


@pytest.mark.parametrize("make", [endpoint, atroposlibs])
@pytest.mark.parametrize("kind", MESSAGES)
def test_a_chat_answer_is_heard_and_is_the_same_as_without_a_listener(kind: str, make: Any) -> None:
    with OpenAIWire(message={"role": "assistant", **MESSAGES[kind]}) as wire:

        async def ask(listener: Any) -> Any:
            with hearing(text_listener, listener):
                return await ChatBackend(make(wire.url)).sample([{"role": "user", "content": "Go on."}], TOOLS)

        deltas: list[Delta] = []
        turn, whole = asyncio.run(ask(deltas.append)), asyncio.run(ask(None))
        assert [request.body.get("stream", False) for request in wire.requests] == [True, False]
    for one in (turn, whole):
        one.calls = [call.model_copy(update={"id": call.sampled_id or ""}) for call in one.calls]
    assert turn == whole
    assert heard(deltas, "content") == (turn.content or "")
    assert heard(deltas, "reasoning") == (turn.reasoning or "")
    assert [delta.text for delta in deltas if delta.kind == "call"] == [call.name for call in turn.calls]


def test_a_chat_stream_that_breaks_off_is_asked_for_again() -> None:
    with OpenAIWire(reply="I look around in this folder.") as wire:
        wire.faults = [broken_off]
        backend, deltas = ChatBackend(endpoint(wire.url)), list[Delta]()

        async def ask() -> Any:
            with hearing(text_listener, deltas.append):
                return await backend.sample([{"role": "user", "content": "Go on."}])

        assert asyncio.run(ask()).content == heard(deltas, "content") == "I look around in this folder."
        assert len(wire.requests) == 2


# ── Hermes' agent ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def vllm() -> Iterator[VLLMWire]:
    with VLLMWire(context_length=200_000) as wire:
        yield wire


def agent_of(wire: Wire, **options: Any) -> AtroposAIAgent:
    return AtroposAIAgent(
        base_url=f"{wire.url}/v1",
        model=MODEL,
        tokenizer=chatml_tokenizer(),
        enabled_toolsets=[],
        quiet_mode=True,
        **options,
    )


def test_the_first_delta_comes_with_the_first_chunk(vllm: VLLMWire) -> None:
    """The server goes on only once the first word has been heard."""
    vllm.reply = "Hello there, this is a longer answer."
    first = threading.Event()

    async def flow() -> None:
        await asyncio.to_thread(first.wait, 30)

    vllm.flow = flow
    deltas: list[str] = []

    def hear(text: str | None) -> None:
        if text:
            deltas.append(text)
            first.set()

    agent = agent_of(vllm, stream_delta_callback=hear)
    assert agent.chat("Hello?") == "".join(deltas) == vllm.reply
    assert len(deltas) > 1


def test_rollouts_do_not_stream(vllm: VLLMWire) -> None:
    agent_of(vllm).chat("Hello?")
    assert not any("stream" in request.body for request in vllm.to("/v1/completions"))


@pytest.mark.parametrize("kind", ["raises", "is slow"])
def test_a_callback_that_raises_or_is_slow_changes_nothing(kind: str, vllm: VLLMWire) -> None:
    vllm.reply = "One two three four five six."

    def callback(text: str | None) -> None:
        if kind == "raises":
            raise ZeroDivisionError
        time.sleep(0.02)

    plain = agent_of(vllm).run_conversation("Count.")["trajectory"]
    agent = agent_of(vllm, stream_delta_callback=callback, reasoning_callback=callback, tool_gen_callback=callback)
    result = agent.run_conversation("Count.", stream_callback=callback)
    assert result["final_response"] == vllm.reply
    [mine], [its] = result["trajectory"].sequences, plain.sequences
    assert mine.masked_tokens[-8:] == its.masked_tokens[-8:]
    assert mine.logprobs[-3:] == its.logprobs[-3:] or len(mine.tokens) != len(its.tokens)


def test_an_interrupt_ends_the_stream_and_the_request(vllm: VLLMWire) -> None:
    vllm.reply = "word " * 50
    stuck = threading.Event()

    async def flow() -> None:
        await asyncio.Event().wait()

    vllm.flow = flow
    agent = agent_of(vllm, stream_delta_callback=lambda text: stuck.set())
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(agent.run_conversation("Go.")))
    thread.start()
    assert stuck.wait(30)
    agent.interrupt()
    thread.join(30)
    assert results[0]["interrupted"]
    [request] = [request for request in vllm.to("/v1/completions") if request.body.get("stream")]
    assert request.hung_up.wait(30)
