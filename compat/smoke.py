"""Real rollouts on whatever releases are installed, through all that differs between releases of Hermes.

The model is scripted; the agent, its tools and its sandbox are real. What the trainer would get is compared with what
the server recorded. No connection is opened, and no file of the user's home: either raises. Prints one line of figures,
or raises; after a minute at the latest.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hermes_atropos import use_training_profile

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.sendto"}
HOME = str(Path.home())
ELSEWHERE = (sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(Path(__file__).resolve().parent.parent))


def refuse(event: str, about: tuple[Any, ...]) -> None:
    """An audit hook: neither Hermes' import nor a rollout may open a connection, or read or write the user's files."""
    if event in NETWORK:
        raise PermissionError(f"a connection: {event}{about}")
    if event == "open" and str(about[0]).startswith(HOME) and not str(about[0]).startswith(ELSEWHERE):
        raise PermissionError(f"a file of the user's: {about[0]}")


faulthandler.dump_traceback_later(60, exit=True)
sys.addaudithook(refuse)
use_training_profile(compression=True)

from hermes_state import SessionDB  # noqa: E402
from tools.registry import registry  # noqa: E402

from hermes_atropos import AtroposAIAgent, StopReason  # noqa: E402
from hermes_atropos.testing import ScriptedServer, tool_call  # noqa: E402

Model = list[str] | Callable[[list[dict[str, str]]], str]
MASKED = -100
GOALS = ["Copy greeting.txt to one.txt.", "Copy greeting.txt to two.txt."]  # newer releases refuse short ones


class Figures:
    """What the scenarios add up to."""

    calls = trained = subagents = summaries = 0


async def run(
    model: Model, *, asked: Any = "Go.", read: str | None = None, server: ScriptedServer | None = None, **options: Any
) -> tuple[ScriptedServer, dict[str, Any], str]:
    """One rollout in a task of its own; checks its tokens, and returns a file's text from the sandbox beside it."""
    server = server or ScriptedServer(model)
    agent = AtroposAIAgent(server=server, **{"enabled_toolsets": ["terminal"], "quiet_mode": True, **options})
    async with agent.task() as task:
        result = await task.run(asked)
        text = (await asyncio.to_thread(task.sandbox.run, f"cat {read}")).output if read else ""
    Figures.calls += len(server.requests)
    Figures.trained += check_tokens(server, result)
    return server, result, text


def check_tokens(server: ScriptedServer, result: dict[str, Any]) -> int:
    """How many tokens were sampled: the trajectory has each once, with its logprob, after the same tokens."""
    sampled = [
        (request.prompt_ids + ids[:place], token, logprob)
        for request in server.requests
        for ids, logprobs in zip(request.output_ids, request.logprobs, strict=True)
        for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True))
    ]
    trajectory = result["trajectory"]
    trained = [
        (sequence.tokens[:place], token, sequence.logprobs[place])
        for sequence in trajectory.all_sequences or trajectory.sequences
        for place, token in enumerate(sequence.masked_tokens)
        if token != MASKED
    ]
    expect("tokens", sorted(trained), sorted(sampled))
    return len(trained)


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r:.300}, found {found!r:.300}")


async def a_mended_call_and_several_subagents() -> None:
    agent_says = iter(
        [
            '<tool_call>\n{"name": "terminal", "arguments": {"command": "echo hello\n</tool_call>',
            tool_call("terminal", command="echo hello > greeting.txt"),
            tool_call("delegate_task", tasks=[{"goal": goal} for goal in GOALS]),
            "All three are there.",
        ]
    )

    def model(messages: list[dict[str, str]]) -> str:
        for goal in GOALS:
            if any(goal in message["content"] for message in messages[:2]):
                said = any(message["role"] == "assistant" for message in messages)
                return "Copied, says the subagent." if said else tool_call("terminal", command=goal_command(goal))
        return next(agent_says)

    def goal_command(goal: str) -> str:
        return f"cp greeting.txt {goal.split()[-1].rstrip('.')}"

    server, result, text = await run(model, read="one.txt two.txt", enabled_toolsets=["terminal", "delegation"])
    expect("the subagents' files", text.split(), ["hello", "hello"])
    expect("stop reason", result["stop_reason"], StopReason.COMPLETED)
    expect("final response", result["final_response"], "All three are there.")
    expect("the agent hears what the subagents said", "says the subagent" in server.requests[-1].prompt, True)
    expect("sequences: the agent's and the subagents'", len(result["trajectory"].sequences), 3)
    Figures.subagents += 2


async def a_subagent_that_is_interrupted() -> None:
    server: ScriptedServer
    agent: AtroposAIAgent

    def model(messages: list[dict[str, str]]) -> str:
        if any(GOALS[0] in message["content"] for message in messages[:2]):
            agent.interrupt()
            return tool_call("terminal", command="sleep 1000")
        return tool_call("delegate_task", goal=GOALS[0])

    server = ScriptedServer(model)
    agent = AtroposAIAgent(server=server, enabled_toolsets=["terminal", "delegation"], quiet_mode=True)
    async with agent.task() as task:
        result = await task.run("Go.")
    expect("stop reason", result["stop_reason"], StopReason.INTERRUPTED)
    expect("model calls", len(server.requests), 2)
    Figures.calls += 2
    Figures.subagents += 1


