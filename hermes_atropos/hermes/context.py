"""How long Hermes takes the model's context for: by that it compresses, and shows how full it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.model_metadata import DEFAULT_FALLBACK_CONTEXT, MINIMUM_CONTEXT_LENGTH

from hermes_atropos.backends import Backend
from hermes_atropos.backends.context import ask_context_length
from hermes_atropos.runtime import running_loop

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["ContextLength"]


class ContextLength:
    """What the constructor was given, else what the user's configuration says, else what the server says of itself.

    Hermes refuses a model with less than 64,000 tokens, when an agent is constructed and when it switches. People train
    such models, so it is told that minimum until it is through, and the truth then.

    On the thread of an event loop the server's answer is not waited for, as the server may run on that loop: there it
    is known from the first run on.
    """

    def __init__(self, backend: Backend, given: int | None) -> None:
        self.given = given
        self._told = ask_context_length(backend)
        self._configured: int | None = None
        self._said: int | None = None  # to Hermes
        self._threshold: int | None = None  # that Hermes made of it
        self._checking = True

    def for_hermes(self, configured: int | None) -> int:
        """The answer to Hermes' question; ``configured`` is what it found in the user's configuration."""
        self._configured = configured
        self._said = self._tokens()
        if self._checking:
            self._said = max(self._said, MINIMUM_CONTEXT_LENGTH)
        return self._said

    def correct(self, agent: Hooks) -> None:
        """Have the agent's compressor go by what is known by now, where Hermes was told otherwise.

        A threshold that somebody set meanwhile stays.
        """
        compressor = agent.context_compressor
        told = compressor.context_length  # from 0.20, it asks when it is asked
        threshold = compressor.threshold_tokens
        self._threshold = self._threshold or threshold  # the first time, an agent is being made, or switched
        self._checking = False
        length = self._tokens()
        if self._said in (None, length) or told != self._said:
            return
        self._said = length
        compressor.update_model(
            model=agent.model,
            context_length=length,
            base_url=agent.base_url,
            api_key=agent.api_key,
            provider=agent.provider,
        )
        if threshold == self._threshold:
            self._threshold = compressor.threshold_tokens
        else:
            compressor.threshold_tokens = threshold

    def _tokens(self) -> int:
        known = self.given or self._configured
        if not known and (self._told.done() or running_loop() is None):
            known = self._told.result()
        return known or DEFAULT_FALLBACK_CONTEXT
