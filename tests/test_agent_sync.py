"""Synchronous and asynchronous calls: any number at once, from any thread and loop; what is given up stops at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import (
    LIMIT,
    SINCE_0_21,
    agent_on,
    agent_saying,
    check_tokens,
    garbage,
    nothing_left,
    processes,
    run_script,
    script_environ,
    server_of,
    terminal,
    tool_texts,
    until,
)

from hermes_atropos import AtroposAIAgent, StopReason
from hermes_atropos.errors import BlockingCallError
from hermes_atropos.hermes.environments import InShells
from hermes_atropos.hermes.hooks import Subagent
from hermes_atropos.runtime import turnstile
from hermes_atropos.sandbox.shell import Shells
from hermes_atropos.testing import Reply, ScriptedServer, tool_call


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: A command in whose way Hermes does not stand, with processes of other sessions than its own.
STUBBORN = "bash -c 'sleep 1000 & setsid sleep 1000 & sleep 1000'"


def echo(messages: list[dict[str, str]]) -> str:
    """Say the last user message after one command."""
    users = [m["content"] for m in messages if m["role"] == "user" and "<tool_response>" not in m["content"]]
    return f"You said {users[-1]}" if "<tool_response>" in messages[-1]["content"] else terminal(f"echo {users[-1]}")


@pytest.mark.parametrize("call", [terminal("true"), tool_call("write_file", path="a", content="b")])
async def test_a_tool_computes_in_its_turn(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Hermes runs it on a thread of its own; while a command runs, others may."""
    before: list[bool] = []
    run, execute = Shells.run, InShells.execute

    def executing(self: InShells, *args: Any, **options: Any) -> Any:
        before.append(turnstile._held)
        return execute(self, *args, **options)

    def running(self: Shells, request: Any) -> Any:
        assert not turnstile._held
        return run(self, request)

    monkeypatch.setattr(InShells, "execute", executing)
    monkeypatch.setattr(Shells, "run", running)
    async with agent_saying(call, "Done.").task() as task:
        assert (await task.run("Go."))["stop_reason"] is StopReason.COMPLETED
    assert before
    assert all(before)


async def test_a_subagent_computes_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a thread of its own too, while its parent's waits outside."""
    held: list[bool] = []
    made, told = Subagent._construct, Subagent._build_system_prompt

    def making(self: Subagent, *args: Any, **options: Any) -> None:
        held.append(turnstile._held)
        made(self, *args, **options)

    def telling(self: Subagent, *args: Any, **options: Any) -> str:
        held.append(turnstile._held)
        return told(self, *args, **options)

    monkeypatch.setattr(Subagent, "_construct", making)
    monkeypatch.setattr(Subagent, "_build_system_prompt", telling)
    agent = agent_saying(tool_call("delegate_task", goal="Look."), "Seen.", "Done.", enabled_toolsets=["delegation"])
    async with agent.task() as task:
        assert (await task.run("Go."))["final_response"] == "Done."
    assert held
    assert all(held)


