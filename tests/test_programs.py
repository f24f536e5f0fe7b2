"""Hermes' own programs with our class in place of Hermes': what they sample is recorded, also when they are killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import run_agent
from aiohttp import web
from atroposlib.envs.server_handling.server_manager import ServerManager
from support import agent_on, check_tokens, run_script, script_environ, terminal, until
from wire import MODEL, VLLMWire, WireRequest, hanging

import hermes_atropos
from hermes_atropos.errors import ConfigurationError, NoServerError, UnsupportedVersionError
from hermes_atropos.exports.atropos import MASK
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.agent import AtroposAIAgent
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import AgentResult, StopReason, read_record, read_records

STOCK = run_agent.AIAgent


def worker(messages: Sequence[dict[str, str]]) -> str:
    """A model that runs a command for each task, and then says that it is done."""
    return "Done." if "<tool_response>" in messages[-1]["content"] else terminal("echo hello")


# ── The block ────────────────────────────────────────────────────────────────────────────────────────────────────────


def held_by_hermes() -> Any:
    """What Hermes' own code constructs: as `cli.py`, the gateway and others look it up."""
    namespace: dict[str, Any] = {}
    exec("from run_agent import AIAgent", namespace)
    return namespace["AIAgent"]


def test_our_class_stands_where_hermes_modules_hold_theirs_and_only_in_the_block() -> None:
    import batch_runner

    assert batch_runner.AIAgent is held_by_hermes() is STOCK
    with hermes_atropos.exchanged(server=ScriptedServer(["Hi."])) as kind:
        assert batch_runner.AIAgent is held_by_hermes() is kind
        assert issubclass(kind, AtroposAIAgent)
        agent = held_by_hermes()(model="anthropic/claude-opus-4.6", provider="openrouter", api_key="k", quiet_mode=True)
        assert agent.chat("Hello?") == "Hi."
        assert agent.model == "scripted"
    assert batch_runner.AIAgent is held_by_hermes() is STOCK


def test_what_was_imported_in_the_block_and_what_fails_there_is_put_back_too() -> None:
    module = type(sys)("imported_in_the_block")
    sys.modules[module.__name__] = module
    try:
        with pytest.raises(ImportError), hermes_atropos.exchanged(server=ScriptedServer([])) as kind:  # noqa: PT012
            exec("from run_agent import AIAgent as Agent", vars(module))
            assert module.Agent is kind
            exec("from run_agent import NoSuchAgent", vars(module))
        assert module.Agent is held_by_hermes() is STOCK
    finally:
        del sys.modules[module.__name__]


def test_blocks_may_stand_in_one_another() -> None:
    with hermes_atropos.exchanged(server=ScriptedServer([])) as outer:
        with hermes_atropos.exchanged(server=ScriptedServer(["From the inner one."])) as inner:
            assert held_by_hermes() is inner
            assert inner(quiet_mode=True).chat("Hello?") == "From the inner one."
        assert held_by_hermes() is outer
    assert held_by_hermes() is STOCK


def test_programs_need_no_provider() -> None:
    from hermes_cli.runtime_provider import resolve_runtime_provider

    def found() -> Any:
        namespace: dict[str, Any] = {}
        exec("from hermes_cli.runtime_provider import resolve_runtime_provider as resolve", namespace)
        return namespace["resolve"]

    with hermes_atropos.exchanged(server=ScriptedServer([])):
        runtime = found()(requested=None, target_model="some/model")
        assert (runtime["provider"], runtime["model"]) == ("custom", "scripted")
        assert runtime["base_url"].startswith("inproc://")
    assert found() is resolve_runtime_provider


def switch_to(name: str, **options: Any) -> Any:
    """What `/model` asks, in every program; the server has no address to write into the user's configuration."""
    namespace: dict[str, Any] = {}
    exec("from hermes_cli.model_switch import switch_model", namespace)
    return namespace["switch_model"](name, "custom", "scripted", **options)


