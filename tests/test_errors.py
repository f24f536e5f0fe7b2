"""The error tree: each error can go from one process to another, with all that it carries."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from hermes_atropos import errors

TREE = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_it_arrives_as_it_was(kind: type[errors.HermesAtroposError]) -> None:
    parameters = list(inspect.signature(kind.__init__).parameters.values())
    given: dict[str, Any] = {
        parameter.name: f"the {parameter.name}" for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    error = kind("what happened", **given)
    for arrived in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(arrived) is kind
        assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))