class TestSynchronous:
    def test_again_and_again(self) -> None:
        agent = agent_on(ScriptedServer(echo))
        assert [agent.chat(f"n{number}") for number in range(4)] == [f"You said n{number}" for number in range(4)]

    def test_from_several_threads_with_one_agent(self) -> None:
        agent = agent_on(ScriptedServer(echo, latency=0.02))
        with nothing_left(), ThreadPoolExecutor(8) as pool:
            results = list(
                pool.map(lambda number: agent.run_conversation(f"n{number}", task_id=f"t{number}"), range(16))
            )
        assert [result["final_response"] for result in results] == [f"You said n{number}" for number in range(16)]
        for number, result in enumerate(results):
            mine = [r for r in server_of(agent).requests if f"<|im_start|>user\nn{number}<|im_end|>" in r.prompt]
            assert len(mine) == 2
            check_tokens(result["trajectory"], mine)

    def test_from_several_threads_with_an_agent_each(self) -> None:
        server = ScriptedServer(echo, latency=0.02)
        agent_on(server).chat("first")  # without a task, Hermes keeps one terminal for the life of the process
        with nothing_left(), ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: agent_on(server).chat(f"n{number}"), range(8)))
        assert answers == [f"You said n{number}" for number in range(8)]

    async def test_in_a_thread_whose_loop_runs(self) -> None:
        """As in a prompt_toolkit application: the call blocks its loop, and still comes to an end."""
        agent = agent_on(ScriptedServer(echo))
        assert agent.chat("n1") == "You said n1"
        assert agent.chat("n2") == "You said n2"

    def test_in_several_threads_each_with_a_running_loop(self) -> None:
        agent = agent_on(ScriptedServer(echo, latency=0.02))

        async def inside(number: int) -> str:
            return agent.chat(f"n{number}")

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: asyncio.run(inside(number)), range(8)))
        assert answers == [f"You said n{number}" for number in range(8)]

    async def test_on_the_server_s_own_loop_it_refuses_and_names_the_awaitable(self) -> None:
        agent = agent_on(ScriptedServer(echo))
        assert await agent.chat_async("n1") == "You said n1"  # now this loop is the server's
        for call in (agent.run_conversation, agent.chat):
            with pytest.raises(BlockingCallError, match=r"await agent.run_conversation_async\(...\)"):
                call("n2")
        assert await agent.chat_async("n3") == "You said n3"

    async def test_in_another_thread_while_the_server_s_loop_runs(self) -> None:
        """A server that lives on a running loop is used there."""
        loops: list[asyncio.AbstractEventLoop] = []

        async def model(messages: list[dict[str, str]]) -> str:
            loops.append(asyncio.get_running_loop())
            return echo(messages)

        agent = agent_on(ScriptedServer(model))
        await agent.chat_async("n1")
        assert await asyncio.to_thread(agent.chat, "n2") == "You said n2"
        assert set(loops) == {asyncio.get_running_loop()}

    def test_in_a_tool_s_thread_of_another_agent(self) -> None:
        """An agent may use another one in a callback."""
        helper = agent_on(ScriptedServer(echo))
        said: list[str] = []
        agent = agent_saying(terminal("true"), "Done.", tool_start_callback=lambda *_: said.append(helper.chat("hi")))
        assert agent.chat("Go.") == "Done."
        assert said == ["You said hi"]

    def test_callbacks_that_use_another_agent(self, tmp_path: Path) -> None:
        """Also where the agent is at no tool, and several do so at once; in a process of its own, which may hang."""
        assert run_script(NESTED, tmp_path, limit=LIMIT).stdout.split() == ["Done."] * 4 + ["Hi."] * 4


NESTED = """
import os, threading
from support import agent_on
from hermes_atropos.hermes.profile import use_training_profile
from hermes_atropos.testing import ScriptedServer

helper = agent_on(ScriptedServer(lambda _: "Hi."))
together = threading.Barrier(2)
said = []

def ask(*_):
    try:
        together.wait(1)
    except threading.BrokenBarrierError:
        pass  # they come one by one
    said.append(helper.chat("Hello."))

agent = agent_on(ScriptedServer(lambda _: "Done."), step_callback=ask)
threads = [threading.Thread(target=lambda: said.append(agent.chat("Go.")), daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(10)
print(*sorted(said), flush=True)
os._exit(0)  # whatever still hangs
"""


