"""The methods that Hermes' loop calls on its agent, and that do something else here.

Hermes talks to a model, stores an answer, starts subagents and cleans up after a task through these. Each takes and
passes on what newer releases may add.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from openai.types.chat import ChatCompletion
from run_agent import AIAgent
from tools.environments.base import set_activity_callback

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.conversation import assistant_message as stored_message
from hermes_atropos.conversation import stop_reason_of
from hermes_atropos.errors import NoServerError
from hermes_atropos.hermes import profile, seams
from hermes_atropos.hermes.acting import acting_beside, acting_for
from hermes_atropos.hermes.books import Books
from hermes_atropos.hermes.context import ContextLength
from hermes_atropos.hermes.releases import release
from hermes_atropos.hermes.requests import IN_PROCESS, UNUSED, asked
from hermes_atropos.hermes.result import to_completion, with_results
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.listening import Delta, hearing, text_listener
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.runtime import turnstile
from hermes_atropos.trajectory import AgentResult, StopReason

__all__ = ["HERMES_PARAMETERS", "HERMES_ROUTES", "Hooks", "Subagent"]

HERMES_PARAMETERS = inspect.signature(AIAgent.__init__).parameters

#: Hermes' own ways to reach a model. With a server given none of them is used, so that no call leaves by another way.
HERMES_ROUTES = {"base_url", "api_key", "provider", "requested_provider", *UNUSED} & HERMES_PARAMETERS.keys()

#: Tools that wait for nothing but a process of the sandbox.
SANDBOX_TOOLS = frozenset({"patch", "read_file", "search_files", "terminal", "write_file"})


class Hooks(AIAgent):
    """Hermes' agent with another way to a model.

    What is set here is also what an agent has that Hermes' own code makes by ``__new__``.

    Attributes:
        last_auxiliary: what a model call left that belongs to no rollout: the summary that ``/compress`` asks for, a
            review of the conversation in the background.
        _rollout: what the agent is at; its conversation asks the model. None while it runs nothing.
    """

    last_auxiliary: AgentResult | None = None
    _backend: Backend | None = None
    _route: Mapping[str, Any] = MappingProxyType(IN_PROCESS)
    _rollout: Rollout | None = None
    _books: Books | None = None
    _sampling: Mapping[str, Any] = MappingProxyType({})
    _max_tool_call_retries = 3
    _saved = False

    def _construct(self, options: Mapping[str, Any], context_length: int | None) -> None:
        """Hermes' constructor, and what it cannot be told by arguments. The attributes above are set by now."""
        profile.freeze_heap()
        self._context = ContextLength(self._served, context_length)
        given = {"max_iterations": 90, "max_tokens": self._sampling.get("max_tokens"), **options, **self._route}
        if HERMES_PARAMETERS["tool_delay"].default is not None:  # from 0.20 it is not used, and giving it warns
            given.setdefault("tool_delay", 0.0)
        with acting_for(self):
            AIAgent.__init__(self, **given)
            seams.check_attributes(self, "AIAgent")
            self._context.correct(self)
        self._active_children = seams.OurChildren(self, Hooks)
        self._compression_feasibility_checked = True  # see _check_compression_model_feasibility

    def _construct_as(self, other: Hooks, options: Mapping[str, Any]) -> None:
        """:meth:`_construct`, on the server of another agent and with what that was given."""
        self._backend, self._route = other._served, other._route
        self._sampling, self._max_tool_call_retries = other._sampling, other._max_tool_call_retries
        self._construct(options, other._context.given)

    @property
    def _served(self) -> Backend:
        if self._backend is None:
            raise NoServerError("this agent was made without its constructor: it has no server to ask")
        return self._backend

    # Asking the model

    def _create_openai_client(self, client_kwargs: dict[str, Any], *, reason: str, shared: bool, **options: Any) -> Any:
        """A stand-in for the OpenAI client, which the summary at the iteration limit calls directly."""
        agent = weakref.proxy(self)  # it holds its client
        completions = SimpleNamespace(create=lambda **request: agent._complete(**request))
        return SimpleNamespace(chat=SimpleNamespace(completions=completions), is_closed=False, close=lambda: None)

    def _complete(self, **request: Any) -> Any:
        return to_completion(self._ask(request), self.model)

    def _interruptible_api_call(self, api_kwargs: dict[str, Any], *args: Any, **options: Any) -> Any:
        if self._backend is None:
            return super()._interruptible_api_call(api_kwargs, *args, **options)
        return self._complete(**api_kwargs)

    def _interruptible_streaming_api_call(
        self, api_kwargs: dict[str, Any], *args: Any, on_first_delta: Any = None, **options: Any
    ) -> Any:
        """Hermes asks so where someone listens."""
        heard = False

        def hear(delta: Delta) -> None:
            nonlocal heard
            if not heard and on_first_delta is not None:
                on_first_delta()
            heard = True
            if delta.kind == "content":
                self._fire_stream_delta(delta.text)
            elif delta.kind == "reasoning":
                self._fire_reasoning_delta(delta.text)
            else:
                self._fire_tool_gen_started(delta.text)

        with hearing(text_listener, hear if self._is_heard() else None):
            turn = self._ask(api_kwargs)
        if not heard and on_first_delta is not None:
            on_first_delta()
        completion = to_completion(turn, self.model)
        completion.id = f"stream-{completion.id}"  # as Hermes has it
        return completion

    def _is_heard(self) -> bool:
        """Hermes asks for streams where nobody listens too, to see that the server lives."""
        return self._has_stream_consumers() or bool(self.reasoning_callback or self.tool_gen_callback)

    def _ask(self, api_kwargs: Mapping[str, Any]) -> ModelTurn:
        # Once more for the summary at the iteration limit, which Hermes sends with its images.
        messages = self._prepare_messages_for_non_vision_model(api_kwargs["messages"])
        tools, sampling = api_kwargs.get("tools"), asked(self, api_kwargs)
        if self._rollout is None:
            return self._ask_alone(messages, tools, sampling)
        self._settle()
        return self._rollout.ask(
            messages,
            tools,
            sampling,
            interrupted=self._is_interrupted,
            compresses=bool(self.compression_enabled),
        )

    def _ask_alone(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, sampling: dict[str, Any]
    ) -> ModelTurn:
        """A call that belongs to no rollout, as one of its own."""
        rollout = Rollout.on(self._served, None, max_tool_call_retries=self._max_tool_call_retries)
        books, reason = Books(self), StopReason.COMPLETED
        try:
            return rollout.request(messages, tools, sampling, interrupted=self._is_interrupted).result()
        except BaseException as error:
            reason = stop_reason_of(error)
            raise
        finally:
            self.last_auxiliary = rollout.left(reason, tools)
            books.settle(self, rollout.uncounted)

    def _is_interrupted(self) -> bool:
        return bool(getattr(self, "_interrupt_requested", False))

    def _settle(self) -> None:
        if self._books is not None and self._rollout is not None:
            self._books.settle(self, self._rollout.uncounted)

    def _auxiliary_call(self, *, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatCompletion:
        """What Hermes asks beside the conversation: the summary of a compression."""
        if self._rollout is None:
            turn = self._ask_alone(messages, None, dict(self._sampling))
        else:
            aside = self._rollout.aside()
            turn = aside.request(messages, None, self._sampling, interrupted=self._is_interrupted).result()
        return to_completion(turn, self.model)

    def _check_compression_model_feasibility(self, *args: Any, **options: Any) -> None:
        """Hermes would look for a model that summarises; it is the one that it talks to."""
        if self._backend is None:
            super()._check_compression_model_feasibility(*args, **options)

    def _compress_context(self, *args: Any, **options: Any) -> Any:
        with acting_for(self):
            return super()._compress_context(*args, **options)

    @property
    def _sees_as_hermes(self) -> bool:
        tracked = self._backend is not None and self._backend.tracks_tokens
        return not tracked and profile.active_profile() is None

    def _model_supports_vision(self, *args: Any, **options: Any) -> bool:
        """Tokens are tracked of text alone. In a training run, a chat endpoint's model is not looked up."""
        if self._backend is None or self._sees_as_hermes:
            return bool(super()._model_supports_vision(*args, **options))
        return not self._backend.tracks_tokens

    def _describe_image_for_anthropic_fallback(self, image_url: str, role: str, *args: Any, **options: Any) -> str:
        """What a model that sees no images reads in place of one: on a token server and in a training run, no other
        model describes it."""
        if self._sees_as_hermes:
            return str(super()._describe_image_for_anthropic_fallback(image_url, role, *args, **options))
        return "[An image was attached here, which you cannot see.]"

    def _spawn_background_review(self, *args: Any, **options: Any) -> None:
        """Hermes' review of a conversation for its memory and skills, which is no part of the rollout, asks the same
        server. In a training run, one rollout must not learn from another."""
        if profile.active_profile() is None and release().reviews:
            with acting_for(self, beside=True):
                super()._spawn_background_review(*args, **options)

    def _build_system_prompt(self, *args: Any, **options: Any) -> str:
        """Hermes' system prompt, with the paths of the task's sandbox as its shell has them."""
        prompt: str = super()._build_system_prompt(*args, **options)
        return prompt if self._sandbox is None else self._sandbox.as_told(prompt)

    # Keeping what it said

    @property
    def _last_turn(self) -> ModelTurn | None:
        return None if self._rollout is None else self._rollout.last_turn

    def _build_assistant_message(self, assistant_message: Any, finish_reason: str, **options: Any) -> dict[str, Any]:
        message: dict[str, Any] = super()._build_assistant_message(assistant_message, finish_reason, **options)
        turn = self._last_turn
        if turn is not None:
            message[TURN_KEY] = turn.ref
            if not all(call.ok for call in turn.calls):  # those that are none, Hermes has never seen
                message["content"] = stored_message(turn)["content"]
        return message

    def _handle_max_iterations(self, messages: list[dict[str, Any]], api_call_count: int, **options: Any) -> str:
        response: str = super()._handle_max_iterations(messages, api_call_count, **options)
        turn = self._last_turn
        if messages[-1]["role"] == "assistant" and turn is not None:
            messages[-1][TURN_KEY] = turn.ref
        return response

    def _save_trajectory(self, messages: list[dict[str, Any]], user_query: str, completed: bool) -> None:
        if self._rollout is None:
            super()._save_trajectory(messages, user_query, completed)
            return
        if messages[-1].get("content") == "(empty)":
            return  # Hermes' word for no answer, in place of all that led to it: saved whole once the run is over
        self._saved = True
        completed = completed and not self._interrupt_requested
        super()._save_trajectory(self._rollout.conversation.expand(messages), user_query, completed)

    def _convert_to_trajectory_format(
        self, messages: list[dict[str, Any]], user_query: str, completed: bool
    ) -> list[dict[str, Any]]:
        """Hermes' format. It pairs results with calls by their places, and loses those that answer an invalid call."""
        convert = super()._convert_to_trajectory_format
        return with_results(messages, lambda spoken: convert(spoken, user_query, completed))

    # Running tools

    @property
    def _sandbox(self) -> HermesSandbox | None:
        return None if self._rollout is None else self._rollout.sandbox

    def steps_out_in(self, tool: str) -> bool:
        """Whether whoever waits in that tool leaves its place at the turnstile to others meanwhile."""
        return tool in SANDBOX_TOOLS and self._sandbox is not None and self._sandbox.steps_out

    def _execute_tool_calls(self, assistant_message: Any, *args: Any, **options: Any) -> None:
        sandbox = self._sandbox
        if sandbox is not None:
            sandbox.register(sandbox.hermes_id)
        names = [call.function.name for call in assistant_message.tool_calls]
        # Several calls of other tools may run on other threads, for which this one then waits.
        alone = set(names) == {"terminal"} or (len(names) == 1 and names[0] in SANDBOX_TOOLS)
        here = alone and release().tools_run_here
        with contextlib.nullcontext() if here and sandbox and sandbox.steps_out else turnstile.outside():
            super()._execute_tool_calls(assistant_message, *args, **options)

    def _dispatch_delegate_task(self, function_args: dict[str, Any], *args: Any, **options: Any) -> str:
        """Run subagents within the rollout: newer releases send them to the background, where they would outlive it."""
        with acting_for(self):
            return release().delegate(function_args, self)

    def _make_subagent(self, new: AIAgent, *args: Any, **options: Any) -> None:
        """Make the agent that Hermes constructs for a subtask one of ours."""
        new.__class__ = Subagent
        with turnstile.inside():
            Subagent.__init__(new, self, *args, **options)

    def _cleanup_task_resources(self, task_id: str, *args: Any, **options: Any) -> None:
        """A sandbox is released by whoever opened it, after the verifier."""
        if self._sandbox is None:
            super()._cleanup_task_resources(task_id, *args, **options)

    def interrupt(self, message: str | None = None, *args: Any, **options: Any) -> Any:
        """Stop the model request, the tools and the subagents under way."""
        stopped = super().interrupt(message, *args, **options)
        self._cancel_requests()
        return stopped

    def hard_interrupt(self, *args: Any, **options: Any) -> Any:
        """From 0.20: as :meth:`interrupt`, which Hermes calls past this class here."""
        stopped = super().hard_interrupt(*args, **options)
        self._cancel_requests()
        return stopped

    def redirect(self, *args: Any, **options: Any) -> Any:
        """From 0.20: stop the model request under way, and ask again with what the user has to say."""
        accepted = super().redirect(*args, **options)
        if accepted:
            self._cancel_requests()
        return accepted

    def _cancel_requests(self) -> None:
        if self._rollout is not None:
            self._rollout.cancel_requests()


class Subagent(Hooks):
    """An agent that Hermes starts for another: on its server, and on its ledger and sandbox while it runs a rollout.

    One that is started beside the rollout, for a review in the background, is a rollout of its own.
    """

    def __init__(self, parent: Hooks, *args: Any, **options: Any) -> None:
        options.update(zip(list(HERMES_PARAMETERS)[1:], args, strict=False))
        self._parent = parent
        rollout = None if acting_beside() else parent._rollout
        self._alone = rollout is None
        own = {name: value for name, value in options.items() if name not in HERMES_ROUTES}
        self._construct_as(parent, own)
        if rollout is None:
            self._rollout = Rollout.on(self._served, None, max_tool_call_retries=self._max_tool_call_retries)
        else:
            self._rollout = rollout.for_subagent()

    def run_conversation(self, *args: Any, **options: Any) -> dict[str, Any]:
        sandbox = self._sandbox
        task_id = options.get("task_id")
        if sandbox is not None and task_id:
            sandbox.register(task_id)
        self._books = Books(self)
        try:
            with acting_for(self), turnstile.inside():
                return super().run_conversation(*args, **options)
        finally:
            self._settle()
            if self._alone:
                assert self._rollout is not None
                failure = self._rollout.failure
                reason = StopReason.COMPLETED if failure is None else stop_reason_of(failure)
                self._parent.last_auxiliary = self._rollout.left(reason, self.tools)
            set_activity_callback(None)
