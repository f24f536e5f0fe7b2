"""``AtroposAIAgent``: Hermes' agent, whose model calls go to an Atropos server and come back with token ids.

Toolsets, callbacks, sessions, interrupts, trajectory saving and the loop itself are Hermes' own (`run_agent.AIAgent`).
What differs is in :mod:`hermes_atropos.hermes.hooks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from hermes_atropos.hermes.versions import check_versions

check_versions()

# hermes-agent is imported only once its version is known to fit.
from tools.environments.base import set_activity_callback

from hermes_atropos import harness
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.hooks import HERMES_PARAMETERS, HERMES_ROUTES, Hooks
from hermes_atropos.hermes.result import conversation_of, finished, history_of, stop_reason, without_system
from hermes_atropos.hermes.rollout import Rollout, interrupting_first
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.hermes.tools import check_toolsets
from hermes_atropos.runtime import check_not_on, home_loop, portal_loop, run_in_rollout_thread, run_to_end, turnstile
from hermes_atropos.trajectory import AgentResult, StopReason
from hermes_atropos.values import is_number

__all__ = ["AtroposAIAgent", "Task"]

logger = logging.getLogger(__name__)

#: What may be given to the constructor and is sent with each model call, beside ``temperature`` and ``max_tokens``.
SAMPLING_PARAMETERS = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "top_k",
        "top_p",
    }
)


class AtroposAIAgent(Hooks):
    """Hermes' agent on an atroposlib server. Every argument and method of ``AIAgent`` works as in Hermes.

    One object may run many conversations at once, from any number of threads and event loops: a call made while another
    is under way gets an agent of its own with the same configuration.

    Args:
        args, options: as for ``AIAgent``; arguments that choose a provider are not used. ``tool_delay`` is 0 by
            default.
        server: an atroposlib ``ServerManager``, ``APIServer`` or managed server.
        tokenizer: a Hugging Face tokenizer, or the name or path of one; by default the server's own.
        temperature, max_tokens: of each model call; None leaves them to the server.
        tool_format: how the model writes tool calls; ``auto`` finds out from the chat template.
        max_tool_call_retries: how often in a row a faulty tool call is sent back to the model.
        options: beside Hermes' arguments also sampling parameters (``top_p``, ``top_k``, ``seed``, …). Without
            ``server``, ``base_url`` and ``model`` say where to find one.

    Raises:
        NoServerError, UnsupportedServerError, NoTokenizerError, ChatTemplateError: the model cannot be reached so.
        UnknownToolsetError: a toolset that Hermes does not have.
        ConfigurationError: ``max_tool_call_retries`` is not a count.
        UnsupportedVersionError: this release of Hermes lacks something that the library leans on.
        TypeError: an argument that neither Hermes nor this class knows.
    """

    def __init__(
        self,
        *args: Any,
        server: Any = None,
        tokenizer: Any = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tool_format: str = "auto",
        max_tool_call_retries: int = 3,
        **options: Any,
    ) -> None:
        seams.check()
        options.update(zip(list(HERMES_PARAMETERS)[1:], args, strict=False))
        given = {"temperature": temperature, "max_tokens": max_tokens}
        given |= {name: options.pop(name, None) for name in SAMPLING_PARAMETERS}
        routes = {name: options.pop(name, None) for name in HERMES_ROUTES}
        for which in ("enabled_toolsets", "disabled_toolsets"):
            check_toolsets(options.get(which) or [])
        if not (is_number(max_tool_call_retries, whole=True) and max_tool_call_retries >= 0):
            raise ConfigurationError(f"max_tool_call_retries={max_tool_call_retries!r}: give 0 or more")
        self._backend = resolve(
            server,
            tokenizer=tokenizer,
            base_url=routes["base_url"],
            api_key=routes["api_key"],
            model=options.get("model") or None,
            tool_format=tool_format,
        )
        options["model"] = options.get("model") or model_name(self._backend.server)
        self._setup(options, {name: value for name, value in given.items() if value is not None}, max_tool_call_retries)

    def _setup(self, options: dict[str, Any], sampling: dict[str, Any], max_tool_call_retries: int) -> None:
        self._options = options
        self._busy = threading.Lock()
        self._running: set[AtroposAIAgent] = set()
        self.last_result: dict[str, Any] | None = None
        rollout = Rollout.on(self._backend, None, max_tool_call_retries=max_tool_call_retries)
        self._construct(rollout, options, sampling, max_tool_call_retries)

    def _copy(self) -> AtroposAIAgent:
        """An agent of the same configuration, for a conversation of its own."""
        twin = object.__new__(AtroposAIAgent)
        twin._backend = self._backend
        options = {**self._options, "session_id": None} if "session_id" in self._options else dict(self._options)
        twin._setup(options, self._sampling, self._max_tool_call_retries)
        for name in HERMES_PARAMETERS.keys() - HERMES_ROUTES - {"session_id", "iteration_budget"}:
            if name in vars(self):  # it may have been set since
                setattr(twin, name, getattr(self, name))
        return twin

    # Running

    def run_conversation(
        self,
        user_message: Any,
        system_message: str | None = None,
        conversation_history: list[dict[str, Any]] | None = None,
        task_id: str | None = None,
        *args: Any,
        **options: Any,
    ) -> dict[str, Any]:
        """Run the agent on ``user_message`` and wait for it.

        Safe in any thread, also in one in which an event loop runs, unless that loop serves the model.

        Args:
            task_id: gives the run a shell of its own in the current folder, closed at its end; None leaves the terminal
                as Hermes has it: one shell for the process.
            args, options: as for ``AIAgent.run_conversation``.

        Returns:
            Hermes' dict and, beside it: ``trajectory`` (an ``AgentResult``), ``managed_state`` (``nodes``: an
            atroposlib ``SequenceNode`` a sequence), ``stop_reason``, ``system_prompt``, ``task_id``. Where a model call
            failed, ``error`` tells why, ``cause`` is the exception, and everything up to then is kept.

        Raises:
            BlockingCallError: this thread runs the event loop that serves the model.
        """
        check_not_on(home_loop(self._backend.server, portal_loop()), instead="await agent.run_conversation_async(...)")
        request = (user_message, system_message, history_of(conversation_history), task_id, *args)
        with self._claimed() as agent:
            sandbox = HermesSandbox(task_id, Path.cwd(), private=False) if task_id else None
            rollout = agent._new_rollout(sandbox)
            try:
                with interrupting_first(functools.partial(Hooks.interrupt, agent)):
                    return agent._run(rollout, request, options)
            finally:
                if sandbox is not None:
                    sandbox.release()

    async def run_conversation_async(
        self,
        user_message: Any,
        system_message: str | None = None,
        conversation_history: list[dict[str, Any]] | None = None,
        task_id: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """:meth:`run_conversation` for event loops: Hermes runs on a thread, the model calls on the server's loop.

        The run has a shell of its own in the current folder; :meth:`task` gives it a folder of its own as well. When
        the await is cancelled, the model request, the tool and the thread end before it does.
        """
        task_id = task_id or f"run-{uuid.uuid4().hex[:12]}"
        request = (user_message, system_message, history_of(conversation_history), task_id)
        async with self._opened(lambda: HermesSandbox(task_id, Path.cwd(), private=False)) as (agent, rollout):
            return await agent._run_async(rollout, request, options)

    def chat(self, message: str, stream_callback: Any = None) -> str:
        """The final response to ``message``; see :meth:`run_conversation`."""
        return str(self.run_conversation(message, stream_callback=stream_callback)["final_response"] or "")

    async def chat_async(self, message: str, stream_callback: Any = None) -> str:
        """The final response to ``message``; see :meth:`run_conversation_async`."""
        result = await self.run_conversation_async(message, stream_callback=stream_callback)
        return str(result["final_response"] or "")

    def task(
        self, task_id: str | None = None, *, workspace: str | os.PathLike[str] | None = None, copy: bool = False
    ) -> harness.OpenedTask[Task]:
        """A rollout in a sandbox of its own, which the verifier sees before it is released.

        ::

            async with agent.task("fix-17", workspace=repo) as task:
                result = await task.run("Make the tests pass.")
                check = await task.terminal("pytest -q")

        In a script, ``with agent.task(…) as task`` gives one whose methods wait (:class:`harness.BlockingTask`).

        Args:
            task_id: names the rollout; a new name by default.
            workspace: the folder in which the tools act, used as it is; None makes a fresh one, removed at the end.
            copy: act in a copy of ``workspace``, removed at the end.

        Raises:
            WorkspaceError: ``workspace`` is not a folder, or another open task acts in it.
            SandboxError: a task of this name is open.
        """
        return harness.OpenedTask(self._task(lambda: HermesSandbox(task_id, workspace, copy=copy)))

    @contextlib.asynccontextmanager
    async def _task(self, open_sandbox: Callable[[], HermesSandbox]) -> AsyncIterator[Task]:
        # A copy in any case: what Hermes keeps on its agent, a list of todos say, belongs to one rollout.
        async with self._opened(open_sandbox, copied=True) as (agent, rollout):
            yield Task(agent, rollout)

    @contextlib.asynccontextmanager
    async def _opened(
        self, open_sandbox: Callable[[], HermesSandbox], *, copied: bool = False
    ) -> AsyncIterator[tuple[AtroposAIAgent, Rollout]]:
        """An agent and a rollout in a sandbox that is released at the end of the block, whatever ends it."""
        held = contextlib.ExitStack()

        def open_() -> tuple[AtroposAIAgent, Rollout]:
            sandbox = open_sandbox()
            held.callback(sandbox.release)
            with turnstile.inside():
                agent = held.enter_context(self._claimed(copied=copied))
                return agent, agent._new_rollout(sandbox)

        try:
            agent, rollout = await run_in_rollout_thread(open_)
            yield agent, rollout
        finally:
            await run_to_end(held.close)

    @contextlib.contextmanager
    def _claimed(self, *, copied: bool = False) -> Iterator[AtroposAIAgent]:
        """This agent if no conversation runs on it, else a copy, for the length of the block."""
        own = not copied and self._busy.acquire(blocking=False)
        agent = self if own else self._copy()
        self._running.add(agent)
        try:
            yield agent
        finally:
            self._running.discard(agent)
            self.last_result = agent.last_result or self.last_result
            if own:
                self._busy.release()

    def _new_rollout(self, sandbox: HermesSandbox | None) -> Rollout:
        return Rollout.on(self._backend, sandbox, max_tool_call_retries=self._max_tool_call_retries)

    async def _run_async(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        home_loop(self._backend.server, asyncio.get_running_loop())

        def stop() -> None:
            rollout.cancelled = True
            super(AtroposAIAgent, self).interrupt()

        def run() -> dict[str, Any]:
            with turnstile.inside():
                return self._run(rollout, request, options)

        return await run_in_rollout_thread(run, stop=stop)

    def _run(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """Hermes' loop, on the calling thread. Whatever ends it, ``last_result`` holds what there is."""
        self._rollout = rollout
        self._saved = False
        rollout.failure = rollout.signal = rollout.last_turn = None
        with contextlib.ExitStack() as entered:
            entered.enter_context(seams.acting_for(self))
            if rollout.sandbox is not None:
                entered.enter_context(rollout.sandbox.entered())
                request = (*request[:3], rollout.sandbox.hermes_id, *request[4:])
            result: dict[str, Any] = {}
            try:
                result = super().run_conversation(*request, **options)
            except Exception as error:
                logger.exception("the rollout failed outside a model call")
                rollout.failure = rollout.failure or error
            except BaseException as error:  # Ctrl-C: nothing may run on
                rollout.failure = error
                super().interrupt()
                raise
            finally:
                self.last_result = self._finish(result, rollout, request)
                self.clear_interrupt()  # one that came too late is not meant for the next conversation
                set_activity_callback(None)  # Hermes leaves the agent, and all it knows, with the thread
        return self.last_result

    def _finish(self, result: dict[str, Any], rollout: Rollout, request: tuple[Any, ...]) -> dict[str, Any]:
        """Hermes' result with what this library adds; a failed run gets the saving that Hermes skips."""
        reason = stop_reason(result, rollout, self.max_iterations)
        messages = conversation_of(result, rollout, reason)
        if self.save_trajectories and not self._saved:
            completed = reason is StopReason.COMPLETED
            super(Hooks, self)._save_trajectory(without_system(messages), str(request[0]), completed)
        return finished(
            result,
            rollout,
            reason=reason,
            messages=messages,
            tools=list(self.tools or []),
            sampling=self._sampling,
            task_id=self._current_task_id if rollout.sandbox is None else rollout.sandbox.task_id,
        )

    def interrupt(self, message: str | None = None, *args: Any, **options: Any) -> Any:
        """Stop this agent's conversations: the model requests, the tools and the subagents under way."""
        for other in self._running - {self}:
            Hooks.interrupt(other, message, *args, **options)
        return super().interrupt(message, *args, **options)

    def steer(self, text: str, *args: Any, **options: Any) -> bool:
        """Add ``text`` to the next tool result of each conversation under way."""
        others = [agent.steer(text, *args, **options) for agent in self._running - {self}]
        return super().steer(text, *args, **options) or any(others)


