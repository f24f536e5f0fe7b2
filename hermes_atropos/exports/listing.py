"""The exports by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["EXPORTS", "register"]

SomeExport = TypeVar("SomeExport", bound=Callable[..., Any])

#: By name: what makes of the rollouts of one item, and a score for each, the data that a trainer takes.
EXPORTS: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[SomeExport], SomeExport]:
    """Decorator: add an export, called with the results and the scores of one item, to ``EXPORTS``."""

    def add(export: SomeExport) -> SomeExport:
        EXPORTS[name] = export
        return export

    return add
