"""``HermesEnv``: groups of rollouts, as Atropos collects, scores and sends them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from support import run_script

from hermes_atropos.cli import main
from hermes_atropos.environment import HermesEnv, HermesEnvConfig, Reward
from hermes_atropos.environment.outbox import Event, Outbox
from hermes_atropos.environment.serving import Serving
from hermes_atropos.errors import (
    BackendResponseError,
    ConfigurationError,
    RolloutFailed,
    UnknownToolsetError,
    UntrackedError,
    VerifierError,
)
from hermes_atropos.exports.atropos import MASK
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import StopReason, read_records

#: An answer that nobody asks for again.
ON_FIRE = BackendResponseError("the GPU is on fire", status=400)

Messages = list[dict[str, str]]


class Greetings(HermesEnv):
    """Asks for a greeting in a file; the score is whether it is there."""

    name = "greetings"

    def items(self) -> list[dict[str, Any]]:
        return [{"greeting": "hello"}]

    def prompt(self, item: dict[str, Any]) -> str:
        return f"Write {item['greeting']} to greeting.txt."

    async def verify(self, item: dict[str, Any], task: Any, result: dict[str, Any]) -> float:
        return float((await task.terminal(f"grep -qx {item['greeting']} greeting.txt")).exit_code == 0)


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

        settings = {
            "group_size": 3,
            "use_wandb": False,
            "tokenizer_name": tokenizer_folder,
            "sandbox": "folder",
        } | config
        return type("Env", (kind,), {"server_cls": Server})(HermesEnvConfig(**settings), [APIServerConfig()])

    return make


def requests(env: HermesEnv) -> list[Any]:
    return env.server.servers[0].requests


async def test_a_group_holds_what_the_server_sampled(make: Any) -> None:
    env = make()
    group, backlog = await env.collect_trajectories(await env.get_next_item())
    assert backlog == []
    assert group["scores"] == [1.0, 1.0, 1.0]
    assert trained_once(env, [group])


def as_list(groups: Any) -> list[Any]:
    return groups if isinstance(groups, list) else [groups]


def trained_once(env: Any, groups: list[Any]) -> bool:
    """Whether every token that counts was sampled after these tokens with this logprob, and is trained once.

    Rollouts that failed are not in the groups: what the server recorded may be more.
    """
    sampled = Counter(
        (tuple(request.prompt_ids + request.output_ids[0][:place]), token, logprob)
        for request in requests(env)
        if request.output_ids and request.output_ids[0]
        for place, (token, logprob) in enumerate(zip(request.output_ids[0], request.logprobs[0], strict=True))
    )
    trained = Counter(
        (tuple(tokens[:place]), token, logprobs[place])
        for group in groups
        for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True)
        for place, token in enumerate(masks)
        if token != MASK
    )
    return bool(trained) and trained <= sampled


async def test_the_configuration_reaches_the_model_calls(make: Any) -> None:
    env = make(temperature=0.3, max_token_length=77)
    await env.collect_trajectories(await env.get_next_item())
    assert {(request.sampling["temperature"], request.sampling["max_tokens"]) for request in requests(env)} == {
        (0.3, 77)
    }


@pytest.mark.parametrize("given", [False, True])
async def test_skewed_answers_are_trained_where_the_configuration_says_so(make: Any, given: bool) -> None:
    """The record of a rollout says with what it was sampled."""
    env = make(temperature=0.3, train_skewed=given)
    async with env.make_agent().task(sandbox="folder") as task:
        result = await task.run("Hello.")
    assert result["trajectory"].sampling.get("train_skewed", False) is given


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


async def test_a_rollout_that_the_infrastructure_ended_is_run_again(make: Any) -> None:
    env = make(second_fails(lambda: Reply(error=ON_FIRE)))
    group, _ = await env.collect_trajectories(await env.get_next_item())
    assert group["scores"] == [1.0, 1.0, 1.0]
    assert env.counts["rollouts run again"] == 1
    assert env.counts["rollouts"] == 3


async def test_a_rollout_that_still_fails_has_its_cause_and_its_attempts(make: Any) -> None:
    env = make(lambda messages: Reply(error=ON_FIRE), rollout_attempts=2)
    with pytest.raises(RolloutFailed, match="the GPU is on fire") as failed:
        await env.collect_trajectories(await env.get_next_item())
    assert failed.value.attempts == 2
    assert failed.value.__cause__ is not None
    assert failed.value.trajectory.stop_reason is StopReason.SERVER_ERROR
    assert len(requests(env)) == 6


async def test_dropped_a_failed_rollout_is_left_out_and_the_group_keeps_its_size(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The API would hold back a group of two until another of one came."""
    env = make(second_fails(lambda: Reply(error=ON_FIRE)), failed_rollouts="drop")
    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await env.collect_trajectories(await env.get_next_item())
    assert group["scores"] == [1.0, 1.0, 1.0]
    assert "the GPU is on fire" in caplog.text
    assert trained_once(env, [group])


