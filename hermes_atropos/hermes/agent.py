"""``AtroposAIAgent``: Hermes' agent, whose model calls go to an Atropos server and come back with token ids.

Toolsets, callbacks, sessions, interrupts, trajectory saving and the loop itself are Hermes' own (`run_agent.AIAgent`).
What is overridden here are the places where Hermes talks to a model, builds the stored form of an answer, starts
subagents and cleans up after a task.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import gc
import inspect
import json
import logging
import os
import signal
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from hermes_atropos.hermes.versions import check_versions

check_versions()

# hermes-agent is imported only once its version is known to fit.
import model_tools
import toolsets
from atroposlib.envs.server_handling.managed_server import SequenceNode
from openai.types.chat import ChatCompletion
from run_agent import AIAgent
from tools.environments.base import set_activity_callback

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.conversation import Conversation
from hermes_atropos.conversation import assistant_message as stored_message
from hermes_atropos.errors import (
    BackendError,
    BackendTimeoutError,
    ConfigurationError,
    ContextLengthError,
    ToolCallRetriesError,
    UnknownToolsetError,
)
from hermes_atropos.hermes.profile import active_profile
from hermes_atropos.hermes.seams import rebound
from hermes_atropos.hermes.terminal import CommandResult, Sandbox
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.runtime import check_not_on, home_loop, portal_loop, run_in_rollout_thread, run_to_end, turnstile
from hermes_atropos.trajectory import SequenceData, StopReason
from hermes_atropos.trajectory.result import is_number

if active_profile() is not None:
    # Hermes' modules are a heap that lives as long as the process. Each look of the collector through all of it
    # would stop the event loop for a tenth of a second.
    gc.collect()
    gc.freeze()

__all__ = ["AtroposAIAgent", "Task"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

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

#: Hermes' own ways to reach a model. With a server given none of them is used, so that no call leaves by another way.
HERMES_ROUTES = frozenset(
    {"base_url", "api_key", "provider", "api_mode", "acp_command", "acp_args", "fallback_model", "credential_pool"}
)

#: A URL that HTTP clients refuse before any look-up, and that Hermes takes for a remote one, which it doesn't probe.
IN_PROCESS = {"base_url": "inproc://hermes-atropos.invalid/v1", "api_key": "in-process", "provider": "custom"}

#: Tools that wait for nothing but a process of the sandbox.
SANDBOX_TOOLS = frozenset({"patch", "read_file", "search_files", "terminal", "write_file"})

HERMES_PARAMETERS = inspect.signature(AIAgent.__init__).parameters

INSTEAD = "await agent.run_conversation_async(...)"


class ModelCallFailed(ValueError):
    """Ends Hermes' turn at once: Hermes retries most errors, but takes a ``ValueError`` for final."""


@dataclass(eq=False)
class Rollout:
    """What belongs to one run of the agent on a task, subagents included.

    Attributes:
        backend: answers the model calls; holds the ledger.
        server: whose home loop the calls run on.
        conversation: the main agent's; each subagent has one of its own on the same backend.
        sandbox: where the tools act; None leaves that to Hermes.
        failure: what ended the rollout, if something did.
        signal: what was raised in Hermes to tell it of the failure.
        cancelled: whether the caller gave it up.
    """

    backend: Backend
    server: Any
    conversation: Conversation
    sandbox: Sandbox | None = None
    failure: BaseException | None = None
    signal: BaseException | None = None
    cancelled: bool = False


