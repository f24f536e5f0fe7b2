"""For which of our agents the current code of Hermes runs; Hermes' worker threads inherit it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["acting_agent", "acting_beside", "acting_for"]

# A weak reference, because a thread or a task may outlive the rollout whose context it has.
_acting: ContextVar[tuple[weakref.ref[Hooks], bool] | None] = ContextVar("hermes_atropos_agent", default=None)


@contextlib.contextmanager
def acting_for(agent: Hooks, *, beside: bool = False) -> Iterator[None]:
    """For the length of the block, what Hermes does in this context it does for ``agent``.

    Args:
        beside: what it starts there is no part of the agent's rollout.
    """
    token = _acting.set((weakref.ref(agent), beside))
    try:
        yield
    finally:
        _acting.reset(token)


def acting_agent() -> Hooks | None:
    """The agent of ours for which the current code runs; None elsewhere."""
    acting = _acting.get()
    return None if acting is None else acting[0]()


def acting_beside() -> bool:
    """Whether the current code runs beside its agent's rollout."""
    acting = _acting.get()
    return acting is not None and acting[1]
