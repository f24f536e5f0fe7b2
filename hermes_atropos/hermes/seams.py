"""Upstream's own code with some of its parts exchanged, and upstream left as it is."""

from __future__ import annotations

import builtins
import types
from collections.abc import Mapping
from typing import Any

__all__ = ["rebound"]


def rebound(
    function: types.FunctionType, *, imports: Mapping[str, Mapping[str, Any]] | None = None, **names: Any
) -> types.FunctionType:
    """The same code, in which some names mean something else.

    What a function of Hermes does differs from release to release, and this is what it does in the installed one. Its
    module, and whoever else calls it, see no change.

    Args:
        imports: for each module that the function imports as it runs, what it finds there in place of what is there.
        names: global names of the function's module.
    """
    if imports is not None:
        names["__builtins__"] = {**vars(builtins), "__import__": importing(imports)}
    twin = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def importing(exchanged: Mapping[str, Mapping[str, Any]]) -> Any:
    """An ``__import__`` for the import statements of one function."""

    def import_(name: str, *args: Any) -> Any:
        module = builtins.__import__(name, *args)
        return types.SimpleNamespace(**{**vars(module), **exchanged[name]}) if name in exchanged else module

    return import_
