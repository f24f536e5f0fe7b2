"""A pytest plugin: Hermes' own tests, with ``AtroposAIAgent`` in place of ``run_agent.AIAgent``.

Those tests mock the model by ``agent.client.chat.completions.create``. Here that mock stands behind an atroposlib
server: our class asks it for every answer, and everything else is as Hermes' authors wrote it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, Self

import run_agent
from agent.model_metadata import DEFAULT_FALLBACK_CONTEXT
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_message_function_tool_call import Function

from hermes_atropos import AtroposAIAgent
from hermes_atropos.backends.chat_stream import add
from hermes_atropos.hermes import seams

SAID = ("content", "reasoning", "reasoning_content", "reasoning_details", "refusal")
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")

#: An address at which nobody listens.
NOWHERE = "http://127.0.0.1:9/v1"


def plain(value: Any) -> Any:
    """What a mock's attribute says; None where the test did not set it."""
    return value if isinstance(value, str | int | float | list | dict) else None


def completion(mocked: Any) -> ChatCompletion:
    """A mocked answer as the openai client would have returned it."""
    choices = []
    for index, choice in enumerate(mocked.choices):
        calls = [
            ChatCompletionMessageFunctionToolCall.model_construct(
                id=call.id,
                type="function",
                function=Function.model_construct(name=call.function.name, arguments=call.function.arguments),
            )
            for call in plain(getattr(choice.message, "tool_calls", None)) or []
        ]
        said = {key: plain(getattr(choice.message, key, None)) for key in SAID}
        message = ChatCompletionMessage.model_construct(role="assistant", tool_calls=calls or None, **said)
        choices.append(
            Choice.model_construct(index=index, message=message, finish_reason=choice.finish_reason, logprobs=None)
        )
    usage: Any = getattr(mocked, "usage", None)
    if usage is not None:
        usage = CompletionUsage.model_validate({key: plain(getattr(usage, key, None)) or 0 for key in COUNTS})
    return ChatCompletion.model_construct(
        id="mocked", object="chat.completion", created=0, model="mocked", choices=choices, usage=usage
    )


def tree(mocked: Any) -> Any:
    """A mocked chunk as JSON has it."""
    if isinstance(mocked, SimpleNamespace):
        return {key: tree(value) for key, value in vars(mocked).items()}
    return [tree(item) for item in mocked] if isinstance(mocked, list) else plain(mocked)


class MockedStream:
    """What the mocked client answers to a request for a stream: chunks, or all at once."""

    def __init__(self, mocked: Any) -> None:
        self.mocked = mocked

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Any]:
        chunks = map(tree, self.mocked) if isinstance(self.mocked, Iterator) else [completion(self.mocked).model_dump()]
        for chunk in chunks:
            yield SimpleNamespace(model_dump=lambda chunk=chunk: chunk)


class MockedClientServer(OpenAIServer):
    """A chat endpoint whose answers come from the mocked client of one agent."""

    #: So that nobody is asked for it.
    context_length = DEFAULT_FALLBACK_CONTEXT

    def __init__(self, model: str, base_url: str) -> None:
        super().__init__(APIServerConfig(model_name=model, base_url=base_url, api_key="none", health_check=False))
        self.agent: Any = None
        self.client: Any = None
        self.stand_in: Any = None
        completions = SimpleNamespace(create=self._stream)
        self.openai: Any = SimpleNamespace(copy=lambda **_: self.openai, chat=SimpleNamespace(completions=completions))

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        answer = await self._answer(kwargs)
        if not isinstance(answer, Iterator):
            return completion(answer)
        whole: dict[str, Any] = {}
        for chunk in answer:
            add(whole, tree(chunk))
        return ChatCompletion.construct(**whole)

    async def _stream(self, **kwargs: Any) -> MockedStream:
        return MockedStream(await self._answer(kwargs))

    async def _answer(self, request: dict[str, Any]) -> Any:
        """The test gave the agent another way to ask, a client of its own, or Hermes' module a class of clients."""
        replaced = vars(self.agent).get("_interruptible_api_call")
        if replaced is not None:
            return await asyncio.to_thread(replaced, request)
        client = self.agent.client
        if client is self.stand_in:
            client = self.client = self.client or run_agent.OpenAI(api_key="none", base_url=NOWHERE)
        return await asyncio.to_thread(client.chat.completions.create, **request)


class AIAgent(AtroposAIAgent):
    """AtroposAIAgent, constructed as Hermes' tests construct AIAgent."""

    def __init__(self, *args: Any, **options: Any) -> None:
        server = MockedClientServer(options.get("model") or "test/model", options.get("base_url") or NOWHERE)
        super().__init__(*args, server=server, **options)
        server.agent, server.stand_in = self, self.client


AIAgent.__init__.__signature__ = inspect.signature(run_agent.AIAgent.__init__)  # type: ignore[attr-defined]

# What the library looks for in Hermes, it finds before a test puts a mock in its place.
seams.check()
run_agent.AIAgent = AIAgent