async def a_compression() -> None:
    def model(messages: list[dict[str, str]]) -> str:
        if not any("Please count" in message["content"] for message in messages[:2]):
            return "## Goal\nCount.\n## Progress\nCounted so far."
        return (
            tool_call("terminal", command=f"seq {len(server.requests)} 4000") if len(server.requests) < 9 else "Done."
        )

    server = ScriptedServer(model)
    agent = AtroposAIAgent(server=server, enabled_toolsets=["terminal"], quiet_mode=True)
    agent.context_compressor.threshold_tokens = 30_000
    agent.context_compressor.tail_token_budget = 2_000
    async with agent.task() as task:
        result = await task.run("Please count.")
    summaries = sum("<tools>" not in request.prompt for request in server.requests)
    expect("final response", result["final_response"], "Done.")
    expect("a summary was asked for, of the same server", summaries > 0, True)
    Figures.calls += len(server.requests)
    Figures.trained += check_tokens(server, result)
    Figures.summaries += summaries


async def the_summary_at_the_limit() -> None:
    says = [tool_call("terminal", command="pwd"), "I only got as far as pwd."]
    server, result, _ = await run(says, max_iterations=1)
    expect("stop reason", result["stop_reason"], StopReason.ITERATION_LIMIT)
    expect("model calls, the summary included", len(server.requests), 2)
    Figures.summaries += 1


async def empty_answers() -> None:
    server, result, _ = await run([""] * 9)
    expect("stop reason", result["stop_reason"], StopReason.EMPTY_RESPONSE)
    expect("model calls", len(server.requests), 4)


async def a_session_that_wants_a_title() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sessions = SessionDB(Path(folder, "state.db"))
        server, result, _ = await run(["Hello."], asked="Say hello, please.", session_db=sessions)
        session = result.get("session_id")  # older releases do not say
        expect("the title is left alone", session and sessions.get_session_title(session), None)
    expect("model calls", len(server.requests), 1)


async def an_image() -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]
    server, result, _ = await run(["I cannot see it."], asked=parts)
    expect("stop reason", result["stop_reason"], StopReason.COMPLETED)
    expect("what the model reads", "[An image was attached here" in server.requests[0].prompt, True)


async def a_deferred_tool() -> None:
    """From 0.16, tools of others are found by a search, and called by a tool that hands on."""
    names = [f"lamp_{number}" for number in range(10)]
    for name in names:
        schema = {"name": name, "description": "Turn on. " * 1000, "parameters": {"type": "object", "properties": {}}}
        registry.register(name, "mcp-lamps", schema, handler=lambda arguments, **_: "it is on")

    def model(messages: list[dict[str, str]]) -> str:
        if len(messages) > 2:
            return "Done."
        prompt = messages[0]["content"]
        if "tool_search" not in prompt:
            return tool_call("lamp_7")
        light: dict[str, Any] = {"name": "lamp_7", "arguments": {}}
        return tool_call("tool_call", **({"calls": [light]} if '"calls"' in prompt else light))

    try:
        server, result, _ = await run(model, enabled_toolsets=["terminal", "mcp-lamps"])
    finally:
        for name in names:
            registry.deregister(name)
    expect("the tool ran", "it is on" in server.requests[-1].prompt, True)
    expect("the trajectory names it", [ran.name for ran in result["trajectory"].steps[0].tool_results], ["lamp_7"])


async def a_steer() -> None:
    agents: list[AtroposAIAgent] = []
    server = ScriptedServer([tool_call("terminal", command="true"), "Done."])
    agent = AtroposAIAgent(
        server=server,
        enabled_toolsets=["terminal"],
        quiet_mode=True,
        tool_complete_callback=lambda *_: agents[0].steer("Hurry up."),
    )
    agents.append(agent)
    async with agent.task() as task:
        result = await task.run("Go.")
    expect("the model reads it", "Hurry up." in server.requests[-1].prompt, True)
    expect("sequences", len(result["trajectory"].sequences), 1)
    Figures.calls += len(server.requests)
    Figures.trained += check_tokens(server, result)


async def a_large_result() -> None:
    says = ["".join(tool_call("terminal", command=f"seq {start} 20000") for start in range(4)), "Done."]
    server = ScriptedServer(says)
    server.context_length = 1_000_000
    server, result, text = await run(says, server=server, read="$TMPDIR/hermes-results/*")
    contents = [message["content"] for message in result["messages"] if message["role"] == "tool"]
    expect("a result was put aside", any("persisted-output" in content for content in contents), True)
    expect("it lies in the sandbox", "19999" in text, True)


SCENARIOS = [
    a_mended_call_and_several_subagents,
    a_subagent_that_is_interrupted,
    a_compression,
    the_summary_at_the_limit,
    empty_answers,
    a_session_that_wants_a_title,
    an_image,
    a_deferred_tool,
    a_steer,
    a_large_result,
]


def main() -> None:
    for scenario in SCENARIOS:
        try:
            asyncio.run(scenario())
        except BaseException as error:
            error.add_note(f"in the scenario {scenario.__name__}")
            raise
    found = Figures
    print(
        f"{found.calls} model calls, {found.subagents} subagents, {found.summaries} summaries, "
        f"{found.trained} tokens, each as the server sampled it"
    )


if __name__ == "__main__":
    main()
