"""``HermesEnv``: groups of rollouts, as Atropos collects, scores and sends them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from atroposlib.api.server import app
from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from support import run_script

from hermes_atropos.environment import HermesEnv, HermesEnvConfig
from hermes_atropos.errors import BackendResponseError, HermesAtroposError, UnknownToolsetError, UntrackedError
from hermes_atropos.exports.atropos import MASK
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import StopReason, read_records

#: An answer that nobody asks for again.
ON_FIRE = BackendResponseError("the GPU is on fire", status=400)

Messages = list[dict[str, str]]


class Greetings(HermesEnv):
    """Asks for a greeting in a file; the score is whether it is there."""

    name = "greetings"

    async def get_next_item(self) -> dict[str, Any]:
        return {"greeting": "hello"}

    def prompt(self, item: dict[str, Any]) -> str:
        return f"Write {item['greeting']} to greeting.txt."

    async def verify(self, item: dict[str, Any], task: Any, result: dict[str, Any]) -> float:
        return float((await task.terminal(f"grep -qx {item['greeting']} greeting.txt")).exit_code == 0)

    async def evaluate(self) -> None:
        pass


def greets(messages: Messages) -> str | Reply:
    """A model that does what it is asked for."""
    if "tool_response" in messages[-1]["content"]:
        return "Done."
    return tool_call("terminal", command="echo hello > greeting.txt")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    chatml_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., Any]:
    """An environment whose model is scripted."""

    def make(model: Any = greets, kind: type[HermesEnv] = Greetings, **config: Any) -> Any:
        class Server(ScriptedServer):
            def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
                super().__init__(model)

        settings = {"group_size": 3, "use_wandb": False, "tokenizer_name": tokenizer_folder} | config
        return type("Env", (kind,), {"server_cls": Server})(HermesEnvConfig(**settings), [APIServerConfig()])

    return make


def requests(env: HermesEnv) -> list[Any]:
    return env.server.servers[0].requests


async def test_a_group_holds_what_the_server_sampled(make: Any) -> None:
    env = make()
    group, backlog = await env.collect_trajectories(await env.get_next_item())
    assert backlog == []
    assert group["scores"] == [1.0, 1.0, 1.0]
    sampled = [
        (request.prompt_ids + request.output_ids[0][:place], token, logprob)
        for request in requests(env)
        for place, (token, logprob) in enumerate(zip(request.output_ids[0], request.logprobs[0], strict=True))
    ]
    trained = [
        (tokens[:place], token, logprobs[place])
        for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True)
        for place, token in enumerate(masks)
        if token != MASK
    ]
    assert sorted(trained) == sorted(sampled)


async def test_the_trainer_gets_the_group_from_the_atropos_api(make: Any) -> None:
    wrong = itertools.cycle([True, False])
    env = make(lambda messages: "No." if len(messages) < 3 and next(wrong) else greets(messages), group_size=4)
    async with atropos_api() as api:
        env.config.rollout_server_url, env.config.wandb_name = str(api.base_url), env.name
        await api.post("/register", json=TRAINER)
        await api.get("/batch")  # the trainer is ready
        await env.register_env()
        await env.get_server_info()
        env.running_items["one"] = {"item": await env.get_next_item()}
        sent = await env.handle_env("one")
        [received] = (await api.get("/batch")).json()["batch"]
    assert sorted(received["scores"]) == [0.0, 0.0, 1.0, 1.0]
    assert {key: received[key] for key in ("tokens", "masks", "inference_logprobs")} == {
        key: sent[key] for key in ("tokens", "masks", "inference_logprobs")
    }


TRAINER = {
    "wandb_group": "group",
    "wandb_project": "project",
    "batch_size": 4,
    "max_token_len": 100_000,
    "checkpoint_dir": "",
    "save_checkpoint_interval": 0,
    "starting_step": 0,
    "num_steps": 1,
}


@contextlib.asynccontextmanager
async def atropos_api() -> AsyncIterator[httpx.AsyncClient]:
    """Atropos' own API server on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield client  # a request waits in the listener's queue until the server accepts
            await client.get("/reset_data")
    finally:
        server.should_exit = True
        await serving


async def test_the_configuration_reaches_the_model_calls(make: Any) -> None:
    env = make(temperature=0.3, max_token_length=77)
    await env.collect_trajectories(await env.get_next_item())
    assert {(request.sampling["temperature"], request.sampling["max_tokens"]) for request in requests(env)} == {
        (0.3, 77)
    }