class AtroposAIAgent(AIAgent):
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
        ConfigurationError: ``max_tool_call_retries`` is no count.
        TypeError: an argument that neither Hermes nor this class knows.
    """

    _rollout: Rollout

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
        self._sampling = sampling
        self._max_tool_call_retries = max_tool_call_retries
        self._busy = threading.Lock()
        self._running: set[AtroposAIAgent] = set()
        self._requests: set[concurrent.futures.Future[ModelTurn]] = set()
        self._last_turn: ModelTurn | None = None
        self.last_result: dict[str, Any] | None = None
        construct(self, **{"tool_delay": 0.0, "max_tokens": sampling.get("max_tokens"), **options, **IN_PROCESS})
        self._api_max_retries = 1  # the backend retries what can succeed
        self._compression_feasibility_checked = True  # see _check_compression_model_feasibility
        # Hermes' compressor asks for its summary through a function of its module. Its very code, with that one name
        # bound to ours, asks the rollout's server instead, in every release.
        summarise = type(self.context_compressor).__dict__.get("_generate_summary")
        if summarise is not None:
            routed = rebound(summarise, call_llm=weak_method(self._auxiliary_call))
            compressor = weakref.proxy(self.context_compressor)
            self.context_compressor._generate_summary = functools.partial(routed, compressor)

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
        check_not_on(home_loop(self._backend.server, portal_loop()), instead=INSTEAD)
        request = (user_message, system_message, history_of(conversation_history), task_id, *args)
        with self._claimed() as agent:
            sandbox = Sandbox(task_id, Path.cwd(), private=False) if task_id else None
            rollout = agent._new_rollout(sandbox)
            try:
                with interrupting_first(agent._interrupt_own):
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
        async with self._opened(lambda: Sandbox(task_id, Path.cwd(), private=False)) as (agent, rollout):
            return await agent._run_async(rollout, request, options)

    def chat(self, message: str, stream_callback: Any = None) -> str:
        """The final response to ``message``; see :meth:`run_conversation`."""
        return str(self.run_conversation(message, stream_callback=stream_callback)["final_response"] or "")

    async def chat_async(self, message: str, stream_callback: Any = None) -> str:
        """The final response to ``message``; see :meth:`run_conversation_async`."""
        result = await self.run_conversation_async(message, stream_callback=stream_callback)
        return str(result["final_response"] or "")

    @contextlib.asynccontextmanager
    async def task(
        self, task_id: str | None = None, *, workspace: str | os.PathLike[str] | None = None, copy: bool = False
    ) -> AsyncIterator[Task]:
        """A rollout in a sandbox of its own, which the verifier sees before it is released.

        ::

            async with agent.task("fix-17", workspace=repo) as task:
                result = await task.run("Make the tests pass.")
                check = await task.terminal("pytest -q")

        Args:
            task_id: names the rollout; a new name by default.
            workspace: the folder in which the tools act, used as it is; None makes a fresh one, removed at the end.
            copy: act in a copy of ``workspace``, removed at the end.

        Raises:
            WorkspaceError: ``workspace`` is no folder, or another open task acts in it.
            SandboxError: a task of this name is open.
        """
        # A copy in any case: what Hermes keeps on its agent, a list of todos say, belongs to one rollout.
        async with self._opened(lambda: Sandbox(task_id, workspace, copy=copy), copied=True) as (agent, rollout):
            yield Task(agent, rollout)

    @contextlib.asynccontextmanager
    async def _opened(
        self, open_sandbox: Callable[[], Sandbox], *, copied: bool = False
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

    def _new_rollout(self, sandbox: Sandbox | None) -> Rollout:
        backend = self._backend.fresh()
        conversation = Conversation(backend, max_tool_call_retries=self._max_tool_call_retries)
        return Rollout(backend, backend.server, conversation, sandbox)

    async def _run_async(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        home_loop(rollout.server, asyncio.get_running_loop())

        def stop() -> None:
            rollout.cancelled = True
            self._interrupt_own()

        def run() -> dict[str, Any]:
            with turnstile.inside():
                return self._run(rollout, request, options)

        return await run_in_rollout_thread(run, stop=stop)

    def _run(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """Hermes' loop, on the calling thread. Whatever ends it, ``last_result`` holds what there is."""
        self._rollout = rollout
        self._saved = False
        rollout.failure = rollout.signal = None
        if rollout.sandbox is None:
            return self._run_entered(rollout, request, options)
        with rollout.sandbox.entered():
            return self._run_entered(rollout, (*request[:3], rollout.sandbox.hermes_id, *request[4:]), options)

    def _run_entered(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        try:
            result = super().run_conversation(*request, **options)
        except Exception as error:
            logger.exception("the rollout failed outside a model call")
            rollout.failure = rollout.failure or error
        except BaseException as error:  # Ctrl-C: nothing may run on
            rollout.failure = error
            self._interrupt_own()
            raise
        finally:
            self.last_result = self._finish(result, rollout, request)
            self.clear_interrupt()  # one that came too late is not meant for the next conversation
            set_activity_callback(None)  # Hermes leaves the agent, and all it knows, with the thread
            if rollout.signal is not None:
                forget_agent(rollout.signal)
        return self.last_result

    def _finish(self, result: dict[str, Any], rollout: Rollout, request: tuple[Any, ...]) -> dict[str, Any]:
        """Hermes' result with the trajectory beside it; a failed run gets the keys and the saving that Hermes skips."""
        conversation = rollout.conversation
        reason = stop_reason(result, rollout, self.max_iterations)
        messages = conversation.expand(result.get("messages") or [])
        if rollout.failure is not None or reason is StopReason.EMPTY_RESPONSE:
            # Hermes returns without the call that failed, and drops what led to an empty answer.
            messages = conversation.messages or messages
        if self.save_trajectories and not self._saved:
            super()._save_trajectory(without_system(messages), str(request[0]), reason is StopReason.COMPLETED)
        system_prompt = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
        trajectory = conversation.result(
            with_system(without_system(messages), system_prompt),
            reason,
            tools=list(self.tools or []),
            final_response=last_words(result, conversation),
            error=describe(rollout.failure) or result.get("error"),
            sampling=dict(self._sampling),
        )
        failed = {} if rollout.failure is None else {"failed": True, "cause": rollout.failure}
        if rollout.signal is not None and str(rollout.signal) in str(result.get("final_response")):
            failed["final_response"] = f"The model call failed: {trajectory.error}"  # Hermes knows our signal alone
        return {
            "final_response": None,
            "api_calls": len(conversation.steps),
            **result,
            "completed": reason is StopReason.COMPLETED,
            **failed,
            "error": trajectory.error,
            "messages": without_system(messages),
            "trajectory": trajectory,
            "managed_state": {"nodes": [to_sequence_node(sequence) for sequence in trajectory.sequences]},
            "stop_reason": reason,
            "system_prompt": system_prompt,
            "task_id": self._current_task_id if rollout.sandbox is None else rollout.sandbox.task_id,
        }

    # What Hermes calls

    def interrupt(self, message: str | None = None) -> None:
        """Stop this agent's conversations: the model requests, the tools and the subagents under way."""
        for agent in {*self._running, self}:
            agent._interrupt_own(message)

    def _interrupt_own(self, message: str | None = None) -> None:
        super().interrupt(message)
        for request in list(self._requests):
            request.cancel()

    def steer(self, text: str) -> bool:
        """Add ``text`` to the next tool result of each conversation under way."""
        copies = [agent.steer(text) for agent in self._running - {self}]
        return super().steer(text) or any(copies)

    def _create_openai_client(self, client_kwargs: dict[str, Any], *, reason: str, shared: bool) -> Any:
        """A stand-in for the OpenAI client, which the summary at the iteration limit calls directly."""
        completions = SimpleNamespace(create=weak_method(self._complete))
        return SimpleNamespace(chat=SimpleNamespace(completions=completions), is_closed=False, close=lambda: None)

    def _complete(self, **request: Any) -> Any:
        return self._interruptible_api_call(request)

    def _interruptible_api_call(self, api_kwargs: dict[str, Any]) -> Any:
        return to_completion(self._ask(api_kwargs), self.model)

    def _interruptible_streaming_api_call(self, api_kwargs: dict[str, Any], *, on_first_delta: Any = None) -> Any:
        """The whole answer at once, announced to whoever listens for its parts."""
        turn = self._ask(api_kwargs)
        if on_first_delta is not None:
            on_first_delta()
        if turn.reasoning:
            self._fire_reasoning_delta(turn.reasoning)
        if turn.content:
            self._fire_stream_delta(turn.content)
        for call in turn.calls:
            if call.ok:
                self._fire_tool_gen_started(call.name)
        return to_completion(turn, self.model)

    def _ask(self, api_kwargs: Mapping[str, Any]) -> ModelTurn:
        """One model call, waited for on Hermes' thread."""
        rollout = self._rollout
        sampling = dict(self._sampling)
        if "max_tokens" in sampling:  # Hermes raises it after an answer that was cut off
            sampling["max_tokens"] = api_kwargs.get("max_tokens") or sampling["max_tokens"]
        # Once more for the summary at the iteration limit, which Hermes sends with its images.
        messages = self._prepare_messages_for_non_vision_model(api_kwargs["messages"])
        question = rollout.conversation.chat(messages, api_kwargs.get("tools"), **sampling)
        try:
            self._last_turn = turn = self._wait_for(question)
        except InterruptedError:
            raise
        except ContextLengthError as error:
            # The first are words by which Hermes knows that it is to compress.
            words = "maximum context length exceeded" if self.compression_enabled else "no room for an answer"
            rollout.failure, rollout.signal = error, ModelCallFailed(words)
            raise rollout.signal from error
        except Exception as error:
            rollout.failure, rollout.signal = error, ModelCallFailed(f"the model call failed ({type(error).__name__})")
            raise rollout.signal from error
        rollout.failure = None
        return turn

    def _wait_for(self, question: Coroutine[Any, Any, ModelTurn]) -> ModelTurn:
        """Ask on the server's loop and wait on this thread.

        Raises:
            InterruptedError: ``interrupt`` was called before or meanwhile.
        """
        request = asyncio.run_coroutine_threadsafe(question, home_loop(self._rollout.server, portal_loop()))
        self._requests.add(request)
        try:
            if self._interrupt_requested:
                request.cancel()
            with turnstile.outside():
                return request.result()
        except concurrent.futures.CancelledError:
            raise InterruptedError("The agent was interrupted during a model call.") from None
        finally:
            request.cancel()
            self._requests.discard(request)

    def _auxiliary_call(self, *, messages: list[dict[str, Any]], **_: Any) -> ChatCompletion:
        """A call of Hermes beside the conversation: a conversation of its own on the same server."""
        rollout = self._rollout
        aside = Conversation(rollout.backend)
        return to_completion(self._wait_for(aside.chat(messages, None, **self._sampling)), self.model)

    def _check_compression_model_feasibility(self) -> None:
        """Hermes would look for a model that summarises; it is the one that it talks to."""

    def _model_supports_vision(self) -> bool:
        """Hermes would ask what the model in the user's configuration can do. Tokens are tracked of text alone."""
        return not self._backend.tracks_tokens

    def _describe_image_for_anthropic_fallback(self, image_url: str, role: str) -> str:
        """What a model that sees no images reads in place of one. Hermes would have another model describe it."""
        return "[An image was attached here, which you cannot see.]"

    def _build_assistant_message(self, assistant_message: Any, finish_reason: str) -> dict[str, Any]:
        message: dict[str, Any] = super()._build_assistant_message(assistant_message, finish_reason)
        turn = self._last_turn
        if turn is not None:
            message[TURN_KEY] = turn.ref
            if not all(call.ok for call in turn.calls):  # those that are none, Hermes has never seen
                message["content"] = stored_message(turn)["content"]
        return message

    def _handle_max_iterations(self, messages: list[dict[str, Any]], api_call_count: int) -> str:
        response: str = super()._handle_max_iterations(messages, api_call_count)
        if messages[-1]["role"] == "assistant" and self._last_turn is not None:
            messages[-1][TURN_KEY] = self._last_turn.ref
        return response

    def _execute_tool_calls(self, assistant_message: Any, *args: Any, **options: Any) -> None:
        sandbox = self._rollout.sandbox
        if sandbox is not None:
            sandbox.lend(sandbox.hermes_id)
        names = [call.function.name for call in assistant_message.tool_calls]
        # Several calls of other tools may run on other threads, for which this one then waits.
        here = set(names) == {"terminal"} or (len(names) == 1 and names[0] in SANDBOX_TOOLS)
        with contextlib.nullcontext() if here and sandbox and sandbox.steps_out else turnstile.outside():
            super()._execute_tool_calls(assistant_message, *args, **options)

    def _dispatch_delegate_task(self, function_args: dict[str, Any]) -> str:
        """Run subagents within the rollout: newer releases send them to the background, where they would outlive it."""
        return delegate(self, function_args)

    def _cleanup_task_resources(self, task_id: str) -> None:
        """A sandbox is released by whoever opened it, after the verifier."""
        if self._rollout.sandbox is None:
            super()._cleanup_task_resources(task_id)

    def _save_trajectory(self, messages: list[dict[str, Any]], user_query: str, completed: bool) -> None:
        if messages[-1].get("content") == "(empty)":
            return  # Hermes' word for no answer, in place of all that led to it: saved whole once the run is over
        self._saved = True
        completed = completed and not self._interrupt_requested
        super()._save_trajectory(self._rollout.conversation.expand(messages), user_query, completed)

    def _convert_to_trajectory_format(
        self, messages: list[dict[str, Any]], user_query: str, completed: bool
    ) -> list[dict[str, Any]]:
        """Hermes' format. It pairs results with calls by their places, and loses those that answer an invalid call."""
        turns: list[dict[str, Any]] = []
        answers: list[list[dict[str, Any]]] = []
        for message in messages:
            if message["role"] == "tool" and answers:
                answers[-1].append(message)
            elif message["role"] in ("user", "assistant"):
                turns.append(message)
                answers.append([])
        saved: list[dict[str, Any]] = super()._convert_to_trajectory_format(turns, user_query, completed)
        whole, spoken = saved[: -len(turns)], saved[-len(turns) :]
        for turn, entry, results in zip(turns, spoken, answers, strict=True):
            whole.append(entry)
            if results:
                whole.append({"from": "tool", "value": "\n".join(saved_result(turn, result) for result in results)})
        return whole

    def _spawn_background_review(self, *args: Any, **options: Any) -> None:
        """Hermes' review of a conversation for its memory runs on a model after the rollout: it has no place here."""


class Subagent(AtroposAIAgent):
    """An agent that ``delegate_task`` starts, on its parent's server, ledger and sandbox."""

    def __init__(self, parent: AtroposAIAgent, **options: Any) -> None:
        self._backend = parent._backend
        conversation = Conversation(
            parent._rollout.backend, max_tool_call_retries=parent._rollout.conversation.max_tool_call_retries
        )
        self._rollout = dataclasses.replace(parent._rollout, conversation=conversation, failure=None, signal=None)
        own = {name: value for name, value in options.items() if name not in HERMES_ROUTES}
        self._setup(own, parent._sampling, parent._max_tool_call_retries)

    def run_conversation(self, *args: Any, **options: Any) -> dict[str, Any]:
        task_id = options.get("task_id")
        if self._rollout.sandbox is not None and task_id:
            self._rollout.sandbox.lend(task_id)
        try:
            result: dict[str, Any] = AIAgent.run_conversation(self, *args, **options)
            return result
        finally:
            set_activity_callback(None)


@dataclass(eq=False)
class Task:
    """A rollout in its sandbox, for the length of ``async with agent.task(…)``.

    Attributes:
        task_id: its name.
        workspace: the folder in which its tools act.
    """

    _agent: AtroposAIAgent
    _rollout: Rollout
    _turns: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def _sandbox(self) -> Sandbox:
        assert self._rollout.sandbox is not None
        return self._rollout.sandbox

    @property
    def task_id(self) -> str:
        return self._sandbox.task_id

    @property
    def workspace(self) -> Path:
        return self._sandbox.workspace

    @property
    def last_result(self) -> dict[str, Any] | None:
        """What the last run left, also if it was cancelled; None before the first."""
        return self._agent.last_result

    async def run(self, user_message: Any, system_message: str | None = None, **options: Any) -> dict[str, Any]:
        """Run the agent on ``user_message``; see :meth:`AtroposAIAgent.run_conversation`.

        Several runs of one task are one rollout. Pass ``conversation_history=result["messages"]`` to go on where the
        last run ended: its tokens go on too.
        """
        history = options.pop("conversation_history", None)
        request = (user_message, system_message, history_of(history), self.task_id)
        async with self._turns:  # runs of one task are one after the other, as its tokens are
            return await self._agent._run_async(self._rollout, request, options)

    async def terminal(self, command: str, *, timeout: float = 180.0) -> CommandResult:
        """Run a command in the task's shell, as the agent left it; exit code 124 after ``timeout`` seconds."""
        return await self._sandbox.call(lambda: self._sandbox.run(command, timeout=timeout))

    async def read_file(self, path: str) -> str:
        """A text file of the task (UTF-8); see :meth:`read_bytes`."""
        return (await self.read_bytes(path)).decode()

    async def read_bytes(self, path: str) -> bytes:
        """A file of the task, by a path relative to the workspace; ``FileNotFoundError`` if there is none."""
        return await self._sandbox.call(lambda: self._sandbox.read_bytes(path))

    async def write_file(self, path: str, content: str | bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made."""
        data = content.encode() if isinstance(content, str) else content
        await self._sandbox.call(lambda: self._sandbox.write_bytes(path, data))


@contextlib.contextmanager
def interrupting_first(interrupt: Callable[[], object]) -> Iterator[None]:
    """For the length of the block, Ctrl-C calls ``interrupt`` before it raises ``KeyboardInterrupt``.

    Hermes runs subagents and several tools at once on pools of threads, which let no exception pass before their
    threads have ended; and a subagent that its parent has left is no longer told. Whoever handles SIGINT in another way
    is left to it.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: Any) -> None:
        # On a thread, because this one may hold a lock that it takes.
        thread = threading.Thread(target=interrupt, name="hermes-atropos-ctrl-c", daemon=True)
        thread.start()
        thread.join(0.5)  # seconds, of the one within which all is to end
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def weak_method(method: Callable[..., T]) -> Callable[..., T]:
    """Call ``method`` without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **options: Any) -> T:
        target = reference()
        assert target is not None
        return target(*args, **options)

    return call


def history_of(messages: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A history to go on from, as Hermes had it: it would take retries for damage. They come back in each prompt."""
    return None if messages is None else Conversation.contract(messages)


def saved_result(turn: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """A tool's answer as Hermes saves it (`agent/agent_runtime_helpers.py`)."""
    names = {call["id"]: call["function"]["name"] for call in turn.get("tool_calls") or []}
    content = result["content"]
    if isinstance(content, str) and content.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            content = json.loads(content)
    name = names.get(result["tool_call_id"]) or result.get("name")
    answer = {"tool_call_id": result["tool_call_id"], "name": name, "content": content}
    return f"<tool_response>\n{json.dumps(answer, ensure_ascii=False)}\n</tool_response>"


def check_toolsets(names: Sequence[str]) -> None:
    """Raise ``UnknownToolsetError`` for a name that Hermes would pass over in silence."""
    if isinstance(names, str):
        raise UnknownToolsetError(f"{names!r} is no list of toolsets: write [{names!r}]")
    for name in names:
        if not toolsets.validate_toolset(name):
            known = sorted(toolsets.get_all_toolsets())
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known)}."
            raise UnknownToolsetError(f"Hermes has no toolset {name!r}: {hint}")


