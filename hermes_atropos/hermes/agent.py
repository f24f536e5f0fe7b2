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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from hermes_atropos.hermes.versions import check_versions, import_hermes

check_versions()  # hermes-agent is imported only once its version is known to fit
import_hermes()

from tools.environments.base import set_activity_callback

from hermes_atropos import harness
from hermes_atropos.backends import servers_of
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.acting import acting_for
from hermes_atropos.hermes.books import Books, books_of
from hermes_atropos.hermes.context import ContextLength
from hermes_atropos.hermes.hooks import HERMES_PARAMETERS, HERMES_ROUTES, Hooks
from hermes_atropos.hermes.requests import add_configured, connect, route_to, serving, warn_of_unused, without
from hermes_atropos.hermes.result import conversation_of, finished, history_of, stop_reason
from hermes_atropos.hermes.rollout import Rollout, interrupting_first
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.hermes.tools import check_toolsets
from hermes_atropos.hermes.walled import open_sandbox
from hermes_atropos.runtime import check_not_on, home_loop, portal_loop, run_in_rollout_thread, run_to_end, turnstile
from hermes_atropos.sandbox.wall import WallArguments
from hermes_atropos.servers.sampling import COMMON
from hermes_atropos.trajectory import AgentResult, StopReason
from hermes_atropos.values import is_number

__all__ = ["AtroposAIAgent", "Task"]

logger = logging.getLogger(__name__)

#: What may be given to the constructor and is sent with each model call, beside ``temperature`` and ``max_tokens``.
SAMPLING_PARAMETERS = (COMMON | {"train_skewed"}) - {"temperature", "max_tokens", "n", "ignore_eos", "stop_token_ids"}

#: What programs set on an agent of how it prints, beside its parameters.
HERMES_OUTPUT = frozenset({"_print_fn", "suppress_status_output"})