def test_another_model_of_the_server_is_taken() -> None:
    """By the agent at work and by those to come; what each session was sampled from stays together."""
    large, small = (ScriptedServer([f"From {name}."] * 9, model_name=name) for name in ("large", "small"))
    manager = ServerManager.__new__(ServerManager)
    manager.servers = [large, small]
    options: dict[str, Any] = {"quiet_mode": True, "enabled_toolsets": [], "session_id": "one"}
    with hermes_atropos.exchanged(server=manager, model="large", context_length=50_000) as kind:
        agent = kind(**options, model="what the configuration says")
        assert agent.chat("Hello") == "From large."
        result = switch_to("small")
        assert (result.success, result.new_model, result.error_message) == (True, "small", "")
        agent.switch_model(result.new_model, result.target_provider, result.api_key, result.base_url)
        assert agent.chat("Hello") == "From small."
        check_tokens(agent.last_result["trajectory"], small.requests)
        assert kind(**options, model="small").chat("Hello") == "From small."
        assert kind(**options, model="large").chat("Hello") == "From large."


def test_a_model_that_the_server_does_not_have_is_refused() -> None:
    with hermes_atropos.exchanged(server=ScriptedServer([]), context_length=50_000) as kind:
        assert switch_to("scripted").success
        assert "has no model 'gpt-5', but scripted" in switch_to("gpt-5", explicit_provider="openai").error_message
        assert "leave --global out" in switch_to("scripted", is_global=True).error_message
        with pytest.raises(ConfigurationError, match="no model 'gpt-5'"):
            kind(quiet_mode=True).switch_model("gpt-5", "openai")


def test_another_model_at_the_address_is_taken() -> None:
    with VLLMWire(reply="From it.", adapters=("adapter",), context_length=30_000) as wired:
        search = {"base_url": wired.url, "model": MODEL, "tokenizer": chatml_tokenizer()}
        with hermes_atropos.exchanged(**search) as kind:
            assert switch_to("adapter").success
            assert "does not serve 'gpt-5'" in switch_to("gpt-5").error_message
            assert kind(quiet_mode=True, enabled_toolsets=[], model="adapter").chat("Hello") == "From it."
            assert wired.requests[-1].body["model"] == "adapter"


def test_the_length_that_programs_show_is_the_server_s() -> None:
    def shown(model: str) -> Any:
        namespace: dict[str, Any] = {}
        exec("from hermes_cli.model_switch import resolve_display_context_length", namespace)
        return namespace["resolve_display_context_length"](model, "custom")

    with hermes_atropos.exchanged(server=ScriptedServer([]), context_length=50_000):
        assert shown("scripted") == 50_000


def test_without_a_server_each_agent_looks_where_its_program_says() -> None:
    with hermes_atropos.exchanged() as kind, pytest.raises(NoServerError, match=r"http://127\.0\.0\.1:9/v1"):
        kind(base_url="http://127.0.0.1:9/v1", api_key="k", model="m", quiet_mode=True)


def test_an_object_that_hermes_no_longer_has_is_named() -> None:
    block = seams.in_place_of("run_agent", "NoSuchAgent", None)
    with pytest.raises(UnsupportedVersionError, match=r"run_agent\.NoSuchAgent is missing"):
        block.__enter__()


def test_its_own_arguments_win_over_those_of_the_programs() -> None:
    server = ScriptedServer(["Hi."])
    with hermes_atropos.exchanged(server=server, temperature=0.25, max_tokens=64) as kind:
        kind(quiet_mode=True, max_tokens=2000).chat("Hello?")
    assert server.requests[0].sampling["temperature"] == 0.25
    assert server.requests[0].sampling["max_tokens"] == 64


