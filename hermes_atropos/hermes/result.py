"""Hermes' result and what this library adds to it: from Hermes' dict to a trajectory, from a turn to a completion."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openai.types.chat import ChatCompletion

from hermes_atropos.backends import ModelTurn
from hermes_atropos.conversation import Conversation, stop_reason_of
from hermes_atropos.exports.atropos import ManagedState
from hermes_atropos.hermes.books import usage_of
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.trajectory import StopReason

__all__ = ["conversation_of", "finished", "history_of", "stop_reason", "to_completion", "with_results"]

Message = dict[str, Any]


class Result(dict[str, Any]):
    """Hermes' result: without a failure it has no key ``error``, as in Hermes, and ``result["error"]`` is None."""

    def __missing__(self, key: str) -> None:
        if key != "error":
            raise KeyError(key)


def finished(
    result: Mapping[str, Any],
    rollout: Rollout,
    *,
    reason: StopReason,
    messages: list[Message],
    tools: list[Any],
    counts: Mapping[str, int],
    task_id: str | None,
) -> dict[str, Any]:
    """Hermes' result with the trajectory beside it; a failed run gets the keys that Hermes leaves out.

    Args:
        result: what Hermes' loop returned; empty where it raised.
        messages: the whole conversation, as :func:`conversation_of` has it.
        counts: what the agent's books say, by the key in Hermes' result.
    """
    conversation = rollout.conversation
    system_prompt = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
    trajectory = conversation.result(
        [{"role": "system", "content": system_prompt}, *messages] if system_prompt else messages,
        reason,
        tools=tools,
        final_response=last_words(result, conversation),
        error=fault(result, rollout, reason),
        sampling=rollout.sampling,
    )
    known = {
        "final_response": None,
        "completed": False,
        **result,
        "api_calls": result.get("api_calls", len(conversation.steps)) + rollout.retried,
        **counts,
        **failed(result, rollout, trajectory.error),
        "messages": messages,
        "trajectory": trajectory,
        "managed_state": ManagedState(trajectory.sequences),
        "stop_reason": reason,
        "system_prompt": system_prompt,
        "task_id": task_id,
    }
    return Result(known)


def failed(result: Mapping[str, Any], rollout: Rollout, error: str | None) -> dict[str, Any]:
    """What a failure changes in Hermes' result.

    Of a failed call Hermes knows our signal alone. Where it has no words of its own, the cause is told.
    """
    if rollout.failure is None:
        return {} if error is None else {"error": error}
    changed: dict[str, Any] = {"completed": False, "failed": True, "cause": rollout.failure}
    signal = (rollout.signal or "").partition(":")[0]
    if signal in (result.get("error") or signal):
        changed["error"] = error
        if rollout.signal and result.get("final_response"):
            changed["final_response"] = f"The model call failed: {error}"
    return changed


def conversation_of(result: Mapping[str, Any], rollout: Rollout, reason: StopReason) -> list[Message]:
    """All messages of a run but the system prompt, failed attempts included."""
    conversation = rollout.conversation
    messages = conversation.expand(result.get("messages") or [])
    if rollout.failure is not None or reason is StopReason.EMPTY_RESPONSE:
        # Hermes returns without the call that failed, and drops what led to an empty answer.
        messages = conversation.messages or messages
    return [message for message in messages if message["role"] != "system"]


#: How Hermes says that a turn ended (`turn_exit_reason`, without what stands in parentheses), in 0.13 to 0.22; None
#: where only the rest of its result tells. Anything else that it says is an error.
EXIT_REASONS: Mapping[str, StopReason | None] = {
    "": None,
    "budget_exhausted": StopReason.ITERATION_LIMIT,
    "context_compression_exhausted": StopReason.CONTEXT_LENGTH,
    "context_compression_timeout": StopReason.CONTEXT_LENGTH,
    "empty_response_exhausted": StopReason.EMPTY_RESPONSE,
    "fallback_prior_turn_content": None,
    "guardrail_halt": StopReason.ITERATION_LIMIT,
    "interrupted_by_system": StopReason.INTERRUPTED,
    "interrupted_by_user": StopReason.INTERRUPTED,
    "interrupted_during_api_call": StopReason.INTERRUPTED,
    "max_iterations_reached": StopReason.ITERATION_LIMIT,
    "ollama_runtime_context_too_small": StopReason.CONTEXT_LENGTH,
    "partial_stream_recovery": None,
    "pending_tool_result": StopReason.ITERATION_LIMIT,
    "redirect_restart_limit_exceeded": StopReason.INTERRUPTED,
    "review_input_budget_exhausted": StopReason.ITERATION_LIMIT,
    "text_response": None,
    "unknown": None,
}


