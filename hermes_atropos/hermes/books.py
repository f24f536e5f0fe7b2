"""Hermes' books: every answer of the server is in the counters that Hermes keeps, and in its session database.

Hermes counts an answer in its loop, from the usage that comes with it. It counts none that was cut off or refused, nor
what it asks beside the loop (the summary at the iteration limit, those of compressions), and it never sees the answers
whose tool calls were faulty. What it has left out is added here, whichever release left out what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from hermes_atropos.backends import ModelTurn

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["Books", "books_of", "usage_of"]


#: Hermes' result says of them what its ``session_`` counters say.
RESULT_KEYS = (
    *("cache_read_tokens", "completion_tokens", "input_tokens", "output_tokens", "prompt_tokens", "reasoning_tokens"),
    "total_tokens",
)


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens and calls, as Hermes' ``session_*`` counters have them: ``input`` leaves out what was ``cached``."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0
    calls: int = 0

    @classmethod
    def of(cls, turns: Iterable[ModelTurn]) -> Counts:
        """What answers took; none where the server told nothing."""
        known = [turn for turn in turns if turn.prompt_tokens or turn.completion_tokens]
        return cls(
            input=sum(turn.prompt_tokens - turn.cached_tokens for turn in known),
            output=sum(turn.completion_tokens for turn in known),
            cached=sum(turn.cached_tokens for turn in known),
            reasoning=sum(turn.reasoning_tokens for turn in known),
            calls=len(known),
        )

    @classmethod
    def in_books_of(cls, agent: Hooks) -> Counts:
        """What the agent's counters say."""
        return cls(
            agent.session_input_tokens,
            agent.session_output_tokens,
            agent.session_cache_read_tokens,
            agent.session_reasoning_tokens,
            agent.session_api_calls,
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def beyond(self, other: Counts) -> Counts:
        """How much more than the other it is, and 0 where it is less."""
        return Counts(*(max(0, one - two) for one, two in zip(astuple(self), astuple(other), strict=True)))


class Books:
    """What an agent's server answers during a run, beside what Hermes counts of it."""

    def __init__(self, agent: Hooks) -> None:
        self._settled = Counts.in_books_of(agent)

    def settle(self, agent: Hooks, answers: list[ModelTurn]) -> None:
        """Count those answers since the last settlement that Hermes has not; call it when it has had the time to."""
        missing = (self._settled + Counts.of(answers)).beyond(Counts.in_books_of(agent))
        answers.clear()
        if missing != Counts():
            _enter(agent, missing)
        self._settled = Counts.in_books_of(agent)


def _enter(agent: Hooks, counts: Counts) -> None:
    """Add to the counters and to the session database what Hermes' loop adds for an answer."""
    prompt = counts.input + counts.cached
    agent.session_prompt_tokens += prompt
    agent.session_completion_tokens += counts.output
    agent.session_total_tokens += prompt + counts.output
    agent.session_input_tokens += counts.input
    agent.session_output_tokens += counts.output
    agent.session_cache_read_tokens += counts.cached
    agent.session_reasoning_tokens += counts.reasoning
    agent.session_api_calls += counts.calls
    database = agent._session_db
    if database and agent.session_id:
        database.update_token_counts(
            agent.session_id,
            input_tokens=counts.input,
            output_tokens=counts.output,
            cache_read_tokens=counts.cached,
            reasoning_tokens=counts.reasoning,
            billing_provider=agent.provider,
            billing_base_url=agent.base_url,
            model=agent.model,
            api_call_count=counts.calls,
        )


def books_of(agent: Hooks) -> dict[str, int]:
    """What the agent's books say, by the key in Hermes' result."""
    return {key: getattr(agent, f"session_{key}") for key in RESULT_KEYS}


def usage_of(turn: ModelTurn) -> CompletionUsage | None:
    """What Hermes' loop counts of an answer; None where the server told nothing."""
    if not (turn.prompt_tokens or turn.completion_tokens):
        return None
    return CompletionUsage(
        prompt_tokens=turn.prompt_tokens,
        completion_tokens=turn.completion_tokens,
        total_tokens=turn.prompt_tokens + turn.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=turn.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=turn.reasoning_tokens),
    )