def model_name(server: Any) -> str:
    """The name under which the server knows its model."""
    first = next(iter(getattr(server, "servers", [server])), server)
    return getattr(getattr(first, "config", None), "model_name", None) or "local"


def tool_definitions(**options: Any) -> list[dict[str, Any]]:
    """Hermes' tools for an agent, deferred behind its tool search where they are many.

    From 0.16 on, Hermes measures them by the context of the model in the user's configuration, which it may look up at
    openrouter.ai. That model isn't the one that is called, so they are measured by their size alone.
    """
    from tools import tool_search

    whole = model_tools.get_tool_definitions(**options, skip_tool_search_assembly=True)
    config = tool_search.load_config()
    if config.enabled == "off":
        return list(whole)
    return list(tool_search.assemble_tool_defs(whole, config=config).tool_defs)


def constructor() -> Callable[..., None]:
    """``AIAgent.__init__`` with :func:`tool_definitions`."""
    if "skip_tool_search_assembly" not in inspect.signature(model_tools.get_tool_definitions).parameters:
        return AIAgent.__init__
    from agent import agent_init

    run_agent = rebound(agent_init._ra, imports={"run_agent": {"get_tool_definitions": tool_definitions}})
    init_agent = rebound(agent_init.init_agent, _ra=run_agent)
    return rebound(AIAgent.__init__, imports={"agent.agent_init": {"init_agent": init_agent}})