async def test_each_rollout_gets_a_copy_of_the_items_workspace(make: Any, tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("given")

    class Env(Greetings):
        async def verify(self, item: Any, task: Any, result: Any) -> float:
            assert task.workspace != tmp_path
            assert await task.read_file("given.txt") == "given"
            return await super().verify(item, task, result)

    env = make(kind=Env)
    group, _ = await env.collect_trajectories({"greeting": "hello", "workspace": str(tmp_path)})
    assert group["scores"] == [1.0, 1.0, 1.0]
    assert os.listdir(tmp_path) == ["given.txt"], "the rollouts acted in copies"


def second_fails(failure: Callable[[], str | Reply]) -> Callable[[Messages], str | Reply]:
    """A model of which the second rollout to ask gets ``failure()``."""
    rollouts = itertools.count(1)

    def model(messages: Messages) -> str | Reply:
        started = "tool_response" not in messages[-1]["content"]
        return failure() if started and next(rollouts) == 2 else greets(messages)

    return model


async def test_a_rollout_that_fails_is_left_out_of_its_group(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    env = make(second_fails(lambda: Reply(error=ON_FIRE)))
    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await env.collect_trajectories(await env.get_next_item())
    assert group["scores"] == [1.0, 1.0]
    assert group["group_overrides"]["group_size"] == 2
    assert "the GPU is on fire" in caplog.text


async def test_a_verifier_that_raises_costs_one_rollout(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    verified = itertools.count(1)

    class Env(Greetings):
        async def verify(self, item: Any, task: Any, result: Any) -> float:
            if next(verified) == 2:
                raise ZeroDivisionError("no tests ran")
            return 0.5

    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await make(kind=Env).collect_trajectories({"greeting": "hello"})
    assert group["scores"] == [0.5, 0.5]
    assert "no tests ran" in caplog.text


async def test_a_rollout_that_hangs_costs_itself_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    await make().collect_trajectories(
        {"greeting": "hello"}
    )  # a process's first rollouts may take longer than the limit
    env = make(second_fails(lambda: Reply(hang=True)), rollout_timeout=5)
    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await env.collect_trajectories(await env.get_next_item())
    assert "rollout_timeout=5 seconds" in caplog.text
    assert group["scores"] == [1.0, 1.0]
    assert [request.cancelled for request in requests(env)].count(True) == 1


@pytest.mark.parametrize(
    ("model", "ended"),
    [
        (lambda messages: "<tool_call>{</tool_call>", StopReason.TOOL_CALL_RETRIES),
        (lambda messages: tool_call("terminal", command="true"), StopReason.ITERATION_LIMIT),
    ],
)
async def test_what_the_model_did_wrong_is_scored(make: Any, model: Any, ended: StopReason) -> None:
    endings = []

    class Env(Greetings):
        async def verify(self, item: Any, task: Any, result: Any) -> float:
            endings.append(result["stop_reason"])
            return await super().verify(item, task, result)

    group, _ = await make(model, kind=Env, max_iterations=2).collect_trajectories({"greeting": "hello"})
    assert set(group["scores"]) == {0.0}
    assert endings == [ended] * 3


async def test_where_every_rollout_fails_the_group_fails_with_the_cause(make: Any) -> None:
    env = make(lambda messages: Reply(error=ON_FIRE))
    with pytest.raises(HermesAtroposError, match="the GPU is on fire"):
        await env.collect_trajectories(await env.get_next_item())


async def test_a_cancelled_group_leaves_nothing_running(make: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pids")
    env = make(lambda messages: tool_call("terminal", command=f"echo $$ > {tmp_path}/pids; exec sleep 600"))
    group = asyncio.create_task(env.collect_trajectories(await env.get_next_item()))
    pids = await asyncio.to_thread(read_lines, tmp_path / "pids", 3)
    group.cancel()
    with pytest.raises(asyncio.CancelledError):
        await group
    assert [pid for pid in pids if runs(int(pid))] == []


def read_lines(path: Path, count: int) -> list[str]:
    with open(os.open(path, os.O_RDWR)) as fifo:
        return [fifo.readline() for _ in range(count)]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_records_hold_every_rollout_with_its_score(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    env = make(second_fails(lambda: Reply(error=ON_FIRE)), records_path=str(path))
    await env.collect_trajectories(await env.get_next_item())
    records = list(read_records(path))
    assert sorted(record.stop_reason for record in records) == ["completed", "completed", "server_error"]
    assert [record.metadata.get("score") for record in records].count(1.0) == 2


async def test_a_server_without_token_ids_evaluates_and_does_not_train(make: Any) -> None:
    class Untracked(ScriptedServer):
        """Chat without token ids, like any OpenAI-type server."""

        _tokens_and_logprobs_completion_wrapper = OpenAIServer._tokens_and_logprobs_completion_wrapper

        def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
            super().__init__(lambda messages: "I would rather not.")

    env = make()
    env = type("Env", (Greetings,), {"server_cls": Untracked})(env.config, [APIServerConfig()])
    trajectory, score = await env.rollout(await env.get_next_item())
    assert (trajectory.tracked, score) == (False, 0.0)
    with pytest.raises(UntrackedError, match="token ids"):
        await env.collect_trajectories(await env.get_next_item())


def test_a_bad_configuration_is_found_at_construction(make: Any) -> None:
    with pytest.raises(UnknownToolsetError, match="terminal"):
        make(enabled_toolsets=["termnal"])


def test_constructing_one_puts_the_process_under_the_training_profile(tmp_path: Path) -> None:
    """Importing does not; the keys that are asked for stay for the verifier's judge, others go."""
    script = """
import os
from hermes_atropos.environment import HermesEnv, HermesEnvConfig
from hermes_atropos.hermes.profile import active_profile
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer
from atroposlib.envs.base import APIServerConfig

class Server(ScriptedServer):
    def __init__(self, config, reasoning_config=None): super().__init__(["Done."])

class Env(HermesEnv):
    server_cls = Server
    async def get_next_item(self): ...
    async def evaluate(self): ...
    def prompt(self, item): return "Go."
    async def verify(self, item, task, result): return float(os.environ["OPENAI_API_KEY"] == "sk-judge-0123456789")

assert active_profile() is None
chatml_tokenizer().save_pretrained("tokenizer")
config = HermesEnvConfig(tokenizer_name="tokenizer", use_wandb=False, keep_env=["OPENAI_API_KEY"])
env = Env(config, [APIServerConfig()])
import asyncio, hermes_constants
assert hermes_constants.get_hermes_home() == active_profile() is not None
print(asyncio.run(env.rollout({}))[1], "DEEPSEEK_API_KEY" in os.environ)
"""
    keys = {"OPENAI_API_KEY": "sk-judge-0123456789", "DEEPSEEK_API_KEY": "sk-0123456789abcdef"}
    assert run_script(script, tmp_path, **keys).stdout.split() == ["1.0", "False"]
