"""Requests that come and go at any time, answered in batches: one thread, one step of the model after another."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hermes_atropos.embedded.llama import BLOCK, Llama, Sequence
from hermes_atropos.embedded.sampler import Sampling, draw
from hermes_atropos.errors import CheckpointError
from hermes_atropos.values import common_length

__all__ = ["Engine", "Request"]

#: Tokens of a prompt that are read in one step, beside a token of each answer that is under way.
CHUNK = 256


@dataclass(eq=False, slots=True)
class Request:
    """One answer that is asked for.

    Args:
        prompt: [prompt_len] int.
        choice: which of ``sampling.n`` it is; each draws numbers of its own.
        max_tokens: how many tokens it may have.
        stop_ids: tokens that end it.
        ends: whether a text ends it; only asked where the sampling has stop strings.
        told: called on the engine's thread whenever there is a further token, and at the end.

    Attributes:
        output_ids, logprobs: [output_len], so far.
        weights: which weights sampled the answer: ``{"version", "start", "end"}`` of each stretch.
        finish_reason: ``stop``, ``length`` or ``abort``; None until it has ended.
        failure: what broke the model's step, if anything did.
        forsaken: set by whoever asked, when the answer is no longer wanted.
    """

    prompt: list[int]
    sampling: Sampling
    choice: int
    max_tokens: int
    stop_ids: frozenset[int]
    ends: Callable[[list[int]], bool]
    told: Callable[[Request], None]
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "abort"] | None = None
    failure: BaseException | None = None
    forsaken: bool = False
    generator: np.random.Generator = field(init=False)
    sequence: Sequence = field(default_factory=Sequence)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.generator = np.random.default_rng(None if seed is None else [seed, self.choice])

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    def unread(self, limit: int) -> list[int]:
        """The next tokens of which the model has not computed keys and values."""
        known = len(self.sequence.tokens)
        return [*self.prompt[known : known + limit], *self.output_ids[max(known - len(self.prompt), 0) :]][:limit]

    def take(self, token: int, logprob: float, version: str) -> None:
        place = len(self.output_ids)
        self.output_ids.append(token)
        self.logprobs.append(logprob)
        if not self.weights or self.weights[-1]["version"] != version:
            self.weights.append({"version": version, "start": place, "end": place})
        self.weights[-1]["end"] = place + 1
        if token in self.stop_ids or (self.sampling.stop and self.ends(self.output_ids)):
            self.finish_reason = "stop"
        elif len(self.output_ids) == self.max_tokens:
            self.finish_reason = "length"


class Engine:
    """A model, its cache, and the requests under way.

    The thread lives while there is something to do. Prompts are read one after another, in the order in which they
    came, so that the second of a group finds the first one's prefix.

    Args:
        model: from then on the engine's.
        cache_tokens: of how many tokens keys and values are kept for prompts to come; those of answers under way come
            on top.

    Attributes:
        version: of the model's weights.
    """

    def __init__(self, model: Llama, cache_tokens: int) -> None:
        self.model = model
        self.version = "default"
        self.cache_tokens = cache_tokens
        self._lock = threading.Condition()
        self._admits = True  # requests that wait
        self._steps = True
        self._stepping = False
        self._guests = 0  # who wait for the end of the step under way
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._kept: list[Sequence] = []  # the one that was used last at the end
        self._thread: threading.Thread | None = None

    # Called from any thread

    def submit(self, requests: Iterable[Request]) -> None:
        """Begin to answer them; while the engine is paused they wait."""
        with self._lock:
            self._waiting += requests
            self._work()

    def pause(self, mode: Literal["abort", "wait", "keep"] = "abort") -> None:
        """Answer nothing until ``resume``. Blocks for the step under way; with ``wait``, for the answers under way.

        Args:
            mode: what becomes of the answers under way: they end as they are, are waited for, or go on afterwards.
        """
        with self._lock:
            self._admits = False
            if mode == "wait":
                self._lock.wait_for(lambda: self._admits or not self._running)
                return
            self._steps = False
        with self._between_steps():
            if mode == "abort":
                for request in self._running:
                    self._keep(request.sequence)
                    request.finish_reason = "abort"
                    request.told(request)
                self._running.clear()

    def resume(self) -> None:
        """Go on."""
        with self._lock:
            self._admits = self._steps = True
            self._lock.notify_all()
            self._work()

    def load_weights(self, folder: str | Path, version: str | None = None, *, forget: bool = True) -> None:
        """Other weights of the same shape, between two steps.

        Answers under way go on: their tokens so far are read again with the new weights, and which sampled which is
        told.

        Args:
            version: None leaves it to be set later.
            forget: drop what was computed with the old weights. Without, it mixes into what the new ones say.

        Raises:
            CheckpointError: they can't be read or are of another shape; the old ones stay.
        """
        model = Llama(folder)
        if model.config != self.model.config:
            raise CheckpointError(f"{folder} is of another shape than the model that runs: give weights of its kind")
        with self._between_steps():
            self.model, self.version = model, version or self.version
            if forget:
                self.forget()

    def forget(self) -> None:
        """Drop keys and values; those of answers under way are computed again."""
        with self._between_steps():
            self._kept.clear()
            for request in self._running:
                request.sequence = Sequence()

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        with self._lock:
            self._guests += 1
            self._lock.wait_for(lambda: not self._stepping)
            try:
                yield
            finally:
                self._guests -= 1
                self._lock.notify_all()

    @property
    def load(self) -> dict[str, int]:
        """How many requests wait and run, and of how many tokens keys and values are kept for others."""
        with self._lock:
            return {"waiting": len(self._waiting), "running": len(self._running), "kept_tokens": _size(self._kept)}

    def _work(self) -> None:
        """Start the thread if there is something to do. With the lock held."""
        if self._thread is None and self._steps and (self._running or (self._admits and self._waiting)):
            self._thread = threading.Thread(target=self._loop, name="embedded-model", daemon=True)
            self._thread.start()

    # On the engine's thread

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._stepping = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: not self._guests)
                self._admit()
                if not (self._steps and self._running):
                    self._thread = None
                    return
                self._stepping = True
            try:
                self._step()
            except Exception as error:
                for request in self._running:
                    request.failure = error
                    request.told(request)

    def _admit(self) -> None:
        """Take those that wait, and let those go that ended or were given up."""
        if self._admits:
            self._running += self._waiting
            self._waiting.clear()
        for request in [one for one in self._running if one.forsaken or one.ended]:
            self._keep(request.sequence)
            self._running.remove(request)
        self._lock.notify_all()

    def _step(self) -> None:
        """One token more of each answer, and a part of the first prompt that has not been read."""
        steps: list[tuple[Request, list[int]]] = []
        reading = False
        for request in self._running:
            if not (reading or request.sequence.tokens):
                request.sequence = self._known([*request.prompt, *request.output_ids])
            unread = request.unread(CHUNK)
            if len(unread) == 1 or not reading:
                steps.append((request, unread))
                reading |= len(unread) > 1
        hidden = self.model.forward([(request.sequence, ids) for request, ids in steps])
        last = np.cumsum([len(ids) for _, ids in steps]) - 1
        due = [(request, row) for (request, _), row in zip(steps, last, strict=True) if not request.unread(1)]
        if due:
            logits = self.model.logits(hidden[[row for _, row in due]])
            for (request, _), scores in zip(due, logits, strict=True):
                request.take(*draw(scores, request.sampling, request.generator), self.version)
                request.told(request)

    def _known(self, tokens: list[int]) -> Sequence:
        """The longest beginning of these tokens, short of the last, whose keys and values are at hand."""
        found, longest = Sequence(), 0
        for sequence in [*self._kept, *(request.sequence for request in self._running)]:
            common = min(common_length(sequence.tokens, tokens), len(tokens) - 1)
            if common > longest:
                found, longest = sequence, common
            if longest == len(tokens) - 1:
                break
        if found in self._kept:
            self._kept.remove(found)
            self._kept.append(found)
        return found.prefix(longest)

    def _keep(self, sequence: Sequence) -> None:
        """For prompts to come, in place of its own beginnings; what was used longest ago goes."""
        self._kept = [one for one in self._kept if common_length(one.tokens, sequence.tokens) < len(one.tokens)]
        self._kept.append(sequence)
        while _size(self._kept) > self.cache_tokens:
            self._kept.pop(0)


def _size(sequences: Many[Sequence]) -> int:
    return len({id(block) for sequence in sequences for block, _ in sequence.blocks}) * BLOCK
