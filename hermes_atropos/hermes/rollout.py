"""One run of an agent on a task: how Hermes' thread asks the model, is interrupted, and is told of a failure."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.conversation import Conversation
from hermes_atropos.errors import ContextLengthError, HermesAtroposError
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.runtime import home_loop, portal_loop, turnstile

__all__ = ["ModelCallFailed", "Rollout", "interrupting_first"]


class ModelCallFailed(ValueError):
    """Ends Hermes' turn at once: Hermes retries most errors, but takes a ``ValueError`` for final."""


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
    """

    conversation: Conversation
    sandbox: HermesSandbox | None = None
    failure: BaseException | None = None
    signal: str | None = None
    broken: HermesAtroposError | None = None
    cancelled: bool = False
    last_turn: ModelTurn | None = None
    _requests: set[concurrent.futures.Future[ModelTurn]] = field(default_factory=set)

    @classmethod
    def on(cls, backend: Backend, sandbox: HermesSandbox | None, *, max_tool_call_retries: int) -> Rollout:
        """A rollout with nothing recorded."""
        return cls(Conversation(backend.fresh(), max_tool_call_retries=max_tool_call_retries), sandbox)

    def for_subagent(self) -> Rollout:
        """The same ledger and sandbox, and a conversation of its own."""
        retries = self.conversation.max_tool_call_retries
        return Rollout(Conversation(self.conversation.backend, max_tool_call_retries=retries), self.sandbox)

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
        request = self._asked(self.conversation.chat(messages, tools, **sampling), interrupted)
        # Not raised here: its traceback would hold the frames of Hermes' thread, and they the agent.
        error = request.exception()
        if error is not None:
            raise self._told_of(error, compresses) from error
        self.failure, self.last_turn = None, request.result()
        return self.last_turn

    def _told_of(self, error: BaseException, compresses: bool) -> ModelCallFailed:
        self.signal = f"the model call failed ({type(error).__name__})"
        if isinstance(error, ContextLengthError):
            # The first are words by which Hermes knows that it is to compress.
            self.signal = "maximum context length exceeded" if compresses else "no room for an answer"
        self.failure = error
        return ModelCallFailed(self.signal)

    def ask_aside(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any], *, interrupted: Callable[[], bool]
    ) -> ModelTurn:
        """A call of Hermes beside the conversation: a conversation of its own on the same server."""
        aside = Conversation(self.conversation.backend)
        return self._asked(aside.chat(messages, None, **sampling), interrupted).result()

    def _asked(
        self, question: Coroutine[Any, Any, ModelTurn], interrupted: Callable[[], bool]
    ) -> concurrent.futures.Future[ModelTurn]:
        """Ask on the server's loop and wait on this thread.

        Raises:
            InterruptedError: the agent was interrupted before or meanwhile.
        """
        server = self.conversation.backend.server
        request = asyncio.run_coroutine_threadsafe(question, home_loop(server, portal_loop()))
        self._requests.add(request)
        try:
            if interrupted():
                request.cancel()
            with turnstile.outside():
                concurrent.futures.wait([request])
        finally:
            request.cancel()
            self._requests.discard(request)
        if request.cancelled():
            raise InterruptedError("The agent was interrupted during a model call.")
        return request

    def cancel_requests(self) -> None:
        """End the model calls under way with an ``InterruptedError``."""
        for request in list(self._requests):
            request.cancel()


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
