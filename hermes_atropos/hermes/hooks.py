"""The methods that Hermes' loop calls on its agent, and that do something else here.

Hermes talks to a model, stores an answer, starts subagents and cleans up after a task through these. Each takes and
passes on what newer releases may add.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from openai.types.chat import ChatCompletion
from run_agent import AIAgent
from tools.environments.base import set_activity_callback

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.conversation import assistant_message as stored_message
from hermes_atropos.hermes import profile, seams
from hermes_atropos.hermes.result import spoken_and_results, to_completion, with_results
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.runtime import turnstile

__all__ = ["HERMES_PARAMETERS", "HERMES_ROUTES", "Hooks", "Subagent"]

T = TypeVar("T")

HERMES_PARAMETERS = inspect.signature(AIAgent.__init__).parameters

#: Hermes' own ways to reach a model. With a server given none of them is used, so that no call leaves by another way.
HERMES_ROUTES = frozenset(
    {"base_url", "api_key", "provider", "api_mode", "acp_command", "acp_args", "fallback_model", "credential_pool"}
)

#: A URL that HTTP clients refuse before any look-up, and that Hermes takes for a remote one, which it doesn't probe.
IN_PROCESS = {"base_url": "inproc://hermes-atropos.invalid/v1", "api_key": "in-process", "provider": "custom"}

#: Tools that wait for nothing but a process of the sandbox.
SANDBOX_TOOLS = frozenset({"patch", "read_file", "search_files", "terminal", "write_file"})


class Hooks(AIAgent):
    """Hermes' agent with another way to a model.

    Attributes:
        _rollout: what the agent is at; its conversation asks the model.
    """

    _backend: Backend
    _rollout: Rollout
    _sampling: dict[str, Any]

    def _construct(
        self, rollout: Rollout, options: Mapping[str, Any], sampling: dict[str, Any], max_tool_call_retries: int
    ) -> None:
        """Hermes' constructor, and what it cannot be told by arguments."""
        profile.freeze_heap()
        self._rollout = rollout
        self._sampling = sampling
        self._max_tool_call_retries = max_tool_call_retries
        self._saved = False
        given = {"max_iterations": 90, "max_tokens": sampling.get("max_tokens"), **options, **IN_PROCESS}
        if HERMES_PARAMETERS["tool_delay"].default is not None:  # from 0.20 it is not used, and giving it warns
            given.setdefault("tool_delay", 0.0)
        with seams.acting_for(self):
            AIAgent.__init__(self, **given)
        seams.check_attributes(self, "AIAgent")
        self._active_children = seams.OurChildren(self, Hooks)
        self._api_max_retries = 1  # the backend retries what can succeed
        self._compression_feasibility_checked = True  # see _check_compression_model_feasibility

    # Asking the model

    def _create_openai_client(self, client_kwargs: dict[str, Any], *, reason: str, shared: bool, **options: Any) -> Any:
        """A stand-in for the OpenAI client, which the summary at the iteration limit calls directly."""
        completions = SimpleNamespace(create=weak_method(self._complete))
        return SimpleNamespace(chat=SimpleNamespace(completions=completions), is_closed=False, close=lambda: None)

    def _complete(self, **request: Any) -> Any:
        return self._interruptible_api_call(request)

    def _interruptible_api_call(self, api_kwargs: dict[str, Any], *args: Any, **options: Any) -> Any:
        return to_completion(self._ask(api_kwargs), self.model)

    def _interruptible_streaming_api_call(
        self, api_kwargs: dict[str, Any], *args: Any, on_first_delta: Any = None, **options: Any
    ) -> Any:
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
        sampling = dict(self._sampling)
        if "max_tokens" in sampling:  # Hermes raises it after an answer that was cut off
            sampling["max_tokens"] = api_kwargs.get("max_tokens") or sampling["max_tokens"]
        return self._rollout.ask(
            # Once more for the summary at the iteration limit, which Hermes sends with its images.
            self._prepare_messages_for_non_vision_model(api_kwargs["messages"]),
            api_kwargs.get("tools"),
            sampling,
            interrupted=lambda: bool(self._interrupt_requested),
            compresses=bool(self.compression_enabled),
        )

    def _auxiliary_call(self, *, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatCompletion:
        """What Hermes asks beside the conversation: the summary of a compression."""
        interrupted = lambda: bool(self._interrupt_requested)  # noqa: E731
        return to_completion(self._rollout.ask_aside(messages, self._sampling, interrupted=interrupted), self.model)

    def _check_compression_model_feasibility(self, *args: Any, **options: Any) -> None:
        """Hermes would look for a model that summarises; it is the one that it talks to."""

    def _compress_context(self, *args: Any, **options: Any) -> Any:
        with seams.acting_for(self):
            return super()._compress_context(*args, **options)

    def _model_supports_vision(self, *args: Any, **options: Any) -> bool:
        """Hermes would ask what the model in the user's configuration can do. Tokens are tracked of text alone."""
        return not self._backend.tracks_tokens

    def _describe_image_for_anthropic_fallback(self, image_url: str, role: str, *args: Any, **options: Any) -> str:
        """What a model that sees no images reads in place of one. Hermes would have another model describe it."""
        return "[An image was attached here, which you cannot see.]"

    def _spawn_background_review(self, *args: Any, **options: Any) -> None:
        """Hermes' review of a conversation for its memory runs on a model after the rollout: it has no place here."""

    # Keeping what it said

    def _build_assistant_message(self, assistant_message: Any, finish_reason: str, **options: Any) -> dict[str, Any]:
        message: dict[str, Any] = super()._build_assistant_message(assistant_message, finish_reason, **options)
        turn = self._rollout.last_turn
        if turn is not None:
            message[TURN_KEY] = turn.ref
            if not all(call.ok for call in turn.calls):  # those that are none, Hermes has never seen
                message["content"] = stored_message(turn)["content"]
        return message

    def _handle_max_iterations(self, messages: list[dict[str, Any]], api_call_count: int, **options: Any) -> str:
        response: str = super()._handle_max_iterations(messages, api_call_count, **options)
        turn = self._rollout.last_turn
        if messages[-1]["role"] == "assistant" and turn is not None:
            messages[-1][TURN_KEY] = turn.ref
        return response

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
        spoken, results = spoken_and_results(messages)
        return with_results(super()._convert_to_trajectory_format(spoken, user_query, completed), spoken, results)

    # Running tools

    def _execute_tool_calls(self, assistant_message: Any, *args: Any, **options: Any) -> None:
        sandbox = self._rollout.sandbox
        if sandbox is not None:
            sandbox.register(sandbox.hermes_id)
        names = [call.function.name for call in assistant_message.tool_calls]
        # Several calls of other tools may run on other threads, for which this one then waits.
        here = set(names) == {"terminal"} or (len(names) == 1 and names[0] in SANDBOX_TOOLS)
        with contextlib.nullcontext() if here and sandbox and sandbox.steps_out else turnstile.outside():
            super()._execute_tool_calls(assistant_message, *args, **options)

    def _dispatch_delegate_task(self, function_args: dict[str, Any], *args: Any, **options: Any) -> str:
        """Run subagents within the rollout: newer releases send them to the background, where they would outlive it."""
        with seams.acting_for(self):
            return seams.release().delegate(function_args, self)

    def _make_subagent(self, new: AIAgent, *args: Any, **options: Any) -> None:
        """Make the agent that Hermes constructs for a subtask one of ours."""
        new.__class__ = Subagent
        Subagent.__init__(new, self, *args, **options)

    def _cleanup_task_resources(self, task_id: str, *args: Any, **options: Any) -> None:
        """A sandbox is released by whoever opened it, after the verifier."""
        if self._rollout.sandbox is None:
            super()._cleanup_task_resources(task_id, *args, **options)

    def interrupt(self, message: str | None = None, *args: Any, **options: Any) -> Any:
        """Stop the model request, the tools and the subagents under way."""
        stopped = super().interrupt(message, *args, **options)
        self._rollout.cancel_requests()
        return stopped

    def hard_interrupt(self, *args: Any, **options: Any) -> Any:
        """From 0.20: as :meth:`interrupt`, which Hermes calls past this class here."""
        stopped = super().hard_interrupt(*args, **options)
        self._rollout.cancel_requests()
        return stopped


class Subagent(Hooks):
    """An agent that ``delegate_task`` starts, on its parent's server, ledger and sandbox."""

    def __init__(self, parent: Hooks, *args: Any, **options: Any) -> None:
        options.update(zip(list(HERMES_PARAMETERS)[1:], args, strict=False))
        self._backend = parent._backend
        own = {name: value for name, value in options.items() if name not in HERMES_ROUTES}
        self._construct(parent._rollout.for_subagent(), own, parent._sampling, parent._max_tool_call_retries)

    def run_conversation(self, *args: Any, **options: Any) -> dict[str, Any]:
        task_id = options.get("task_id")
        if self._rollout.sandbox is not None and task_id:
            self._rollout.sandbox.register(task_id)
        try:
            with seams.acting_for(self):
                result: dict[str, Any] = super().run_conversation(*args, **options)
            return result
        finally:
            set_activity_callback(None)


def weak_method(method: Callable[..., T]) -> Callable[..., T]:
    """Call ``method`` without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **options: Any) -> T:
        target = reference()
        assert target is not None
        return target(*args, **options)

    return call
