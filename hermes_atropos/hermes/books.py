"""Hermes' books: every answer of the server is in the counters that Hermes keeps, and in its session database.

Hermes counts an answer in its loop, from the usage that comes with it. It counts none that was cut off or refused, nor
what it asks beside the loop (the summary at the iteration limit, those of compressions), and it never sees the answers
whose tool calls were faulty. What it has left out is added here, whichever release left out what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hermes_atropos.backends import ModelTurn

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["Books", "books_of", "usage_of"]

#: The kinds of tokens that Hermes counts, each in ``session_…`` of its agent: of the input, what was not cached.
TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens")


class Books:
    """What an agent's server answers during a run, beside what Hermes counts of it."""

    def __init__(self, agent: Hooks) -> None:
        self._settled = counted_by(agent)

    def settle(self, agent: Hooks, answers: list[ModelTurn]) -> None:
        """Count those answers since the last settlement that Hermes has not; call it when it has had the time to."""
        missing = self._settled + taken_by(answers) - counted_by(agent)  # no less than 0 of each
        answers.clear()
        if missing:
            _enter(agent, missing)
        self._settled = counted_by(agent)


def counted_by(agent: Hooks) -> Counter[str]:
    """What the agent's counters say."""
    return Counter({name: getattr(agent, f"session_{name}") for name in (*TOKENS, "api_calls")})


def taken_by(turns: Iterable[ModelTurn]) -> Counter[str]:
    """What answers took, by the same names; none where the server told nothing."""
    known = [turn for turn in turns if turn.prompt_tokens or turn.completion_tokens]
    return Counter(
        input_tokens=sum(turn.prompt_tokens - turn.cached_tokens for turn in known),
        output_tokens=sum(turn.completion_tokens for turn in known),
        cache_read_tokens=sum(turn.cached_tokens for turn in known),
        reasoning_tokens=sum(turn.reasoning_tokens for turn in known),
        api_calls=len(known),
    )


def _enter(agent: Hooks, missing: Counter[str]) -> None:
    """Add to the counters and to the session database what Hermes' loop adds for an answer."""
    prompt, completion = missing["input_tokens"] + missing["cache_read_tokens"], missing["output_tokens"]
    sums = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    for name, count in {**missing, **sums}.items():
        setattr(agent, f"session_{name}", getattr(agent, f"session_{name}") + count)
    database = agent._session_db
    if database and agent.session_id:
        database.update_token_counts(
            agent.session_id,
            **{name: missing[name] for name in TOKENS},
            billing_provider=agent.provider,
            billing_base_url=agent.base_url,
            model=agent.model,
            api_call_count=missing["api_calls"],
        )


def books_of(agent: Hooks) -> dict[str, int]:
    """What the agent's books say, by the key in Hermes' result."""
    keys = (*TOKENS, "prompt_tokens", "completion_tokens", "total_tokens")
    return {key: getattr(agent, f"session_{key}") for key in keys}


def usage_of(turn: ModelTurn) -> dict[str, Any] | None:
    """What Hermes' loop counts of an answer, in OpenAI's words; None where the server told nothing."""
    if not (turn.prompt_tokens or turn.completion_tokens):
        return None
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.completion_tokens,
        "total_tokens": turn.prompt_tokens + turn.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": turn.reasoning_tokens},
    }