class TestAsynchronous:
    async def test_many_at_once_on_one_agent(self) -> None:
        agent = agent_on(ScriptedServer(echo, latency=0.02))
        results = await asyncio.gather(*(agent.run_conversation_async(f"n{number}") for number in range(24)))
        assert [result["final_response"] for result in results] == [f"You said n{number}" for number in range(24)]
        assert [json.loads(tool_texts(r["messages"])[0])["output"] for r in results] == [f"n{n}" for n in range(24)]

    async def test_hundreds_wait_for_the_model_at_once(self) -> None:
        """Each has a thread: none waits for another's answer, which comes only once all have asked."""
        waiting: list[int] = []
        everyone = asyncio.Event()

        async def model(_: Any) -> str:
            waiting.append(1)
            if len(waiting) == 200:
                everyone.set()
            await everyone.wait()
            return "Done."

        async def rollout() -> str:
            async with agent.task() as task:
                return str((await task.run("Go."))["final_response"])

        agent = agent_on(ScriptedServer(model), enabled_toolsets=["todo"])
        assert await asyncio.gather(*(rollout() for _ in range(200))) == ["Done."] * 200

    async def test_the_loop_goes_on_meanwhile(self) -> None:
        """Something that runs on the loop answers a question that a tool's callback asks from the rollout's thread."""
        loop = asyncio.get_running_loop()

        async def answer() -> str:
            return "alive"

        def ask(*_: Any) -> None:
            answers.append(asyncio.run_coroutine_threadsafe(answer(), loop).result(LIMIT))

        answers: list[str] = []
        agent = agent_saying(terminal("true"), "Done.", tool_start_callback=ask, step_callback=ask)
        await agent.chat_async("Go.")
        assert answers == ["alive"] * 3

    def test_one_agent_on_loops_that_come_and_go(self) -> None:
        agent = agent_on(ScriptedServer(echo))
        for number in range(3):
            assert asyncio.run(agent.chat_async(f"n{number}")) == f"You said n{number}"
        assert agent.chat("n3") == "You said n3"
        assert asyncio.run(agent.chat_async("n4")) == "You said n4"

    async def test_synchronous_and_asynchronous_at_once(self) -> None:
        agent = agent_on(ScriptedServer(echo, latency=0.02))
        await agent.chat_async("n")
        answers = await asyncio.gather(
            *(agent.chat_async(f"a{number}") for number in range(4)),
            *(asyncio.to_thread(agent.chat, f"s{number}") for number in range(4)),
        )
        assert answers == [f"You said {kind}{number}" for kind in "as" for number in range(4)]

    async def test_context_variables_reach_the_callbacks(self) -> None:
        import contextvars

        who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
        seen: list[str] = []
        agent = agent_saying("Done.", step_callback=lambda *_: seen.append(who.get()))
        who.set("me")
        await agent.chat_async("Go.")
        assert seen == ["me"]

    async def test_runs_of_one_task_one_after_the_other(self) -> None:
        agent = agent_on(ScriptedServer(echo))
        async with agent.task() as task:
            for number in range(3):
                assert (await task.run(f"n{number}"))["final_response"] == f"You said n{number}"

    async def test_runs_of_one_task_at_once_take_turns(self) -> None:
        agent = agent_on(ScriptedServer(echo, latency=0.02))
        async with agent.task() as task:
            results = await asyncio.gather(*(task.run(f"n{number}") for number in range(4)))
        assert [result["final_response"] for result in results] == [f"You said n{number}" for number in range(4)]
        trajectories = sorted((result["trajectory"] for result in results), key=lambda trajectory: trajectory.num_steps)
        assert [trajectory.fidelity.turns for trajectory in trajectories] == [2, 4, 6, 8]
        check_tokens(trajectories[-1], server_of(agent).requests)

    def test_a_loop_that_ends_under_a_run_of_another_thread(self) -> None:
        """The run ends too, instead of waiting for an answer that nobody will bring."""
        asked = threading.Event()

        def model(messages: list[dict[str, str]]) -> str | Reply:
            if "hang" in messages[-1]["content"]:
                asked.set()
                return Reply(hang=True)
            return "Hello."

        agent = agent_on(ScriptedServer(model))

        async def serve() -> tuple[threading.Thread, list[Any]]:
            await agent.chat_async("Hi.")  # this loop is the server's
            run = in_thread(lambda: agent.run_conversation("hang"))
            await asyncio.to_thread(asked.wait, LIMIT)
            return run

        thread, results = asyncio.run(serve())
        thread.join(LIMIT)
        assert [result["stop_reason"] for result in results] == [StopReason.INTERRUPTED]
        assert agent.chat("Hi.") == "Hello."

    def test_an_agent_that_is_done_with_is_freed(self) -> None:
        agent = agent_on(ScriptedServer(echo))
        agent.chat("n1")
        agent.last_result = None
        reference = weakref.ref(agent)
        del agent
        gc.collect()
        assert reference() is None

    @pytest.mark.parametrize("answer", ["Hello.", Reply(error=RuntimeError("out of memory"))], ids=["well", "ill"])
    async def test_the_agent_of_a_task_is_freed_with_it_at_once(self, answer: str | Reply) -> None:
        """Hundreds of them would make the garbage collector stop the event loop."""
        agent = agent_saying(answer)
        gc.disable()
        logging.disable()  # pytest keeps what is logged, with the frames of an error
        try:
            async with agent.task() as task:
                result = await task.run("Go.")
            used = weakref.ref(task._agent)
            del task
            await asyncio.to_thread(until, lambda: used() is None)
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()
        assert (result.get("cause") is None) == (answer == "Hello.")

    async def test_rollouts_leave_no_garbage(self) -> None:
        agent = agent_on(ScriptedServer(echo))

        async def rollout() -> None:
            async with agent.task() as task:
                await task.run("n1")

        # Hermes' scan of commands leaves closures that hold themselves, from 0.21.
        assert await garbage(rollout, 50) < (5000 if SINCE_0_21 else 50)