construct = constructor()


def delegate(agent: AtroposAIAgent, arguments: Mapping[str, Any]) -> str:
    """Call ``delegate_task`` with what this release of it accepts, in the foreground, with our subagents.

    The model and the provider that the user's configuration may name for subagents are not asked.
    """
    from tools import delegate_tool

    build = rebound(
        delegate_tool._build_child_agent, imports={"run_agent": {"AIAgent": functools.partial(Subagent, agent)}}
    )
    run = rebound(
        delegate_tool.delegate_task,
        _build_child_agent=build,
        _resolve_delegation_credentials=lambda _, parent: delegate_tool._resolve_delegation_credentials({}, parent),
    )
    accepted = inspect.signature(delegate_tool.delegate_task).parameters
    chosen = {name: value for name, value in arguments.items() if name in accepted}
    if hasattr(delegate_tool, "_strip_model_hidden_task_fields"):
        chosen["tasks"] = delegate_tool._strip_model_hidden_task_fields(chosen.get("tasks"))
    if "background" in accepted:
        chosen["background"] = False
    answer: str = run(**chosen, parent_agent=agent)
    return answer


def to_completion(turn: ModelTurn, model: str) -> ChatCompletion:
    """The answer as Hermes expects it from an OpenAI client. Usage is left out: Hermes would look prices up."""
    calls = [call.to_openai() for call in turn.calls if call.ok]
    message = {
        "role": "assistant",
        "content": turn.content,
        "tool_calls": calls or None,
        "reasoning_content": turn.reasoning,
    }
    finish_reason = "tool_calls" if calls and turn.finish_reason != "length" else turn.finish_reason
    return ChatCompletion.model_validate(
        {
            "id": turn.ref,
            "created": int(time.time()),
            "model": model,
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        }
    )


