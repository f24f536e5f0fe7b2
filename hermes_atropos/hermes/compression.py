"""What Hermes' compression of a history does otherwise for our agents; ``seams`` puts it in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent.context_compressor import SUMMARY_PREFIX

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["keeping_the_task", "no_summary", "own_context_length", "summarise"]


def own_context_length(agent: Hooks, original: Callable[..., int], *args: Any, **options: Any) -> int:
    """The length that Hermes compresses by is that of the server. Hermes would guess it by the model's name, and look
    for it at models.dev and openrouter.ai."""
    configured = options.get("config_context_length")
    return agent._length_of_context(configured if isinstance(configured, int) else None)


def summarise(agent: Hooks, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The summary comes from the rollout's own server."""
    return agent._auxiliary_call(*args, **options)


def keeping_the_task(agent: Hooks, original: Callable[..., int], compressor: Any, messages: Any) -> int:
    """How many messages at the beginning are left as they are: the task too, where the user said nothing else.

    Hermes takes up the last user message behind the summary, and with it whatever came after. Where that is all that
    the user ever said, it would compress no more than one step from the second time on.
    """
    kept = original(compressor, messages)
    asked = [n for n, message in enumerate(messages) if message.get("role") == "user" and not is_summary(message)]
    return kept + 1 if asked == [kept] else kept


def no_summary(agent: Hooks, original: Callable[..., int], compressor: Any, messages: Any, head_end: int) -> int:
    """Where the last answer stands that must not be compressed; -1 if there is none.

    Before 0.21, Hermes takes an earlier summary for one, and with it keeps whatever came after.
    """
    found = original(compressor, messages, head_end)
    return -1 if found >= 0 and is_summary(messages[found]) else found


def is_summary(message: Any) -> bool:
    """Whether a message is what an earlier compression left."""
    return SUMMARY_PREFIX in str(message.get("content"))
