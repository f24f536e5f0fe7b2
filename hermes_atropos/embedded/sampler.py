"""How the next token is drawn, and what a request may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_atropos.embedded.llama import log_softmax
from hermes_atropos.errors import SamplingError
from hermes_atropos.servers.sampling import NEUTRAL
from hermes_atropos.values import is_number

__all__ = ["Sampling", "draw", "read_sampling"]

# What a request may give at this value alone, unless it is among ``_PARAMETERS``.
_OFF: dict[str, Any] = {**NEUTRAL, "min_tokens": 0, "logit_bias": {}}


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters of a request, by vLLM's names; temperature 0 is greedy, ``top_k`` −1 is off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False


def read_sampling(given: Mapping[str, Any]) -> Sampling:
    """The parameters of a request; None is what was not given.

    Raises:
        SamplingError: one that isn't known, or a value that can't be.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted.keys() - _PARAMETERS.keys():
        if name not in _OFF:
            raise SamplingError(f"the embedded model does not know {name}: leave it out")
        if wanted[name] != _OFF[name]:
            raise SamplingError(f"the embedded model has no {name}: leave it out, or give {_OFF[name]!r}")
    asked = {name: value for name, value in wanted.items() if name in _PARAMETERS}
    for name, value in asked.items():
        fits, remedy = _PARAMETERS[name]
        if not fits(value):
            raise SamplingError(f"{name}={value!r} can't be: {remedy}")
    stop = asked.pop("stop", ())
    stop_ids = frozenset(asked.pop("stop_token_ids", ()))
    return Sampling(stop=(stop,) if isinstance(stop, str) else tuple(stop), stop_token_ids=stop_ids, **asked)


def _whole(at_least: int) -> Callable[[Any], bool]:
    return lambda value: is_number(value, whole=True) and value >= at_least


# What a request may give: which values fit, and what is said of the others.
_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: is_number(value) and value >= 0, "give 0 (greedy) or more"),
    "top_p": (lambda value: is_number(value) and 0 < value <= 1, "give more than 0, and 1 at most"),
    "top_k": (
        lambda value: is_number(value, whole=True) and (value >= 1 or value in (0, -1)),
        "give 1 or more, or -1 for all",
    ),
    "seed": (_whole(0), "give a whole number of 0 or more"),
    "n": (_whole(1), "give 1 or more"),
    "max_tokens": (_whole(1), "give 1 or more"),
    "stop": (
        lambda value: all(isinstance(one, str) and one for one in ([value] if isinstance(value, str) else value)),
        "give a text or a list of texts",
    ),
    "stop_token_ids": (lambda value: all(is_number(one, whole=True) for one in value), "give a list of token ids"),
    "ignore_eos": (lambda value: isinstance(value, bool), "give True or False"),
}


def draw(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> tuple[int, float]:
    """One token, and its logprob in the softmax of ``logits`` over the temperature (over 1 where that is 0).

    ``top_k`` and ``top_p`` leave the logprob as it is.

    Args:
        logits: [vocab_size].
    """
    logprobs = log_softmax(logits.astype(np.float64) / (sampling.temperature or 1.0))
    if sampling.temperature == 0:
        token = int(logprobs.argmax())
    else:
        # The largest of log p + Gumbel noise is a draw from p. Unlike a walk through the cumulated probabilities it
        # hardly ever depends on the last bit of a logit, so that a seed gives the same answer in any batch.
        noise = -np.log(generator.standard_exponential(len(logprobs)))
        token = int((_cut(logprobs, sampling) + noise).argmax())
    return token, float(logprobs[token])


def _cut(logprobs: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """−∞ for what ``top_k`` and ``top_p`` exclude: of the most probable tokens, as many as sum up to ``top_p``."""
    if sampling.top_k < 1 and sampling.top_p == 1:
        return logprobs
    order = np.argsort(-logprobs, kind="stable")
    if sampling.top_k >= 1:
        order = order[: sampling.top_k]
    chances = np.exp(logprobs[order] - logprobs[order[0]])
    before = np.cumsum(chances) - chances
    order = order[before < sampling.top_p * chances.sum()]
    left = np.full_like(logprobs, -np.inf)
    left[order] = logprobs[order]
    return left