def test_subagents_are_of_the_conversation(tmp_path: Path) -> None:
    def delegating(messages: Sequence[dict[str, str]]) -> str:
        if "<tool_response>" in messages[-1]["content"]:
            return "Done."
        told = any("windmills" in message["content"] for message in messages)
        return "Three." if told else tool_call("delegate_task", goal="count the windmills")

    server, records = ScriptedServer(delegating), tmp_path / "records.jsonl"
    with hermes_atropos.exchanged(server=server, records=records) as kind:
        assert kind(quiet_mode=True, enabled_toolsets=["delegation"]).chat("Delegate.") == "Done."
    result = read_record(records)
    assert len(server.requests) == 3
    check_tokens(result, server.requests)


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_messages_of_a_session_are_one_conversation_of_unbroken_tokens(tmp_path: Path) -> None:
    server, records = ScriptedServer(worker), tmp_path / "records.jsonl"
    with hermes_atropos.exchanged(server=server, records=records) as kind:
        agent = kind(quiet_mode=True, enabled_toolsets=["terminal"])
        history = None
        for number in range(3):
            history = agent.run_conversation(f"Task {number}.", conversation_history=history)["messages"]
            result = read_record(records)
            assert result.stop_reason is StopReason.COMPLETED
            assert len(result.steps) == 2 * (number + 1)
            check_tokens(result, server.requests)
            assert len(result.sequences) == 1


def test_another_agent_of_the_same_session_goes_on_with_its_tokens(tmp_path: Path) -> None:
    """The gateway makes an agent for each message, and reads the history from its database."""
    server, records = ScriptedServer(worker), tmp_path / "records.jsonl"
    with hermes_atropos.exchanged(server=server, records=records) as kind:
        history: list[dict[str, Any]] = []
        for number in range(2):
            agent = kind(quiet_mode=True, enabled_toolsets=["terminal"], session_id="the-session")
            result = agent.run_conversation(f"Task {number}.", conversation_history=history)
            history = [{k: v for k, v in m.items() if not k.startswith("atropos_")} for m in result["messages"]]
        other = kind(quiet_mode=True, session_id="another-session")
        other.run_conversation("Task.")
    one, two = read_records(records)
    assert (len(one.steps), len(one.sequences), len(two.steps)) == (4, 1, 2)


def test_conversations_of_one_agent_at_once_are_recorded_apart(tmp_path: Path) -> None:
    server, records = ScriptedServer(worker, latency=0.05), tmp_path / "records.jsonl"
    with hermes_atropos.exchanged(server=server, records=records) as kind:
        agent = kind(quiet_mode=True, enabled_toolsets=["terminal"])
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(agent.chat, "abcd")) == ["Done."] * 4
    results = list(read_records(records))
    assert [len(result.steps) for result in results] == [2] * 4
    assert sum(result.fidelity.tokens_sampled for result in results if result.fidelity) == sum(
        len(request.output_ids[0]) for request in server.requests
    )


