"""One run of an agent on a task: how Hermes' thread asks the model, is interrupted, and is told of a failure."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.conversation import Conversation
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendTimeoutError,
    ContextLengthError,
    HermesAtroposError,
)
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.listening import Delta, hearing, text_listener
from hermes_atropos.runtime import check_not_on, home_loop, portal_loop, turnstile
from hermes_atropos.trajectory import AgentResult, StopReason

__all__ = ["ModelCallFailed", "Rollout", "interrupting_first"]


class ModelCallFailed(ValueError):
    """Ends Hermes' turn at once: Hermes retries most errors, but takes a ``ValueError`` for final.

    Where a server refused the request, it has that server's words, by which Hermes knows what it can mend: it
    compresses a history that is too long, and asks for a shorter answer where the context leaves less room.

    Attributes:
        status_code: the HTTP status, where there was one.
    """

    def __init__(self, signal: str, status_code: int | None = None) -> None:
        super().__init__(signal)
        self.status_code = status_code


@dataclass(eq=False)
class Rollout:
    """What belongs to one run of the agent on a task, subagents included.

    Attributes:
        conversation: the agent's talk with the model; its backend holds the ledger.
        sandbox: where the tools act; None leaves that to Hermes.
        failure: what ended the rollout, if something did.
        signal: in which words Hermes was told of the failure.
        broken: what forbids any further model call.
        cancelled: whether the caller gave it up.
        last_turn: the model's last answer.
        answered: called on Hermes' thread after each answer, a subagent's too.
        sampling: what was last asked of the model, beside the messages.
        uncounted: answers, the faulty ones too, that have yet to be found in Hermes' books.
        retried: how many answers of this run were sent back before Hermes saw them.
    """

    conversation: Conversation
    sandbox: HermesSandbox | None = None
    failure: BaseException | None = None
    signal: str | None = None
    broken: HermesAtroposError | None = None
    cancelled: bool = False
    last_turn: ModelTurn | None = None
    answered: Callable[[], object] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    uncounted: list[ModelTurn] = field(default_factory=list)
    retried: int = 0
    _requests: set[concurrent.futures.Future[ModelTurn]] = field(default_factory=set)

    @classmethod
    def on(cls, backend: Backend, sandbox: HermesSandbox | None, *, max_tool_call_retries: int) -> Rollout:
        """A rollout with nothing recorded."""
        return cls(Conversation(backend.fresh(), max_tool_call_retries=max_tool_call_retries), sandbox)

    def for_subagent(self) -> Rollout:
        """The same ledger and sandbox, and a conversation of its own."""
        retries = self.conversation.max_tool_call_retries
        return Rollout(
            Conversation(self.conversation.backend, max_tool_call_retries=retries), self.sandbox, answered=self.answered
        )

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        sampling: Mapping[str, Any],
        *,
        interrupted: Callable[[], bool],
        compresses: bool,
    ) -> ModelTurn:
        """One model call, waited for on Hermes' thread.

        Args:
            interrupted: whether the agent has been interrupted already.
            compresses: whether Hermes may compress its history where the context is full.

        Raises:
            InterruptedError: the agent was interrupted before or meanwhile.
            ModelCallFailed: the call failed; ``failure`` has the cause.
        """
        if self.broken is not None:
            raise self._told_of(self.broken, compresses)
        request = self.request(messages, tools, sampling, interrupted=interrupted)
        # Not raised here: its traceback would hold the frames of Hermes' thread, and they the agent.
        error = request.exception()
        if error is not None:
            raise self._told_of(error, compresses) from error
        self.failure, self.last_turn = None, request.result()
        return self.last_turn

    def _told_of(self, error: BaseException, compresses: bool) -> ModelCallFailed:
        self.failure, self.signal, status = error, f"the model call failed ({type(error).__name__})", None
        if isinstance(error, ContextLengthError) and error.status is None:
            # Nobody was asked. The first are words by which Hermes knows that it is to compress.
            self.signal = "maximum context length exceeded" if compresses else "no room for an answer"
        elif isinstance(error, BackendError) and not isinstance(error, BackendConnectionError | BackendTimeoutError):
            self.signal, status = f"{type(error).__name__}: {error.body or error}", error.status
        return ModelCallFailed(self.signal, status)

    def aside(self) -> Rollout:
        """For a call of Hermes beside the conversation: a conversation of its own on the same ledger and server."""
        conversation = Conversation(self.conversation.backend)
        return Rollout(conversation, answered=self.answered, uncounted=self.uncounted, _requests=self._requests)

    def request(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        sampling: Mapping[str, Any],
        *,
        interrupted: Callable[[], bool],
    ) -> concurrent.futures.Future[ModelTurn]:
        """Ask on the server's loop and wait on this thread; the request, which has its answer or its error.

        Raises:
            InterruptedError: the agent was interrupted before or meanwhile.
            BlockingCallError: this thread runs the server's loop.
        """
        self.sampling = dict(sampling)
        loop = home_loop(self.conversation.backend.server, portal_loop())
        check_not_on(loop, instead="another thread")
        taken = len(self.conversation.steps)
        question = self.conversation.chat(messages, tools, **sampling)
        told: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        listener = text_listener.get()
        with hearing(text_listener, None if listener is None else told.put):
            request = asyncio.run_coroutine_threadsafe(question, loop)
        self._requests.add(request)
        request.add_done_callback(lambda _: told.put(None))
        try:
            if interrupted():
                request.cancel()
            with turnstile.outside():
                # Here, where it may take its time: on the server's loop nobody could.
                while (delta := told.get()) is not None:
                    if listener is not None and not request.cancelled():
                        listener(delta)
        finally:
            request.cancel()
            self._requests.discard(request)
            answers = [turn for attempts in self.conversation.steps[taken:] for turn in attempts]
            self.uncounted += answers
            self.retried += max(0, len(answers) - 1)
        if request.cancelled():
            raise InterruptedError("The agent was interrupted during a model call.")
        if self.answered is not None:
            self.answered()
        return request

    def cancel_requests(self) -> None:
        """End the model calls under way with an ``InterruptedError``."""
        for request in list(self._requests):
            request.cancel()

    def left(self, reason: StopReason, tools: Sequence[Any] | None, **known: Any) -> AgentResult:
        """What it leaves, as far as the conversation itself knows; ``known`` are further fields of the result."""
        messages, tools = self.conversation.messages, list(tools or [])
        return self.conversation.result(messages, reason, tools=tools, sampling=self.sampling, **known)


@contextlib.contextmanager
def interrupting_first(interrupt: Callable[[], object]) -> Iterator[None]:
    """For the length of the block, Ctrl-C calls ``interrupt`` before it raises ``KeyboardInterrupt``.

    Hermes runs subagents and several tools at once on pools of threads, which let no exception pass before their
    threads have ended; and a subagent that its parent has left is no longer told. Whoever handles SIGINT in another way
    is left to it.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: Any) -> None:
        # On a thread, because this one may hold a lock that it takes.
        thread = threading.Thread(target=interrupt, name="hermes-atropos-ctrl-c", daemon=True)
        thread.start()
        thread.join(0.5)  # seconds, of the one within which all is to end
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