def stop_reason(result: Mapping[str, Any], rollout: Rollout, max_iterations: int) -> StopReason:
    """Why the run ended: from our own failure if there was one, else from what Hermes says of it."""
    if rollout.cancelled:
        return StopReason.CANCELLED
    for kind, reason in FAILURES.items():
        if isinstance(rollout.failure, kind):
            return reason
    exit_reason = str(result.get("turn_exit_reason") or "")
    if result.get("interrupted") or exit_reason.startswith("interrupted"):
        return StopReason.INTERRUPTED
    if exit_reason.startswith(("max_iterations", "budget")):
        return StopReason.ITERATION_LIMIT
    if exit_reason.startswith("empty_response"):
        return StopReason.EMPTY_RESPONSE
    if "length" in exit_reason or (result.get("partial") and "truncat" in str(result.get("error")).lower()):
        return StopReason.TRUNCATED
    if result.get("completed"):
        return StopReason.COMPLETED
    # After an empty answer Hermes takes no note of the limit.
    at_limit = not result.get("error") and result.get("api_calls", 0) >= max_iterations
    return StopReason.ITERATION_LIMIT if at_limit else StopReason.ERROR


#: What a failure means for the rollout; the first kind that fits counts.
FAILURES: dict[type[BaseException], StopReason] = {
    ToolCallRetriesError: StopReason.TOOL_CALL_RETRIES,
    ContextLengthError: StopReason.CONTEXT_LENGTH,
    BackendTimeoutError: StopReason.TIMEOUT,
    BackendError: StopReason.SERVER_ERROR,
    KeyboardInterrupt: StopReason.INTERRUPTED,
    BaseException: StopReason.ERROR,
}


def last_words(result: Mapping[str, Any], conversation: Conversation) -> str:
    """The final response if the model said it, not Hermes: else the model's last answer, if that called nothing."""
    turns = [turn for attempts in conversation.steps for turn in attempts]
    response = (result.get("final_response") or "").strip()
    if any(response == (turn.content or "").strip() for turn in turns):
        return response
    return (turns[-1].content or "").strip() if turns and not turns[-1].calls else ""


def describe(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def forget_agent(signal: BaseException) -> None:
    """Take the calls of Hermes out of a failure's traceback: they hold the agent, and it the failure."""
    signal.with_traceback(None)
    cause = signal.__cause__
    if cause is not None:
        trace = cause.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_flags & inspect.CO_COROUTINE:
            trace = trace.tb_next
        cause.with_traceback(trace)


def without_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] != "system"]


def with_system(messages: list[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": prompt}, *messages] if prompt else messages


def to_sequence_node(sequence: SequenceData) -> SequenceNode:
    return SequenceNode(
        full_text=sequence.full_text,
        tokens=sequence.tokens,
        masked_tokens=sequence.masked_tokens,
        logprobs=sequence.logprobs,
        metadata=sequence.metadata,
    )
