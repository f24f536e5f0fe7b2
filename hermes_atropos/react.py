"""``AtroposAgent``: a small asynchronous agent that calls tools until it has an answer.

::

    agent = AtroposAgent(server, tools=HermesTools(["terminal", "file"]))
    async with agent.task("fix-17", workspace=repo) as task:
        result = await task.run("Make the tests pass.")
        check = await task.terminal("pytest -q")
    data = result.to_scored_data(score=float(check.exit_code == 0))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from hermes_atropos import harness
from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.conversation import Conversation, stop_reason_of
from hermes_atropos.errors import BackendTimeoutError, ConfigurationError, ToolDefinitionError
from hermes_atropos.logs import redact
from hermes_atropos.messages import tool_call_block
from hermes_atropos.sandbox import Sandbox
from hermes_atropos.sandbox.wall import WallArguments
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.toolcalls.prompts import call_schema
from hermes_atropos.tools import ToolRegistry, ToolResult, ToolTask
from hermes_atropos.trajectory import AgentResult, SequenceData, StopReason
from hermes_atropos.values import is_number

__all__ = ["AgentConfig", "AgentTask", "AtroposAgent"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(slots=True)
class AgentConfig:
    """How an agent works. All times are in seconds; None sets no limit.

    Attributes:
        temperature: of the sampling; with another than 1 not every server's logprobs can be trained on.
        max_tokens: of one model call; None is what the context leaves.
        max_steps: model calls until the rollout ends without an answer.
        system_prompt: instead of the default one; an empty text sends none.
        tool_delay_s: wait so long after the tools of a turn.
        working_dir: where the tools act; None gives each task a fresh folder. Two tasks at once cannot share one.
        tool_time_limit_s: of a tool call, for tools without a limit of their own.
        turn_time_limit_s: of a model call, its retries for faulty tool calls included.
        rollout_time_limit_s: of the whole rollout.
        max_tool_call_retries: how often in a row an answer whose tool calls are all faulty is sent back.
        sampling: further sampling parameters (``top_p``, ``seed``, ``train_skewed``, …).

    Raises:
        ConfigurationError: a count or a limit that is not a positive number, or a temperature below 0.
    """

    temperature: float | None = 1.0
    max_tokens: int | None = None
    max_steps: int = 50
    system_prompt: str | None = None
    tool_delay_s: float = 0.0
    working_dir: str | Path | None = None
    tool_time_limit_s: float | None = None
    turn_time_limit_s: float | None = None
    rollout_time_limit_s: float | None = None
    max_tool_call_retries: int = 3
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_steps", "tool_time_limit_s", "turn_time_limit_s", "rollout_time_limit_s"):
            value, needed = getattr(self, name), name == "max_steps"
            fits = (value is None and not needed) or (is_number(value, whole=not name.endswith("_s")) and value > 0)
            if not fits:
                raise ConfigurationError(f"{name}={value!r}: give a positive number{'' if needed else ' or None'}")
        for name in ("tool_delay_s", "max_tool_call_retries"):
            value = getattr(self, name)
            if not (is_number(value, whole=name != "tool_delay_s") and value >= 0):
                raise ConfigurationError(f"{name}={value!r}: give 0 or more")
        if self.temperature is not None and not (is_number(self.temperature) and self.temperature >= 0):
            raise ConfigurationError(f"temperature={self.temperature!r}: give 0 or more, or None")

    @property
    def sampling_parameters(self) -> dict[str, Any]:
        """What is sent with each model call."""
        known = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in known.items() if value is not None} | dict(self.sampling)


class AtroposAgent:
    """Asks the model, runs the tools that it calls, shows it their results, until it answers without a call.

    One agent serves any number of rollouts at once.

    Args:
        server: an atroposlib ``ServerManager``, ``APIServer`` or managed server.
        tools: a registry, or functions and objects for one; None is an agent that only talks.
        config: how it works.
        tokenizer: a Hugging Face tokenizer, or the name or path of one; by default the server's own.
        execute_tool: called with each ``ToolCall`` in place of the tool, asynchronous or not; may return a
            ``ToolResult``. Limits, order and checks stay the same.
        base_url, model: where a server is looked for when none is given.
        tool_format: how the model writes tool calls; ``auto`` finds out from the chat template.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        vocab_size: how many ids the served model has, where that is more than the tokenizer knows.

    Attributes:
        last_result: of the ``run`` that ended last, also of one that was cancelled.

    Raises:
        NoServerError, UnsupportedServerError, NoTokenizerError, ChatTemplateError: the model cannot be reached so.
        ToolDefinitionError: a registry without tools, or a tool that cannot be described.
    """

    def __init__(
        self,
        server: Any = None,
        tools: ToolRegistry | Iterable[Any] | None = None,
        config: AgentConfig | None = None,
        tokenizer: Any = None,
        execute_tool: Callable[[ToolCall], Any] | None = None,
        *,
        base_url: str | None = None,
        model: str | None = None,
        tool_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.config = config or AgentConfig()
        self.tools = tools if isinstance(tools, ToolRegistry) else ToolRegistry(tools or ())
        if tools is not None and not self.tools:
            raise ToolDefinitionError(
                "the registry has no tools: register some, or pass tools=None for an agent without"
            )
        self.execute_tool = execute_tool
        self.last_result: AgentResult | None = None
        self._backend = resolve(
            server,
            tokenizer=tokenizer,
            base_url=base_url,
            model=model,
            tool_format=tool_format,
            chat_template_kwargs=chat_template_kwargs,
            vocab_size=vocab_size,
        )

    @property
    def system_prompt(self) -> str:
        """What the agent tells the model of its work: ``AgentConfig.system_prompt``, or a default, empty without tools.

        The default says how to work, how to write calls, what the tools' descriptions leave out, and shows worked
        examples; calls are explained and shown in the ``hermes`` format only. The tools' own schemas are not in it: the
        chat template lists them, or the renderer where the template cannot.
        """
        if self.config.system_prompt is not None:
            return self.config.system_prompt
        if not self.tools:
            return ""
        renderer = getattr(self._backend, "renderer", None)
        calls, examples = "", ""
        if getattr(renderer, "tool_format", "hermes") == "hermes":
            calls, examples = CALLS.format(schema=json.dumps(call_schema())), EXAMPLES
        return "\n\n".join(filter(None, [WORK, calls, self.tools.notes, examples]))

    async def run(self, task: str, initial_messages: Sequence[Mapping[str, Any]] | None = None) -> AgentResult:
        """Work on ``task`` until the model answers, in a task of its own; see ``AgentTask.run``."""
        async with self.task() as opened:
            return await opened.run(task, conversation_history=initial_messages)

    async def run_single_turn(
        self, messages: Sequence[Mapping[str, Any]], execute_tools: bool = True
    ) -> tuple[str, list[ToolResult], SequenceData | None]:
        """One model call and its tools, in a task of their own; see ``AgentTask.run_single_turn``."""
        async with self.task() as opened:
            return await opened.run_single_turn(messages, execute_tools)

    def task(
        self,
        task_id: str | None = None,
        *,
        workspace: str | Path | None = None,
        copy: bool = False,
        keep_processes: bool = False,
        sandbox: str = "folder",
        **wall: Unpack[WallArguments],
    ) -> harness.OpenedTask[AgentTask]:
        """What a rollout and its verifier share; its sandbox, where the tools have one, is released at the end.

        In a script, ``with agent.task(…) as task`` gives one whose methods wait (:class:`harness.BlockingTask`).

        Args:
            task_id: a new name by default.
            workspace: the folder in which the tools act, used as it is; ``working_dir`` by default, else a fresh one.
            copy: act in a copy of ``workspace``.
            keep_processes, sandbox, wall: as for ``AtroposAIAgent.task``.

        Raises:
            WorkspaceError: ``workspace`` is not a folder, or another open task acts in it.
            SandboxError: a task of this name is open, or no sandbox can be opened.
        """
        folder = workspace or self.config.working_dir
        tools = self.tools.task(task_id, workspace=folder, copy=copy, sandbox=sandbox, **wall)
        return harness.OpenedTask(self._task(tools, keep_processes))

    @contextlib.asynccontextmanager
    async def _task(
        self, tools: contextlib.AbstractAsyncContextManager[ToolTask], keep_processes: bool
    ) -> AsyncIterator[AgentTask]:
        async with tools as opened:
            retries = self.config.max_tool_call_retries
            conversation = Conversation(self._backend.fresh(), max_tool_call_retries=retries)
            yield AgentTask(self, opened, conversation, keep_processes=keep_processes)


class AgentTask(harness.Task):
    """A rollout of an ``AtroposAgent``, for the length of ``async with agent.task(…)``."""

    trajectory: AgentResult | None = None

    def __init__(
        self, agent: AtroposAgent, tools: ToolTask, conversation: Conversation, *, keep_processes: bool
    ) -> None:
        super().__init__(keep_processes=keep_processes)
        self._agent = agent
        self._tools = tools
        self._conversation = conversation
        self._results: dict[str, ToolResult] = {}
        self._said: dict[str, list[Message]] = {}

    @property
    def task_id(self) -> str:
        return self._tools.task_id

    @property
    def sandbox(self) -> Sandbox:
        return self._tools.require_sandbox()

    async def run(
        self,
        user_message: str,
        system_message: str | None = None,
        *,
        conversation_history: Sequence[Mapping[str, Any]] | None = None,
        initial_messages: Sequence[Mapping[str, Any]] | None = None,
    ) -> AgentResult:
        """Work on ``user_message`` until the model answers without a call, or something ends it.

        Several runs of one task are one rollout: pass ``conversation_history=result.messages`` to go on where the last
        one ended, with its tokens.

        Args:
            user_message: what the user asks; empty if ``conversation_history`` already ends with it.
            system_message: in place of the agent's own system prompt.
            conversation_history: OpenAI messages before it. A system message at their head stands in for the agent's
                own.
            initial_messages: another name of ``conversation_history``.

        Returns:
            The result, also of a rollout that failed: with its messages, its tokens, ``stop_reason`` and ``error``.
        """
        if not isinstance(system_message, str | None):
            raise TypeError("system_message is a text: pass messages as conversation_history=")
        messages = self._opening(user_message, system_message, conversation_history or initial_messages)
        self._conversation.messages = list(messages)  # those of a former run are over
        reason, answer, error = StopReason.ERROR, "", None
        limit = self._agent.config.rollout_time_limit_s
        timer = asyncio.timeout(limit)
        try:
            async with timer:
                reason, answer = await self._loop(messages)
                error = ERRORS.get(reason, "").format(self._agent.config) or None
        except asyncio.CancelledError:
            reason, error = StopReason.CANCELLED, "the rollout was cancelled"
            raise
        except Exception as failure:
            reason = stop_reason_of(failure)
            error = f"no answer within rollout_time_limit_s={limit:g}" if timer.expired() else self._describe(failure)
            logger.warning("the rollout %s failed: %s", self.task_id, error, exc_info=reason is StopReason.ERROR)
        finally:
            result = self._result(messages, reason, answer, error)
            self._agent.last_result = self.trajectory = result
        return result

    async def _loop(self, messages: list[Message]) -> tuple[StopReason, str]:
        for _ in range(self._agent.config.max_steps):
            turn = await self._ask(messages)
            if not turn.calls:
                return ending(turn), turn.content or turn.reasoning or ""
            await self._act(turn, messages)
            await asyncio.sleep(self._agent.config.tool_delay_s)
        return StopReason.ITERATION_LIMIT, ""

    async def _ask(self, messages: list[Message]) -> ModelTurn:
        """One answer, appended to the messages."""
        config = self._agent.config
        try:
            async with asyncio.timeout(config.turn_time_limit_s) as timer:
                turn = await self._conversation.chat(
                    messages, self._agent.tools.definitions, **config.sampling_parameters
                )
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise BackendTimeoutError(f"no answer within turn_time_limit_s={config.turn_time_limit_s:g}") from error
        messages.append(dict(self._conversation.messages[-1]))
        return turn

    async def _act(self, turn: ModelTurn, messages: list[Message]) -> list[ToolResult]:
        """Run a turn's valid calls and append their results; the conversation itself answers the others."""
        results = await self._agent.tools.execute_all(
            [call for call in turn.calls if call.ok],
            task_id=self.task_id,
            time_limit_s=self._agent.config.tool_time_limit_s,
            execute_tool=self._agent.execute_tool,
        )
        self._results |= {result.call_id: result for result in results}
        messages += [result.to_message() for result in results]
        return results

    async def run_single_turn(
        self, messages: Sequence[Mapping[str, Any]], execute_tools: bool = True
    ) -> tuple[str, list[ToolResult], SequenceData | None]:
        """One model call on ``messages`` as they are, without a system prompt of the agent's.

        Args:
            messages: OpenAI messages. Append the returned text as an assistant message and the results'
                ``to_message()`` for the next turn of the same task: it goes on token by token.
            execute_tools: run the tools that the turn calls.

        Returns:
            The text, tool calls as the model wrote them; the results; the sequence up to the end of this turn, or None
            where nothing is tracked.

        Raises:
            BackendError, TokenFidelityError, ToolCallRetriesError: there is no answer.
        """
        conversation = self._recognised(messages)
        turn = await self._ask(conversation)
        text = as_text(turn)
        self._said.setdefault(text, []).append(conversation[-1])
        results = await self._act(turn, conversation) if execute_tools and turn.calls else []
        return text, results, self._result(conversation, ending(turn), "", None).trajectory_data

    def _recognised(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with this task's own turns in place of their texts, so that their tokens go on."""
        turns = {text: iter(said) for text, said in self._said.items()}
        recognised = []
        for message in messages:
            same = turns.get(str(message.get("content"))) if message["role"] == "assistant" else None
            recognised.append(dict(next(same or iter(()), message)))
        return recognised

    def _opening(
        self, user_message: str, system_message: str | None, history: Sequence[Mapping[str, Any]] | None
    ) -> list[Message]:
        messages = [dict(message) for message in history or ()]
        if self._conversation.steps:  # the conversation itself puts its retries back into each prompt
            messages = Conversation.contract(messages)
        prompt = self._agent.system_prompt if system_message is None else system_message
        if prompt and not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": prompt})
        if user_message:
            messages.append({"role": "user", "content": user_message})
        return messages

    def _result(self, messages: list[Message], reason: StopReason, answer: str, error: str | None) -> AgentResult:
        agent, whole = self._agent, self._conversation.expand(messages)
        # Where a call failed, the conversation also has the attempts that never became an answer.
        whole = max(whole, self._conversation.messages, key=len)
        result = self._conversation.result(
            whole,
            reason,
            final_response=answer,
            error=error,
            tools=agent.tools.definitions,
            sampling=agent.config.sampling_parameters,
            metadata={"task_id": self.task_id},
        )
        for step in result.steps:
            step.tool_results = [self._results.get(found.call_id, found) for found in step.tool_results]
        return result

    def _describe(self, failure: Exception) -> str:
        status = getattr(failure, "status", None)
        http = "" if status is None else f" (HTTP {status}: {(getattr(failure, 'body', None) or '')[:500]})"
        return redact(f"step {len(self._conversation.steps)}: {type(failure).__name__}: {failure}{http}")


#: What to say of rollouts that ended without an answer and without a failure.
ERRORS = {
    StopReason.ITERATION_LIMIT: "no answer within max_steps={0.max_steps}",
    StopReason.TRUNCATED: "the answer was cut off: max_tokens={0.max_tokens}",
    StopReason.EMPTY_RESPONSE: "the model's answer is empty",
}


def ending(turn: ModelTurn) -> StopReason:
    """What an answer without calls ends the rollout with."""
    if turn.finish_reason == "length":
        return StopReason.TRUNCATED
    return StopReason.COMPLETED if turn.content or turn.reasoning else StopReason.EMPTY_RESPONSE


def as_text(turn: ModelTurn) -> str:
    """What the model said, thinking and calls in tags, without special tokens."""
    thinking = f"<think>\n{turn.reasoning}\n</think>" if turn.reasoning else None
    calls = [tool_call_block(call.name, call.arguments) if call.format == "openai" else call.raw for call in turn.calls]
    return "\n".join(filter(None, [thinking, turn.content, *calls]))


WORK = """\
You work on the user's task by calling tools, and answer once it is done.

# How to work

1. Think first, between <think> and </think>: what you know, what you still have to find out, and what to do next.
2. Then call one or more tools, and write nothing after the calls: their results come in the next message. Never guess
   them.
3. Read the results, think again, and go on until the task is done and you have checked that it is.
4. Then write your answer without any call. A message without a call ends the work."""

CALLS = """\
# How to write a call

A call is one JSON object between <tool_call> and </tool_call>, and fits this schema:
{schema}
"name" is a tool's name, and "arguments" fit that tool's own schema. Write valid JSON: double quotes, no comments, line
breaks within strings as \\n. Put several calls into one message, each between its own tags, only where none needs the
result of another."""

EXAMPLES = """\
# Examples

The tools in these examples show the form; call only the tools that you have.

One call, and the answer once its result is there:

User: How many lines does notes.txt have?
You: <think>
wc counts them.
</think>
<tool_call>
{"name": "terminal", "arguments": {"command": "wc -l < notes.txt"}}
</tool_call>
Result: {"output": "12", "exit_code": 0, "error": null}
You: notes.txt has 12 lines.

Steps that need each other's results, one after the other:

User: Make the failing test pass.
You: <think>
I don't know yet which one fails.
</think>
<tool_call>
{"name": "terminal", "arguments": {"command": "python -m pytest -q 2>&1 | tail -20"}}
</tool_call>
Result: {"output": "test_add: assert add(1, 2) == 3, got -1\\n1 failed", "exit_code": 1, "error": null}
You: <think>
add subtracts. I look at it before I change it.
</think>
<tool_call>
{"name": "terminal", "arguments": {"command": "grep -n 'def add' -A 3 calc.py"}}
</tool_call>

Two calls that don't need each other, in one message:

User: Which versions of Python and git are installed?
You: <think>
Two questions that don't depend on each other.
</think>
<tool_call>
{"name": "terminal", "arguments": {"command": "python --version"}}
</tool_call>
<tool_call>
{"name": "terminal", "arguments": {"command": "git --version"}}
</tool_call>"""