def test_an_agent_outside_of_the_block_is_not_recorded(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    with hermes_atropos.exchanged(server=ScriptedServer([]), records=records):
        agent_on(ScriptedServer(["Hi."])).chat("Hello?")
    assert not records.exists()


def test_what_a_program_asks_beside_a_conversation_is_a_record_of_its_own(tmp_path: Path) -> None:
    """Without the training profile, whose configuration sends such calls nowhere."""
    script = """
import asyncio, hermes_atropos
from hermes_atropos.testing import ScriptedServer
from support import check_tokens
from agent import auxiliary_client
from agent.title_generator import generate_title
server = ScriptedServer(["A talk about tea", "Two."])
with hermes_atropos.exchanged(server=server, records="records.jsonl"):
    print(generate_title("Tea?", "Yes, please."))
    asked = auxiliary_client.async_call_llm("goal_judge", messages=[{"role": "user", "content": "One and one?"}])
    print(asyncio.run(asked).choices[0].message.content)
title, other = hermes_atropos.read_records("records.jsonl")
check_tokens(title, server.requests[:1])
check_tokens(other, server.requests[1:])
print(title.metadata, title.final_response)
"""
    assert run_script(script, tmp_path, HERMES_HOME=str(tmp_path / "home")).stdout.splitlines() == [
        "A talk about tea",
        "Two.",
        "{'auxiliary': 'title_generation'} A talk about tea",
    ]


# ── Programs, in processes of their own ──────────────────────────────────────────────────────────────────────────────


class Model(VLLMWire):
    """vLLM with a model that works, and that says nothing more after ``hangs_at`` answers."""

    def __init__(self, hangs_at: int | None = None) -> None:
        super().__init__(context_length=200_000)
        self.hangs_at = hangs_at

    async def sample(self, request: web.Request, prompt_ids: list[int], *sampling: Any) -> None:
        prompt = str(self.tokenizer.decode(prompt_ids))
        turns = [block.partition("\n")[2].partition("<|im_end|>")[0] for block in prompt.split("<|im_start|>")[1:-1]]
        self.reply = worker([{"content": turn} for turn in turns] or [{"content": prompt}])
        await super().sample(request, prompt_ids, *sampling)
        if self.hangs_at is not None and len(self.answered()) > self.hangs_at:
            self.faults = [hanging]

    def answered(self) -> list[WireRequest]:
        """The requests of conversations. Probes ask for few tokens; a title for some 500, and nobody waits for it."""
        return [request for request in self.to("/v1/completions") if request.body["max_tokens"] > 1000]


@contextlib.contextmanager
def running(
    model: Model, folder: Path, *command: str, stdout: int | None = None, **environ: str
) -> Iterator[subprocess.Popen[str]]:
    """``hermes-atropos run`` with records in ``folder``; whatever is left of it is killed."""
    chatml_tokenizer().save_pretrained(folder / "tokenizer")
    script = "import sys; from hermes_atropos.cli import main; sys.exit(main())"
    options = ["--server", f"{model.url}/v1", "--tokenizer", "tokenizer", "--records", "records.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "run", *options, "--", *command],
        cwd=folder,
        env=script_environ(folder, HERMES_HOME=str(folder / "home"), HERMES_ACCEPT_HOOKS="1", **environ),
        stdin=subprocess.PIPE,
        stdout=stdout or (folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def check_records(folder: Path, requests: Sequence[WireRequest]) -> list[AgentResult]:
    """The conversations recorded: every answer is trained once in them, after the very tokens that were sent."""
    records = read_records(folder / "records.jsonl")
    results = [result for result in records if "auxiliary" not in result.metadata]
    for request in requests:
        [(ids, logprobs, _)] = request.sampled
        start, stream = len(request.body["prompt"]), [*request.body["prompt"], *ids]
        holders = [
            sequence
            for result in results
            for sequence in result.sequences
            if sequence.tokens[: len(stream)] == stream and sequence.masked_tokens[start : len(stream)] == ids
        ]
        assert len(holders) == 1
        assert holders[0].logprobs[start : len(stream)] == logprobs
    trainable = sum(
        mask != MASK for result in results for sequence in result.sequences for mask in sequence.masked_tokens
    )
    assert trainable == sum(len(request.sampled[0][0]) for request in requests)
    return results


def prompts(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two")))


BATCH = [
    *("batch_runner.py", "--dataset_file=prompts.jsonl", "--batch_size=1", "--run_name=mine"),
    *("--distribution=terminal_only", "--num_workers=1"),
]

PROGRAMS: dict[str, list[str]] = {
    "-z": ["hermes", "-z", "Work."],
    "chat -q": ["hermes", "chat", "-q", "Work."],
    "cli.py -q": ["cli.py", "-q", "Work."],
    "batch_runner.py": BATCH,
}


@pytest.mark.parametrize("program", ["cli.py -q", "batch_runner.py"])
def test_a_program_runs_on_the_server_with_no_provider_and_is_recorded(program: str, tmp_path: Path) -> None:
    prompts(tmp_path)
    with Model() as model:
        with running(model, tmp_path, *PROGRAMS[program]) as process:
            assert process.wait(100) == 0, (tmp_path / "err").read_text()[-2000:]
        results = check_records(tmp_path, model.answered())
    assert [result.stop_reason for result in results] == [StopReason.COMPLETED] * (
        2 if program == "batch_runner.py" else 1
    )
    if program != "batch_runner.py":
        assert "Done." in (tmp_path / "out").read_text()


def killed_in_mid_conversation(model: Model, folder: Path, process: subprocess.Popen[str], finished: int) -> None:
    """Kill the program once the model is asked for more than it answers, and compare."""
    while len(model.answered()) <= finished:
        model.arrivals.get(timeout=100)
    until(lambda: bool(model.answered()[finished].sampled))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    results = check_records(folder, model.answered()[:finished])
    assert results[-1].stop_reason is StopReason.INTERRUPTED
    assert results[-1].error == "the program ended while this rollout was under way"


@pytest.mark.parametrize(("program", "finished"), [("-z", 1), ("chat -q", 1), ("batch_runner.py", 3)])
def test_what_was_sampled_before_a_kill_is_in_the_records(program: str, finished: int, tmp_path: Path) -> None:
    prompts(tmp_path)
    with Model(hangs_at=finished) as model, running(model, tmp_path, *PROGRAMS[program]) as process:
        killed_in_mid_conversation(model, tmp_path, process, finished)


def test_what_an_editor_was_answered_before_a_kill_is_in_the_records(tmp_path: Path) -> None:
    """The ACP adapter: JSON-RPC over standard input and output, a line each; nobody is asked for permission."""

    def ask(number: int, method: str, **parameters: Any) -> None:
        call = {"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}
        print(json.dumps(call), file=process.stdin, flush=True)

    def answer(number: int) -> Any:
        assert process.stdout is not None
        return next(said["result"] for said in map(json.loads, process.stdout) if said.get("id") == number)

    pipe = subprocess.PIPE
    with Model(hangs_at=3) as model, running(model, tmp_path, "hermes", "acp", stdout=pipe) as process:
        ask(1, "initialize", protocolVersion=1, clientCapabilities={})
        ask(2, "session/new", cwd=str(tmp_path), mcpServers=[])
        session = answer(2)["sessionId"]
        ask(3, "session/prompt", sessionId=session, prompt=[{"type": "text", "text": "Work."}])
        assert answer(3)["stopReason"] == "end_turn"
        ask(4, "session/prompt", sessionId=session, prompt=[{"type": "text", "text": "Work on."}])
        killed_in_mid_conversation(model, tmp_path, process, finished=3)


def hung_up_on(request: Callable[[], object]) -> None:
    with pytest.raises(ConnectionError):
        request()


def test_what_the_api_server_sampled_before_a_kill_is_in_the_records(tmp_path: Path) -> None:
    """The gateway's OpenAI-compatible endpoint: an agent for each request, on a thread of its own."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    key = "sk-the-gateways-own-0123456789"
    environ = {"API_SERVER_ENABLED": "true", "API_SERVER_KEY": key, "API_SERVER_PORT": str(port)}

    def ask(text: str) -> Any:
        body = json.dumps({"model": "hermes-agent", "messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers)
        return json.load(urllib.request.urlopen(request, timeout=100))

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read())
        return False

    with Model(hangs_at=3) as model, running(model, tmp_path, "hermes", "gateway", "run", **environ) as process:
        until(is_up)
        assert ask("Work.")["choices"][0]["message"]["content"] == "Done."
        client = threading.Thread(target=hung_up_on, args=[lambda: ask("Work on.")])
        client.start()
        killed_in_mid_conversation(model, tmp_path, process, finished=3)
        client.join(30)
