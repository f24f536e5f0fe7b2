"""Who hears an answer while it is sampled. In a rollout nobody does, and servers are asked for whole answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple, Protocol, TypeVar

__all__ = ["Delta", "TokenListener", "hearing", "text_listener", "token_listener"]

T = TypeVar("T")


class Delta(NamedTuple):
    """A further piece of an answer.

    Attributes:
        kind: what it belongs to; of a ``call``, ``text`` is the name of the tool, told once the model has written it.
    """

    kind: Literal["content", "reasoning", "call"]
    text: str


class TokenListener(Protocol):
    """Hears the tokens of one answer."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """A request for it is made: the first, one more after a failure, or one that goes on after its first part."""

    def more(self, ids: Sequence[int]) -> None:
        """These were sampled."""


text_listener: ContextVar[Callable[[Delta], object] | None] = ContextVar("hermes_atropos_text_listener", default=None)
token_listener: ContextVar[TokenListener | None] = ContextVar("hermes_atropos_token_listener", default=None)


@contextlib.contextmanager
def hearing(variable: ContextVar[T], listener: T) -> Iterator[None]:
    """For the length of the block, the answers that are asked for in this context are heard by ``listener``."""
    token = variable.set(listener)
    try:
        yield
    finally:
        variable.reset(token)