class AtroposAIAgent(Hooks):
    """Hermes' agent on an atroposlib server. Every argument and method of ``AIAgent`` works as in Hermes.

    One object may run many conversations at once, from any number of threads and event loops: a call made while another
    is under way gets an agent of its own with the same configuration.

    Args:
        args, options: as for ``AIAgent``; arguments that choose a provider are not used. ``tool_delay`` is 0 by
            default.
        server: an atroposlib ``ServerManager``, ``APIServer`` or managed server.
        tokenizer: a Hugging Face tokenizer, or the name or path of one; by default the server's own.
        temperature, max_tokens: of each model call; by default 1 and what the context leaves.
        tool_format: how the model writes tool calls; ``auto`` finds out from the chat template.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        vocab_size: how many ids the served model has, where that is more than the tokenizer knows.
        max_tool_call_retries: how often in a row a faulty tool call is sent back to the model.
        context_length: tokens that the model can read; None takes what Hermes' configuration says, else the server.
        options: beside Hermes' arguments also sampling parameters (``top_p``, ``top_k``, ``seed``, …). Without
            ``server``, ``base_url`` and ``model`` say where to find one.

    Raises:
        NoServerError, UnsupportedServerError, NoTokenizerError, ChatTemplateError: the model cannot be reached so.
        UnknownToolsetError: a toolset that Hermes does not have.
        ConfigurationError: ``max_tool_call_retries`` or ``context_length`` is not a count.
        UnsupportedVersionError: this release of Hermes lacks something that the library leans on.
        TypeError: an argument that neither Hermes nor this class knows.
    """

    last_result: dict[str, Any] | None = None
    _where: Mapping[str, Any] | None = None

    def __init__(
        self,
        *args: Any,
        server: Any = None,
        tokenizer: Any = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tool_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        max_tool_call_retries: int = 3,
        context_length: int | None = None,
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
        if context_length is not None and not (is_number(context_length, whole=True) and context_length > 0):
            raise ConfigurationError(f"context_length={context_length!r}: give a number of tokens")
        sampling = {name: value for name, value in given.items() if value is not None}
        options["request_overrides"] = without(options.get("request_overrides"), sampling)
        self._where = {
            "server": server,
            "base_url": routes["base_url"],
            "api_key": routes["api_key"],
            "provider": routes["provider"],
            "model": options.get("model") or None,
            "tokenizer": tokenizer,
            "tool_format": tool_format,
            "vocab_size": vocab_size,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        self._backend = connect(options, {**self._where, "context_length": context_length})
        self._route = route_to(self._where, self._backend)
        warn_of_unused({**routes, **options}, tracked=self._backend.tracks_tokens)
        options["model"] = options.get("model") or model_name(self._served.server)
        self._sampling, self._max_tool_call_retries = sampling, max_tool_call_retries
        self._construct(options, context_length)
        if self._backend.tracks_tokens:
            add_configured(self, self._where)

    def _construct(self, options: Mapping[str, Any], context_length: int | None) -> None:
        self._options = options
        self._busy = threading.Lock()
        self._running: set[AtroposAIAgent] = set()
        super()._construct(options, context_length)

    def _copy(self) -> AtroposAIAgent:
        """An agent of the same configuration, for a conversation of its own."""
        twin = object.__new__(type(self))
        twin._construct_as(self, {**self._options, "session_id": None})
        for name in (HERMES_PARAMETERS.keys() | HERMES_OUTPUT) - HERMES_ROUTES - {"session_id", "iteration_budget"}:
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
        check_not_on(home_loop(self._served.server, portal_loop()), instead="await agent.run_conversation_async(...)")
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
        self,
        task_id: str | None = None,
        *,
        workspace: str | os.PathLike[str] | None = None,
        copy: bool = False,
        keep_processes: bool = False,
        sandbox: str = "folder",
        **wall: Unpack[WallArguments],
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
            keep_processes: what the model left running goes on while the verifier looks, a server that it is to test
                say; by default it is ended before.
            sandbox: ``walled`` keeps this machine from what the model runs; ``folder`` only tidies up after it.
            wall: what a wall lets through: ``mounts``, ``env``, ``network``, ``outside``
                (:class:`hermes_atropos.sandbox.wall.WallOptions`).

        Raises:
            WorkspaceError: ``workspace`` is not a folder, or another open task acts in it.
            SandboxUnavailableError: this machine can't have the wall.
            ConfigurationError: the wall can't be as it is asked for, or the agent has tools that act outside it.
            SandboxError: a task of this name is open.
        """
        tools = [tool["function"]["name"] for tool in self.tools or []]
        opened = functools.partial(open_sandbox, task_id, workspace, copy=copy, tools=tools, sandbox=sandbox, **wall)
        return harness.OpenedTask(self._task(opened, keep_processes))

    @contextlib.asynccontextmanager
    async def _task(self, open_sandbox: Callable[[], HermesSandbox], keep_processes: bool) -> AsyncIterator[Task]:
        # A copy in any case: what Hermes keeps on its agent, a list of todos say, belongs to one rollout.
        async with self._opened(open_sandbox, copied=True) as (agent, rollout):
            yield Task(agent, rollout, keep_processes=keep_processes)

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
        return Rollout.on(self._served, sandbox, max_tool_call_retries=self._max_tool_call_retries)

    async def _run_async(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        home_loop(self._served.server, asyncio.get_running_loop())

        def stop() -> None:
            rollout.cancelled = True
            super(AtroposAIAgent, self).interrupt()

        def run() -> dict[str, Any]:
            with turnstile.inside():
                return self._run(rollout, request, options)

        return await run_in_rollout_thread(run, stop=stop)

    def _run(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """Hermes' loop, on the calling thread. Whatever ends it, ``last_result`` holds what there is."""
        self._rollout, self._books = rollout, Books(self)
        self._saved = False
        rollout.failure = rollout.signal = rollout.last_turn = None
        rollout.retried = 0
        with contextlib.ExitStack() as entered:
            entered.enter_context(acting_for(self))
            self._context.correct(self)
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
                self._settle()
                self.last_result = self._finish(result, rollout, request)
                self._rollout = None
                self.clear_interrupt()  # one that came too late is not meant for the next conversation
                set_activity_callback(None)  # Hermes leaves the agent, and all it knows, with the thread
        return self.last_result

    def _finish(self, result: dict[str, Any], rollout: Rollout, request: tuple[Any, ...]) -> dict[str, Any]:
        """Hermes' result with what this library adds; a failed run gets the saving that Hermes skips."""
        reason = stop_reason(result, rollout, self.max_iterations)
        messages = conversation_of(result, rollout, reason)
        if self.save_trajectories and not self._saved:
            completed = reason is StopReason.COMPLETED
            super(Hooks, self)._save_trajectory(messages, str(request[0]), completed)
        return finished(
            result,
            rollout,
            reason=reason,
            messages=messages,
            tools=list(self.tools or []),
            counts=books_of(self),
            task_id=self._current_task_id if rollout.sandbox is None else rollout.sandbox.task_id,
        )

    def interrupt(self, message: str | None = None, *args: Any, **options: Any) -> Any:
        """Stop this agent's conversations: the model requests, the tools and the subagents under way."""
        for other in self._others():
            Hooks.interrupt(other, message, *args, **options)
        return super().interrupt(message, *args, **options)

    def hard_interrupt(self, *args: Any, **options: Any) -> Any:
        """From 0.20: as :meth:`interrupt`."""
        for other in self._others():
            Hooks.hard_interrupt(other, *args, **options)
        return super().hard_interrupt(*args, **options)

    def redirect(self, *args: Any, **options: Any) -> Any:
        """From 0.20: correct each conversation under way."""
        others = [Hooks.redirect(other, *args, **options) for other in self._others()]
        return super().redirect(*args, **options) or any(others)

    def switch_model(
        self, new_model: str, new_provider: str = "", api_key: str = "", base_url: str = "", *args: Any, **options: Any
    ) -> None:
        """Go on with another model, as Hermes' ``/model`` has it, from the next conversation on.

        An agent that was given a ``base_url`` looks for the model there or at the new address, as at its construction.
        One that was given a ``server`` takes a model that this has.

        Raises:
            ConfigurationError: the server has no such model, or cannot be asked for what the agent asks for. The agent
                stays as it was.
        """
        if self._where is None:  # made by __new__: it has no server to begin with
            super().switch_model(new_model, new_provider, api_key, base_url, *args, **options)
            return
        where = {**self._where, "model": new_model}
        if where["server"] is None:
            where |= {"base_url": base_url or where["base_url"], "api_key": api_key or where["api_key"]}
            where["provider"] = new_provider or where["provider"]
        else:
            where |= self._where_is(new_model)
        backend = connect(self._options, where)
        route = route_to(where, backend)
        before = self._backend, self._route, self._context
        self._backend, self._route, self._context = backend, route, ContextLength(backend, None)
        try:
            with acting_for(self):
                super().switch_model(
                    new_model, *(route[name] for name in ("provider", "api_key", "base_url", "api_mode"))
                )
                self._context.correct(self)
            if self._backend.tracks_tokens:
                self.request_overrides = self._options["request_overrides"]
                add_configured(self, where)
        except BaseException:
            self._backend, self._route, self._context = before
            raise
        self._where, self._options = where, {**self._options, "model": new_model}

    def _where_is(self, model: str) -> dict[str, Any]:
        """Where this agent's server has a model."""
        assert self._where is not None
        return {"server": serving(self._where["server"], model)}

    def _others(self) -> set[AtroposAIAgent]:
        """The copies that run conversations of this agent."""
        return getattr(self, "_running", set()) - {self}

    def steer(self, text: str, *args: Any, **options: Any) -> bool:
        """Add ``text`` to the next tool result of each conversation under way."""
        others = [agent.steer(text, *args, **options) for agent in self._others()]
        return super().steer(text, *args, **options) or any(others)


class Task(harness.Task):
    """A rollout of an ``AtroposAIAgent`` in its sandbox, for the length of ``async with agent.task(…)``."""

    def __init__(self, agent: AtroposAIAgent, rollout: Rollout, *, keep_processes: bool) -> None:
        super().__init__(keep_processes=keep_processes)
        self._agent = agent
        self._rollout = rollout
        self._turns = asyncio.Lock()

    @property
    def sandbox(self) -> HermesSandbox:
        assert self._rollout.sandbox is not None
        return self._rollout.sandbox

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
        """See :meth:`harness.Task.run`; options and result are those of :meth:`AtroposAIAgent.run_conversation`."""
        request = (user_message, system_message, history_of(conversation_history), self.task_id)
        async with self._turns:  # runs of one task are one after the other, as its tokens are
            return await self._agent._run_async(self._rollout, request, options)


def model_name(server: Any) -> str:
    """The name under which a backend's server knows its model."""
    first = servers_of(server)[0]
    return getattr(first.config, "model_name", None) or "local"