def stop_reason(result: Mapping[str, Any], rollout: Rollout, max_iterations: int) -> StopReason:
    """Why the run ended: from our own failure if there was one, else from what Hermes says of it."""
    if rollout.cancelled:
        return StopReason.CANCELLED
    if rollout.failure is not None:
        return stop_reason_of(rollout.failure)
    if result.get("interrupted"):
        return StopReason.INTERRUPTED
    exit_reason = str(result.get("turn_exit_reason") or "")
    known = EXIT_REASONS.get(exit_reason.partition("(")[0], StopReason.ERROR)
    if known is not None:
        return known
    if "length" in exit_reason or (result.get("partial") and "truncat" in str(result.get("error")).lower()):
        return StopReason.TRUNCATED
    if result.get("completed"):
        return StopReason.COMPLETED
    # After an empty answer Hermes takes no note of the limit.
    at_limit = not result.get("error") and result.get("api_calls", 0) >= max_iterations
    return StopReason.ITERATION_LIMIT if at_limit else StopReason.ERROR


def fault(result: Mapping[str, Any], rollout: Rollout, reason: StopReason) -> str | None:
    """What went wrong: in words of our own, or Hermes', and at the least its name for the end; None if nothing did."""
    if rollout.failure is not None:
        return f"{type(rollout.failure).__name__}: {rollout.failure}"
    unnamed = f"Hermes ended the turn: {result.get('turn_exit_reason')}" if reason is StopReason.ERROR else None
    return result.get("error") or unnamed


def last_words(result: Mapping[str, Any], conversation: Conversation) -> str:
    """The final response if the model said it, not Hermes: else the model's last answer, if that called nothing."""
    turns = [turn for attempts in conversation.steps for turn in attempts]
    response = (result.get("final_response") or "").strip()
    if any(response == (turn.content or "").strip() for turn in turns):
        return response
    return (turns[-1].content or "").strip() if turns and not turns[-1].calls else ""


def history_of(messages: Sequence[Mapping[str, Any]] | None) -> list[Message] | None:
    """A history to go on from, as Hermes had it: it would take retries for damage. They come back in each prompt."""
    return None if messages is None else Conversation.contract(messages)


def to_completion(turn: ModelTurn, model: str) -> ChatCompletion:
    """The answer as Hermes expects it from an OpenAI client, with the usage that Hermes counts."""
    calls = [call.to_openai() for call in turn.calls if call.ok]
    message = {
        "role": "assistant",
        "content": as_written(turn) if turn.finish_reason == "length" else turn.content,
        "tool_calls": calls or None,
        "reasoning_content": turn.reasoning,
    }
    finish_reason = "tool_calls" if calls and turn.finish_reason != "length" else turn.finish_reason
    return ChatCompletion.model_validate(
        {
            "id": turn.ref,
            "created": int(time.time()),
            "model": turn.model or model,
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
            "usage": usage_of(turn),
        }
    )


def as_written(turn: ModelTurn) -> str | None:
    """The content of an answer that was cut off, for Hermes to go on from: with the space at its end; and where it has
    only begun to think, that."""
    if turn.content is None and turn.reasoning and not turn.calls and "<think>" in turn.raw:
        return turn.raw
    return turn.content and turn.content.rstrip() + turn.raw[len(turn.raw.rstrip()) :]


def with_results(
    messages: Sequence[Message], convert: Callable[[list[Message]], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Hermes' trajectory of what was said, and behind each message the tool results that followed it.

    Args:
        convert: makes a trajectory of the user's and the model's messages.
    """
    spoken: list[Message] = []
    results: list[list[Message]] = []
    for message in messages:
        if message["role"] == "tool" and results:
            results[-1].append(message)
        elif message["role"] in ("user", "assistant"):
            spoken.append(message)
            results.append([])
    saved = convert(spoken)
    whole = saved[: -len(spoken)]
    for turn, entry, answers in zip(spoken, saved[-len(spoken) :], results, strict=True):
        whole.append(entry)
        if answers:
            whole.append({"from": "tool", "value": "\n".join(_saved_result(turn, answer) for answer in answers)})
    return whole


def _saved_result(turn: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """A tool's answer as Hermes saves it (`agent/agent_runtime_helpers.py`)."""
    names = {call["id"]: call["function"]["name"] for call in turn.get("tool_calls") or []}
    content = result["content"]
    if isinstance(content, str) and content.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            content = json.loads(content)
    name = names.get(result["tool_call_id"]) or result.get("name")
    answer = {"tool_call_id": result["tool_call_id"], "name": name, "content": content}
    return f"<tool_response>\n{json.dumps(answer, ensure_ascii=False)}\n</tool_response>"
