"""What Hermes' programs ask beside a conversation (a title, an approval): answered by the server of the exchange.

Hermes sends these calls to the provider that the user's configuration names for them, else to the main one. The latter
is the server of the exchange, which has no address to Hermes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from openai.types.chat import ChatCompletion

from hermes_atropos.backends import Backend
from hermes_atropos.conversation import stop_reason_of
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.result import to_completion
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.messages import text_of
from hermes_atropos.runtime import run_in_rollout_thread
from hermes_atropos.trajectory import AgentResult, StopReason

__all__ = ["answered_by"]


@contextlib.contextmanager
def answered_by(backend: Backend, model: str, record: Callable[[AgentResult], object]) -> Iterator[None]:
    """For the length of the block, Hermes' auxiliary calls are rollouts of their own on ``backend``.

    A call whose provider the user chose goes there, and one that shows an image to a backend that sees none goes where
    Hermes finds a model that does.

    Args:
        record: gets what each leaves.
    """
    from agent import auxiliary_client

    theirs, theirs_async = auxiliary_client.call_llm, auxiliary_client.async_call_llm

    def ours(task: str | None, request: Mapping[str, Any]) -> bool:
        chosen = (request.get(name) for name in ("provider", "model", "base_url", "api_key"))
        provider = auxiliary_client._resolve_task_provider_model(task, *chosen)[0]
        seen = not backend.tracks_tokens or all(text_of(m.get("content")) is not None for m in request["messages"])
        return provider in (None, "", "auto") and seen and not request.get("stream")

    def call(task: str | None = None, **request: Any) -> Any:
        return _answer(backend, model, record, task, request) if ours(task, request) else theirs(task, **request)

    async def call_async(task: str | None = None, **request: Any) -> Any:
        if not ours(task, request):
            return await theirs_async(task, **request)
        return await run_in_rollout_thread(lambda: _answer(backend, model, record, task, request))

    with (
        seams.in_place_of("agent.auxiliary_client", "call_llm", call),
        seams.in_place_of("agent.auxiliary_client", "async_call_llm", call_async),
    ):
        yield


def _answer(
    backend: Backend,
    model: str,
    record: Callable[[AgentResult], object],
    task: str | None,
    request: Mapping[str, Any],
) -> ChatCompletion:
    rollout, reason = Rollout.on(backend, None, max_tool_call_retries=0), StopReason.COMPLETED
    tools: Sequence[Mapping[str, Any]] = request.get("tools") or []
    sampling = {name: request[name] for name in ("temperature", "max_tokens") if request.get(name) is not None}
    try:
        turn = rollout.ask(request["messages"], tools or None, sampling, interrupted=lambda: False, compresses=False)
        return _counted(to_completion(turn, model), task)
    except BaseException as error:
        reason = stop_reason_of(rollout.failure or error)
        raise
    finally:
        conversation = rollout.conversation
        last = conversation.messages[-1] if conversation.messages and reason is StopReason.COMPLETED else {}
        result = conversation.result(
            conversation.messages,
            reason,
            tools=list(tools),
            sampling=sampling,
            final_response=last.get("content") or "",
            error=None if rollout.failure is None else str(rollout.failure),
        )
        result.metadata["auxiliary"] = task
        record(result)


def _counted(completion: ChatCompletion, task: str | None) -> ChatCompletion:
    """From 0.19 on, Hermes counts what a call took where it looks whether the answer is one."""
    from agent.auxiliary_client import _validate_llm_response

    _validate_llm_response(completion, task)
    return completion
