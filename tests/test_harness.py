"""What the tasks of every agent have in common, awaited and waited for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import agent_on, check_tokens, check_unbroken, nothing_left, terminal, until

from hermes_atropos.errors import BlockingCallError, SandboxError
from hermes_atropos.harness import BlockingTask, Task
from hermes_atropos.hermes.tools import HermesTools
from hermes_atropos.react import AtroposAgent
from hermes_atropos.runtime import portal_loop
from hermes_atropos.testing import Reply, ScriptedServer
from hermes_atropos.trajectory import StopReason


def hermes_agent(server: ScriptedServer) -> Any:
    return agent_on(server)


def small_agent(server: ScriptedServer) -> Any:
    return AtroposAgent(server, tools=HermesTools(["terminal", "file"]))


@pytest.fixture(params=[hermes_agent, small_agent], ids=["hermes", "small"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def history(result: Any) -> Any:
    return result["messages"] if isinstance(result, dict) else result.messages


async def test_both_agents_have_the_same_task(make: Any, tmp_path: Path) -> None:
    server = ScriptedServer([terminal("cat in.txt > out.txt"), "Copied.", "Yes."])
    with nothing_left():
        async with make(server).task("copy-1") as task:
            assert isinstance(task, Task)
            assert (task.task_id, task.trajectory) == ("copy-1", None)
            await task.write_file("in.txt", "hello\n")
            result = await task.run("Copy in.txt to out.txt.")
            more = await task.run("Is it there?", conversation_history=history(result))
            assert await task.read_file("out.txt") == "hello\n" == (task.workspace / "out.txt").read_text()
            assert await task.read_bytes("out.txt") == b"hello\n"
            listed = await task.terminal("ls; exit 3")
            assert (listed.output.split(), listed.exit_code) == (["in.txt", "out.txt"], 3)
    trajectory = task.trajectory
    assert trajectory is (more["trajectory"] if isinstance(more, dict) else more)
    assert trajectory.final_response == "Yes."
    check_unbroken(server.requests)
    check_tokens(trajectory, server.requests)


def test_a_script_waits_for_the_same(make: Any, tmp_path: Path) -> None:
    server = ScriptedServer([terminal("cat in.txt > out.txt"), "Copied."])
    (tmp_path / "in.txt").write_text("hello\n")
    with nothing_left():
        with make(server).task(workspace=tmp_path, copy=True) as task:
            assert isinstance(task, BlockingTask)
            task.run("Copy in.txt to out.txt.")
            assert task.read_file("out.txt") == "hello\n"
            assert task.terminal("cat out.txt").output == "hello\n"
            assert task.trajectory.stop_reason is StopReason.COMPLETED
        assert not (tmp_path / "out.txt").exists(), "the tools acted in a copy"
    with pytest.raises(SandboxError, match="has been released"):
        task.terminal("true")
    check_tokens(task.trajectory, server.requests)


async def test_a_script_may_run_where_an_event_loop_runs(make: Any) -> None:
    with make(ScriptedServer(["Hello."])).task() as task:
        task.run("Hello!")
    assert task.trajectory.final_response == "Hello."


def test_what_the_block_raises_comes_out_of_it(make: Any) -> None:
    with nothing_left(), pytest.raises(ZeroDivisionError), make(ScriptedServer([])).task():
        raise ZeroDivisionError


def test_on_the_librarys_own_loop_it_could_only_deadlock(make: Any) -> None:
    async def enter() -> None:
        with make(ScriptedServer([])).task():
            pass

    with pytest.raises(BlockingCallError, match="use async with agent"):
        asyncio.run_coroutine_threadsafe(enter(), portal_loop()).result()


def test_ctrl_c_ends_the_run_and_releases_the_sandbox(make: Any) -> None:
    server = ScriptedServer([Reply(hang=True)])

    def press() -> None:
        until(lambda: bool(server.requests))
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    try:
        thread.start()
        with nothing_left(), make(server).task() as task, pytest.raises(KeyboardInterrupt):
            task.run("Wait for ever.")
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert server.requests[0].cancelled
    assert task.trajectory.stop_reason is StopReason.CANCELLED