async def test_replaced_an_item_with_a_failed_rollout_gives_way_to_the_next(make: Any) -> None:
    env = make(second_fails(lambda: Reply(error=ON_FIRE)), failed_rollouts="replace", rollout_attempts=1)
    assert await env.collect_trajectories(await env.get_next_item()) == (None, [])
    group, _ = await env.collect_trajectories(await env.get_next_item())
    assert group["scores"] == [1.0, 1.0, 1.0]


class Unsure(Greetings):
    """Its second verification does what ``second`` says."""

    asked = 0
    second: Any = None

    async def verify(self, item: Any, task: Any, result: Any) -> Any:
        self.asked += 1
        return 0.5 if self.asked != 2 else await self.second()


async def raises() -> float:
    raise ZeroDivisionError("no tests ran")


async def hangs() -> float:
    await asyncio.Event().wait()
    return 1.0


async def says_nothing() -> Any:
    return None


async def says_nan() -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (raises, "ZeroDivisionError: no tests ran"),
        (hangs, "verify_timeout=1 seconds"),
        (says_nothing, "TypeError"),
        (says_nan, "finite number"),
    ],
)
async def test_a_verifier_that_fails_costs_one_rollout_which_is_not_run_again(
    make: Any, tmp_path: Path, second: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("Env", (Unsure,), {"second": staticmethod(second)})
    env = make(kind=kind, verify_timeout=1, records_path=str(tmp_path / "records.jsonl"))
    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await env.collect_trajectories({"greeting": "hello"})
    assert group["scores"] == [0.5, 0.5, 0.5]
    assert words in caplog.text
    assert env.counts["verifiers failed"] == 1
    assert env.counts["rollouts"] == 2
    failures = [record.metadata.get("failure", "") for record in read_records(tmp_path / "records.jsonl")]
    assert len(failures) == 3, "the trajectory is kept"
    assert next(failure for failure in failures if failure).startswith("VerifierError: ")


async def test_a_verifiers_error_has_the_item_and_the_trajectory(make: Any) -> None:
    env = make(kind=type("Env", (Unsure,), {"asked": 1, "second": staticmethod(raises)}))
    with pytest.raises(VerifierError) as failed:
        await env.rollout({"greeting": "hello"})
    assert failed.value.item == {"greeting": "hello"}
    assert failed.value.trajectory.final_response == "Done."
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


async def test_a_rollout_that_hangs_costs_itself_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    await make().collect_trajectories(
        {"greeting": "hello"}
    )  # a process's first rollouts may take longer than the limit
    env = make(second_fails(lambda: Reply(hang=True)), rollout_timeout=5, failed_rollouts="drop")
    with caplog.at_level(logging.ERROR, "hermes_atropos.environment"):
        group, _ = await env.collect_trajectories(await env.get_next_item())
    assert "rollout_timeout=5 seconds" in caplog.text
    assert env.counts["rollouts"] == 2
    assert group["scores"] == [1.0, 1.0, 1.0]
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

    groups, _ = await make(model, kind=Env, max_iterations=2).collect_trajectories({"greeting": "hello"})
    assert {score for group in as_list(groups) for score in group["scores"]} == {0.0}
    assert endings == [ended] * 3


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
    assert sorted(record.stop_reason for record in records) == ["completed"] * 3 + ["server_error"]
    assert [record.metadata.get("score") for record in records].count(1.0) == 3
    [failure] = [record.metadata["failure"] for record in records if "failure" in record.metadata]
    assert failure.startswith("RolloutFailed: the rollout ended as server_error")


async def test_a_rollout_that_is_cancelled_while_it_is_recorded_is_recorded(make: Any, tmp_path: Path) -> None:
    path, recording, free = tmp_path / "records.jsonl", asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    class Busy(Greetings):
        async def record(self, trajectory: Any) -> None:
            loop.run_in_executor(None, free.wait)  # others have the loop's threads
            recording.set()
            await super().record(trajectory)

    env = make(kind=Busy, records_path=str(path))
    rollout = asyncio.create_task(env.rollout({"greeting": "hello"}))
    await recording.wait()
    rollout.cancel()
    await asyncio.wait([rollout], timeout=0.1)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert len(list(read_records(path))) == 1


async def test_a_group_that_is_cancelled_while_it_is_written_down_is_sent(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(outbox_path=str(tmp_path / "outbox"), ensure_scores_are_not_same=False, max_token_length=-1)
    env.serving = Serving(env)
    env.running_items["a"] = {"item": {"greeting": "hello"}}
    write = Outbox.ready

    def ready(outbox: Outbox, *given: Any) -> None:
        loop.call_soon_threadsafe(group.cancel)
        time.sleep(0.1)
        write(outbox, *given)

    monkeypatch.setattr(Outbox, "ready", ready)
    loop = asyncio.get_running_loop()
    group = asyncio.create_task(env.handle_env("a"))
    with pytest.raises(asyncio.CancelledError):
        await group
    [entry] = env.serving.outbox.waiting
    assert (entry.state, len(entry.groups)) == (Event.READY, 1)
    env.serving.outbox.close()


async def test_the_page_of_a_run_has_its_groups_with_their_scores(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    env = make(second_fails(lambda: Reply(error=ON_FIRE)), records_path=str(path))
    for greeting in ("hello", "<hello>"):
        await env.collect_trajectories({"greeting": greeting})
    records = list(read_records(path))
    assert main(["view", str(path), "--groups", str(tmp_path / "pages")]) == 0
    assert "index.html: open it in a browser" in capsys.readouterr().out
    page = (tmp_path / "pages" / "index.html").read_text()
    assert page.count("<h2>{&#x27;greeting&#x27;: &#x27;hello&#x27;}</h2>") == 1
    assert page.count("<h2>{&#x27;greeting&#x27;: &#x27;&lt;hello&gt;&#x27;}</h2>") == 1
    assert f"{len(records)} rollouts in 2 groups, mean score 0.5, from 0 to 1" in page
    assert page.count("rollouts, mean score 1, from 1 to 1") == page.count("rollouts, mean score 0, from 0 to 0") == 1
    assert page.count("RolloutFailed: the rollout ended as server_error") == 1
    for number in range(len(records)):
        assert f'<a href="{number}.html">' in page
        assert f"records.jsonl, record {number}" in (tmp_path / "pages" / f"{number}.html").read_text()


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
from hermes_atropos.environment import HermesEnv, HermesEnvConfig, Reward
from hermes_atropos.hermes.profile import active_profile
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer
from atroposlib.envs.base import APIServerConfig

class Server(ScriptedServer):
    def __init__(self, config, reasoning_config=None): super().__init__(["Done."])

class Env(HermesEnv):
    server_cls = Server
    def prompt(self, item): return "Go."
    async def verify(self, item, task, result): return float(os.environ["OPENAI_API_KEY"] == "sk-judge-0123456789")

assert active_profile() is None
chatml_tokenizer().save_pretrained("tokenizer")
config = HermesEnvConfig(
    tokenizer_name="tokenizer", use_wandb=False, keep_env=["OPENAI_API_KEY"], sandbox="folder"
)
env = Env(config, [APIServerConfig()])
import asyncio, hermes_constants
assert hermes_constants.get_hermes_home() == active_profile() is not None
print(asyncio.run(env.rollout({}))[1], "DEEPSEEK_API_KEY" in os.environ)
"""
    keys = {"OPENAI_API_KEY": "sk-judge-0123456789", "DEEPSEEK_API_KEY": "sk-0123456789abcdef"}
    assert run_script(script, tmp_path, **keys).stdout.split() == ["1.0", "False"]


class Scored(Greetings):
    """Six items, of which each second is scored 1; it notes what it verifies, and is cut at the fourth."""

    seen: list[int]

    def items(self) -> list[Any]:
        return list(range(6))

    def prompt(self, item: Any) -> str:
        return str(item)

    async def verify(self, item: Any, task: Any, result: Any) -> float | Reward:
        if len(self.seen) == self.limit:
            self.evaluation.cancel()
            await asyncio.Event().wait()
        self.seen.append(item)
        return Reward(item % 2, metrics={"number": item})


class Measured(Greetings):
    async def verify(self, item: dict[str, Any], task: Any, result: dict[str, Any]) -> Reward:
        return Reward(1.0, metrics={"steps": len(result["trajectory"].steps), "half": 0.5})


async def test_the_trainer_hears_what_the_verifiers_measured(make: Any) -> None:
    env = make(kind=Measured)
    group, _ = await env.collect_trajectories(await env.get_next_item())
    assert group["group_overrides"] == {"group_size": 3, "metrics": {"steps": 2.0, "half": 0.5}}


async def test_an_evaluation_that_was_cut_goes_on_where_it_ended(make: Any, tmp_path: Path) -> None:
    config = {"data_dir_to_save_evals": str(tmp_path / "evals"), "max_eval_workers": 1}
    env = make(lambda messages: "Done.", kind=Scored, **config)
    env.seen, env.limit, env.evaluation = [], 3, asyncio.create_task(env.evaluate())
    with pytest.raises(asyncio.CancelledError):
        await env.evaluation
    after = make(lambda messages: "Done.", kind=Scored, **config)
    after.seen, after.limit = [], 6
    await after.evaluate()
    assert sorted(env.seen + after.seen) == [0, 1, 2, 3, 4, 5]
    assert after.eval_metrics == {"eval/score": 0.5, "eval/number": 2.5, "eval/items": 6, "eval/failed": 0}
    assert sorted(os.listdir(tmp_path / "evals")) == ["metrics.json", "samples.jsonl"]


async def test_processes_share_the_items(make: Any) -> None:
    """Also over the end of the items, after which they come again."""
    handed = []
    for index in range(3):
        env = make(kind=Scored, process_index=index, process_count=3)
        handed.append([await env.get_next_item() for _ in range(4)])
    assert handed == [[0, 3, 0, 3], [1, 4, 1, 4], [2, 5, 2, 5]]


async def test_without_items_there_is_no_next(make: Any) -> None:
    assert await make(kind=type("Empty", (Greetings,), {"items": lambda self: []})).get_next_item() is None


def test_a_process_that_is_none_of_those_there_are_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="count from 0"):
        make(process_index=2, process_count=2)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["process"], ["--env.use_wandb", "false"]),
        (["evaluate", "--env.group_size", "2"], ["--env.use_wandb", "false"]),
        (["process", "--env.use_wandb", "true"], []),
        (["process", "--config", "with.yaml"], []),
        (["process", "--config", "without.yaml"], ["--env.use_wandb", "false"]),
        (["serve"], []),
    ],
)
def test_wandb_is_asked_for_or_off(
    arguments: list[str], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """atroposlib's process and evaluate turn it on, and end without a key."""
    (tmp_path / "with.yaml").write_text("env:\n  use_wandb: true\n")
    (tmp_path / "without.yaml").write_text("env:\n  group_size: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["env", *arguments])
    seen = []
    monkeypatch.setattr("atroposlib.envs.base.run_and_exit", lambda *args, **options: seen.append(list(sys.argv)))
    Greetings.cli()
    assert seen == [["env", *arguments, *asked]]