class Task(harness.Task):
    """A rollout of an ``AtroposAIAgent`` in its sandbox, for the length of ``async with agent.task(…)``."""

    def __init__(self, agent: AtroposAIAgent, rollout: Rollout) -> None:
        self._agent = agent
        self._rollout = rollout
        self._turns = asyncio.Lock()

    @property
    def sandbox(self) -> HermesSandbox:
        assert self._rollout.sandbox is not None
        return self._rollout.sandbox

    @property
    def task_id(self) -> str:
        return self.sandbox.task_id

    @property
    def last_result(self) -> dict[str, Any] | None:
        """What the last run left, also if it was cancelled; None before the first."""
        return self._agent.last_result

    @property
    def trajectory(self) -> AgentResult | None:
        return None if self.last_result is None else self.last_result["trajectory"]

    async def run(
        self, user_message: Any, system_message: str | None = None, *, conversation_history: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Run the agent on ``user_message``; see :meth:`AtroposAIAgent.run_conversation`.

        Several runs of one task are one rollout. Pass ``conversation_history=result["messages"]`` to go on where the
        last run ended: its tokens go on too.
        """
        request = (user_message, system_message, history_of(conversation_history), self.task_id)
        async with self._turns:  # runs of one task are one after the other, as its tokens are
            return await self._agent._run_async(self._rollout, request, options)


def model_name(server: Any) -> str:
    """The name under which the server knows its model."""
    first = next(iter(getattr(server, "servers", [server])), server)
    return getattr(getattr(first, "config", None), "model_name", None) or "local"