class TestCancellation:
    async def test_it_stops_the_model_request(self) -> None:
        asked = asyncio.Event()

        def model(_: Any) -> Reply:
            asked.set()
            return Reply(hang=True)

        agent = agent_on(ScriptedServer(model))
        with nothing_left():
            run = asyncio.create_task(agent.run_conversation_async("Go."))
            await asked.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        assert server_of(agent).requests[0].cancelled

    async def test_it_stops_the_tool_and_its_processes(self) -> None:
        loop = asyncio.get_running_loop()
        started = asyncio.Event()
        agent = agent_saying(
            terminal(f"echo $$ > pid; {STUBBORN}"),
            tool_start_callback=lambda *_: loop.call_soon_threadsafe(started.set),
        )
        with nothing_left():
            async with agent.task() as task:
                run = asyncio.create_task(task.run("Go."))
                await started.wait()
                await asyncio.to_thread(until, lambda: sum("sleep" in command for command in processes().values()) >= 3)
                run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await run
                assert await task.read_file("pid"), "the sandbox is the verifier's until the end of the block"

    async def test_it_stops_the_children(self) -> None:
        asked = asyncio.Event()

        def model(messages: list[dict[str, str]]) -> str | Reply:
            if any("Delegate" in message["content"] for message in messages):
                return tool_call("delegate_task", tasks=[{"goal": "Do number one."}, {"goal": "Do number two."}])
            if len(server.requests) == 3:
                asked.set()
            return Reply(hang=True)

        server = ScriptedServer(model)
        agent = agent_on(server, enabled_toolsets=["delegation", "terminal"])
        with nothing_left():
            run = asyncio.create_task(agent.run_conversation_async("Delegate."))
            await asked.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        assert [request.cancelled for request in server.requests] == [False, True, True]

    async def test_it_stops_one_rollout_alone(self) -> None:
        everyone, goes_on = asyncio.Event(), asyncio.Event()

        async def model(messages: list[dict[str, str]]) -> str:
            if len(server.requests) == 3:
                everyone.set()
            await goes_on.wait()
            return echo(messages)

        server = ScriptedServer(model)
        agent = agent_on(server)
        runs = [asyncio.create_task(agent.chat_async(f"n{number}")) for number in range(3)]
        await everyone.wait()
        runs[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await runs[1]
        goes_on.set()
        assert await asyncio.gather(runs[0], runs[2]) == ["You said n0", "You said n2"]

    async def test_the_agent_goes_on_afterwards(self) -> None:
        asked = asyncio.Event()

        def model(messages: list[dict[str, str]]) -> str | Reply:
            if "hang" in messages[-1]["content"]:
                asked.set()
                return Reply(hang=True)
            return echo(messages)

        agent = agent_on(ScriptedServer(model))
        run = asyncio.create_task(agent.chat_async("hang"))
        await asked.wait()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        assert await agent.chat_async("n1") == "You said n1"

    async def test_what_there_is_is_kept(self) -> None:
        asked = asyncio.Event()

        def model(messages: list[dict[str, str]]) -> str | Reply:
            if len(messages) < 3:
                return terminal("echo 1")
            asked.set()
            return Reply(hang=True)

        agent = agent_on(ScriptedServer(model), save_trajectories=True)
        run = asyncio.create_task(agent.run_conversation_async("Go."))
        await asked.wait()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        result = agent.last_result
        assert result["stop_reason"] is StopReason.CANCELLED
        assert not result["trajectory"].success
        assert json.loads(tool_texts(result["messages"])[0])["output"] == "1"
        check_tokens(result["trajectory"], server_of(agent).requests[:1])

    async def test_a_timeout_around_it(self) -> None:
        agent = agent_on(ScriptedServer([Reply(hang=True)]))
        with nothing_left(), pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await agent.run_conversation_async("Go.")

    async def test_while_the_verifier_s_command_runs(self) -> None:
        with nothing_left():
            async with agent_saying().task() as task:
                command = asyncio.create_task(task.terminal("echo > running; sleep 1000"))
                await asyncio.to_thread(until, (task.workspace / "running").exists)
                command.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await command
                assert (await task.terminal("echo on")).output.strip() == "on", "the next command is not stopped too"

    async def test_while_the_task_opens_and_closes(self) -> None:
        """Wherever it hits, the sandbox is released."""
        agent = agent_on(ScriptedServer(echo))

        async def rollout() -> None:
            async with agent.task() as task:
                await task.run("n1")

        with nothing_left():
            for turns in (0, 1, 2, 3, 5, 8):
                run = asyncio.create_task(rollout())
                for _ in range(turns):
                    await asyncio.sleep(0)
                run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await run
        await rollout()

    async def test_many_at_once(self) -> None:
        everyone = asyncio.Event()

        def model(_: Any) -> Reply:
            if len(server.requests) == 30:
                everyone.set()
            return Reply(hang=True)

        server = ScriptedServer(model)
        agent = agent_on(server)
        with nothing_left():
            runs = [asyncio.create_task(agent.chat_async("Go.")) for _ in range(30)]
            await everyone.wait()
            for run in runs:
                run.cancel()
            results = await asyncio.gather(*runs, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert all(request.cancelled for request in server.requests)


# A program that was started in the background may have inherited that Ctrl-C is ignored.
INTERRUPTED = """
import asyncio, glob, os, signal, sys, tempfile, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from hermes_atropos.hermes.profile import use_training_profile
home = str(use_training_profile())
from support import agent_on, processes, terminal, until
from hermes_atropos.testing import Reply, ScriptedServer, tool_call

def model(messages):
    where = sys.argv[1]
    if where == "model":
        print("now", flush=True)
        return Reply(hang=True)
    if where == "subagents" and "Go." in str(messages):
        return tool_call("delegate_task", tasks=[{"goal": "Wait for it."}, {"goal": "Wait, too."}])
    return terminal("echo > started; bash -c 'sleep 1000 & setsid sleep 1000 & sleep 1000'")

def watch():
    while not glob.glob("started"):
        threading.Event().wait(0.01)
    print("now", flush=True)

server = ScriptedServer(model)
agent = agent_on(server, save_trajectories=True, enabled_toolsets=["terminal", "delegation"])
if sys.argv[1] != "model":
    threading.Thread(target=watch, daemon=True).start()
try:
    if sys.argv[2] == "async":
        asyncio.run(agent.run_conversation_async("Go."))
    else:
        agent.run_conversation("Go.", task_id="mine")
except KeyboardInterrupt:
    print("stopped", flush=True)
    if sys.argv[1] == "model":
        until(lambda: server.requests[0].cancelled)
    print("processes", processes())
    print("folders", set(glob.glob(tempfile.gettempdir() + "/hermes-atropos-*")) - {home})
    print("reason", agent.last_result["stop_reason"].value, len(agent.last_result["messages"]))
    raise SystemExit(3)
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("where", ["model", "tool", "subagents"])
def test_ctrl_c(tmp_path: Path, where: str, kind: str) -> None:
    """It ends the request, the tool's processes and the program, which may say something before it goes."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, where, kind],
        cwd=tmp_path,
        env=script_environ(tmp_path, TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert next(line for line in program.stdout if line == "now\n")
        os.kill(program.pid, signal.SIGINT)
        output, errors = program.communicate(timeout=LIMIT)
    finally:
        program.kill()
    assert program.returncode == 3, output + errors
    told = dict(line.split(" ", 1) for line in output.splitlines() if " " in line)
    assert told["processes"] == "{}"
    assert told["folders"] == "set()"
    assert told["reason"].split()[0] in {"interrupted", "cancelled"}
    assert list(temporary.iterdir()) == [], "not even the training profile's home is left"
    [saved] = list(tmp_path.glob("*.jsonl"))
    assert saved.name == "failed_trajectories.jsonl"
    [entry] = map(json.loads, saved.read_text().splitlines())
    assert [turn["from"] for turn in entry["conversations"]][:2] == ["system", "human"]


def test_ctrl_c_twice_is_no_traceback_of_a_second_kind(tmp_path: Path) -> None:
    """Impatience does no harm: what the first interrupt began goes on to its end."""
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "tool", "async"],
        cwd=tmp_path,
        env=script_environ(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert next(line for line in program.stdout if line == "now\n")
        for _ in range(2):
            os.kill(program.pid, signal.SIGINT)
        program.communicate(timeout=LIMIT)
    finally:
        program.kill()
    assert program.returncode != 0
    until(lambda: not processes(program.pid))


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_an_interrupt_stops_every_conversation_of_the_agent() -> None:
    asked = [threading.Event(), threading.Event()]

    def model(messages: list[dict[str, str]]) -> Reply:
        asked[int(messages[-1]["content"])].set()
        return Reply(hang=True)

    agent: AtroposAIAgent = agent_on(ScriptedServer(model))
    runs = [in_thread(lambda number=number: agent.run_conversation(str(number))) for number in range(2)]
    assert all(event.wait(LIMIT) for event in asked)
    agent.interrupt()
    for thread, _ in runs:
        thread.join(LIMIT)
    assert [result["stop_reason"] for _, [result] in runs] == [StopReason.INTERRUPTED] * 2
