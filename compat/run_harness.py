"""One agent of another library, on the endpoint that the environment names; ``harnesses.py`` runs it.

    OPENAI_BASE_URL=… OPENAI_API_KEY=… python run_harness.py openai-agents

Each does the same: two additions, an answer, and, where it can be asked again, another addition. It is written as its
library's own documentation has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

FIRST, SECOND = "What is 2 + 3, and 4 + 5?", "And 6 + 7?"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def openai_agents(chat: bool = False) -> None:
    from agents import (
        Agent,
        ModelSettings,
        Runner,
        function_tool,
        set_default_openai_api,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    if chat:
        set_default_openai_api("chat_completions")
    agent = Agent(name="sums", model="policy", tools=[function_tool(add)], model_settings=ModelSettings(temperature=1))
    first = Runner.run_sync(agent, FIRST)
    print(first.final_output)
    print(Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": SECOND}]).final_output)


def openai_agents_chat() -> None:
    openai_agents(chat=True)


def openai_agents_streamed() -> None:
    import asyncio

    from agents import Agent, Runner, function_tool, set_tracing_disabled

    set_tracing_disabled(True)
    agent = Agent(name="sums", model="policy", tools=[function_tool(add)])

    async def run() -> None:
        first = Runner.run_streamed(agent, FIRST)
        async for _ in first.stream_events():
            pass
        second = Runner.run_streamed(agent, [*first.to_input_list(), {"role": "user", "content": SECOND}])
        async for _ in second.stream_events():
            pass
        print(first.final_output, second.final_output)

    asyncio.run(run())


def pydantic_ai() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel

    agent = Agent(OpenAIChatModel("policy"), tools=[add])
    first = agent.run_sync(FIRST)
    print(first.output)
    print(agent.run_sync(SECOND, message_history=first.all_messages()).output)


def smolagents(code: bool = False) -> None:
    from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool

    model = OpenAIServerModel("policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    agent = (CodeAgent if code else ToolCallingAgent)(tools=[tool(add)], model=model, verbosity_level=0)
    print(agent.run(FIRST))
    print(agent.run(SECOND, reset=False))


def smolagents_code() -> None:
    smolagents(code=True)


def mini_swe_agent() -> None:
    os.environ.update(MSWEA_SILENT_STARTUP="1", MSWEA_COST_TRACKING="ignore_errors")
    import yaml
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.config import builtin_config_dir
    from minisweagent.environments.local import LocalEnvironment
    from minisweagent.models.litellm_model import LitellmModel

    config = yaml.safe_load((builtin_config_dir / "mini.yaml").read_text())
    options = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    model = LitellmModel(**config["model"] | {"model_name": "openai/policy", "model_kwargs": options})
    templates = {name: config["agent"][name] for name in ("system_template", "instance_template")}
    print(DefaultAgent(model, LocalEnvironment(**config["environment"]), **templates).run(FIRST))


HARNESSES: dict[str, Callable[[], None]] = {
    "openai-agents": openai_agents,
    "openai-agents, streamed": openai_agents_streamed,
    "openai-agents, chat": openai_agents_chat,
    "pydantic-ai": pydantic_ai,
    "smolagents, tool calls": smolagents,
    "smolagents, code": smolagents_code,
    "mini-swe-agent": mini_swe_agent,
}

if __name__ == "__main__":
    HARNESSES[sys.argv[1]]()
