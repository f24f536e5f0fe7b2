"""Hermes' result and what this library adds to it: from Hermes' dict to a trajectory, from a turn to a completion."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from openai.types.chat import ChatCompletion

from hermes_atropos.backends import ModelTurn
from hermes_atropos.conversation import Conversation, stop_reason_of
from hermes_atropos.exports.atropos import ManagedState
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.trajectory import StopReason

__all__ = [
    "conversation_of",
    "finished",
    "history_of",
    "spoken_and_results",
    "stop_reason",
    "to_completion",
    "with_results",
    "without_system",
]

Message = dict[str, Any]


def finished(
    result: Mapping[str, Any],
    rollout: Rollout,
    *,
    reason: StopReason,
    messages: list[Message],
    tools: list[Any],
    sampling: Mapping[str, Any],
    task_id: str | None,
) -> dict[str, Any]:
    """Hermes' result with the trajectory beside it; a failed run gets the keys that Hermes leaves out.

    Args:
        result: what Hermes' loop returned; empty where it raised.
        messages: the whole conversation, as :func:`conversation_of` has it.
    """
    conversation = rollout.conversation
    system_prompt = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
    without = without_system(messages)
    trajectory = conversation.result(
        [{"role": "system", "content": system_prompt}, *without] if system_prompt else without,
        reason,
        tools=tools,
        final_response=last_words(result, conversation),
        error=describe(rollout.failure) or result.get("error"),
        sampling=dict(sampling),
    )
    failed: dict[str, Any] = {} if rollout.failure is None else {"failed": True, "cause": rollout.failure}
    if rollout.signal is not None and rollout.signal in str(result.get("final_response")):
        failed["final_response"] = f"The model call failed: {trajectory.error}"  # Hermes knows our signal alone
    return {
        "final_response": None,
        "api_calls": len(conversation.steps),
        **result,
        "completed": reason is StopReason.COMPLETED,
        **failed,
        "error": trajectory.error,
        "messages": without,
        "trajectory": trajectory,
        "managed_state": ManagedState(trajectory.sequences),
        "stop_reason": reason,
        "system_prompt": system_prompt,
        "task_id": task_id,
    }


def conversation_of(result: Mapping[str, Any], rollout: Rollout, reason: StopReason) -> list[Message]:
    """All messages of a run, failed attempts included."""
    conversation = rollout.conversation
    messages = conversation.expand(result.get("messages") or [])
    if rollout.failure is not None or reason is StopReason.EMPTY_RESPONSE:
        # Hermes returns without the call that failed, and drops what led to an empty answer.
        return conversation.messages or messages
    return messages


def stop_reason(result: Mapping[str, Any], rollout: Rollout, max_iterations: int) -> StopReason:
    """Why the run ended: from our own failure if there was one, else from what Hermes says of it."""
    if rollout.cancelled:
        return StopReason.CANCELLED
    if rollout.failure is not None:
        return stop_reason_of(rollout.failure)
    exit_reason = str(result.get("turn_exit_reason") or "")
    if result.get("interrupted") or exit_reason.startswith("interrupted"):
        return StopReason.INTERRUPTED
    if exit_reason.startswith(("max_iterations", "budget", "pending_tool_result")):
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


def last_words(result: Mapping[str, Any], conversation: Conversation) -> str:
    """The final response if the model said it, not Hermes: else the model's last answer, if that called nothing."""
    turns = [turn for attempts in conversation.steps for turn in attempts]
    response = (result.get("final_response") or "").strip()
    if any(response == (turn.content or "").strip() for turn in turns):
        return response
    return (turns[-1].content or "").strip() if turns and not turns[-1].calls else ""


def describe(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def without_system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def history_of(messages: Sequence[Mapping[str, Any]] | None) -> list[Message] | None:
    """A history to go on from, as Hermes had it: it would take retries for damage. They come back in each prompt."""
    return None if messages is None else Conversation.contract(messages)


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


def spoken_and_results(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The user's and the model's messages, and the tool results that followed each."""
    spoken: list[Message] = []
    results: list[list[Message]] = []
    for message in messages:
        if message["role"] == "tool" and results:
            results[-1].append(message)
        elif message["role"] in ("user", "assistant"):
            spoken.append(message)
            results.append([])
    return spoken, results


def with_results(
    saved: list[dict[str, Any]], spoken: Sequence[Message], results: Sequence[Sequence[Message]]
) -> list[dict[str, Any]]:
    """Hermes' trajectory of the ``spoken`` messages, and behind each the results that followed it."""
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
