"""One rollout's talk with the model: tool calls validated, faulty ones sent back, all of it kept.

A harness sees only answers whose tool calls are valid. What passed between the model and this room before that (faulty
calls, the errors that answered them) is part of the token stream all the same, so :meth:`Conversation.expand` puts it
back into whatever message list the harness holds: before each request, and before the messages are saved. What it
puts in carries ``RETRY_KEY``, and :meth:`Conversation.contract` takes it out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hermes_atropos.backends import Backend, ModelTurn, TrackingBackend
from hermes_atropos.errors import BackendError, BackendTimeoutError, ContextLengthError, ToolCallRetriesError
from hermes_atropos.logs import log_exchange
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.settings import Settings
from hermes_atropos.toolcalls import ToolCall, error_result, validate
from hermes_atropos.trajectory import AgentResult, AgentStep, StopReason, ToolResult

__all__ = ["Conversation", "assistant_message", "stop_reason_of", "tool_message"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]

#: Key of the messages that passed between the model and this room alone.
RETRY_KEY = "atropos_retry"


@dataclass(slots=True)
class Exchange:
    """What belongs to a turn and the harness never saw.

    Attributes:
        before: the failed attempts and their errors, in order, before the turn.
        errors: the answers to the turn's invalid calls, by the id of the call.
        order: the ids of all its calls, in the order in which the model called.
    """

    before: list[Message] = field(default_factory=list)
    errors: dict[str, Message] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


class Conversation:
    """Asks a backend, validates tool calls against their schemas, and sends faulty ones back.

    Args:
        backend: answers messages.
        max_tool_call_retries: how often in a row an answer whose calls are all invalid is sent back.

    Attributes:
        steps: for every :meth:`chat`, the model's answers in order: the failed attempts, then the one that counted.
        messages: the last request and what came back, failed attempts and their errors included.
    """

    def __init__(self, backend: Backend, *, max_tool_call_retries: int = 3) -> None:
        self.backend = backend
        self.max_tool_call_retries = max_tool_call_retries
        self.steps: list[list[ModelTurn]] = []
        self.messages: list[Message] = []
        self._prompt: list[Message] = []
        self._call_ids: set[str] = set()
        self._exchanges: dict[str, Exchange] = {}
        self._settings = Settings.from_env()

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **sampling: Any
    ) -> ModelTurn:
        """Ask for one answer whose tool calls are valid, or that has none.

        Returns:
            The answer; ``calls`` holds the invalid ones beside valid ones too, and ``ref`` is what the harness stores
            under ``TURN_KEY`` in its assistant message.

        Raises:
            ToolCallRetriesError: the calls were still invalid after ``max_tool_call_retries`` retries.
            BackendTimeoutError: one answer took longer than ``ATROPOS_AGENT_CHAT_TIMEOUT_S``.
            BackendError, TokenFidelityError: as the backend raises them.
        """
        prompt = self.expand(messages)
        self._discard_if_thrown_away(prompt)
        self._prompt = self.messages = prompt
        before: list[Message] = []
        attempts: list[ModelTurn] = []
        self.steps.append(attempts)
        for _ in range(self.max_tool_call_retries + 1):
            turn = await self._sample([*prompt, *before], tools, sampling)
            turn.ref = turn.ref or f"untracked-{uuid.uuid4().hex[:12]}"
            turn.calls = [self._with_own_id(call) for call in turn.calls]
            if tools:
                turn.calls = validate(turn.calls, tools)
            else:  # nothing can be called: whatever looks like a call is text
                turn.content = "\n".join(filter(None, [turn.content, *(call.raw for call in turn.calls)])) or None
                turn.calls = []
            attempts.append(turn)
            errors = {
                call.id: tool_message(call, error_result(call, tools or [])) | {RETRY_KEY: True}
                for call in turn.calls
                if not call.ok
            }
            if not turn.calls or len(errors) < len(turn.calls):
                self._exchanges[turn.ref] = Exchange(before, errors, [call.id for call in turn.calls])
                self.messages = [*prompt, *before, assistant_message(turn)]
                return turn
            before += [assistant_message(turn) | {RETRY_KEY: True}, *errors.values()]
            self.messages = [*prompt, *before]
        raise ToolCallRetriesError(
            f"The model's tool calls were invalid {len(attempts)} times in a row; last error: {turn.calls[0].error}",
            messages=[*prompt, *before],
        )

    def _discard_if_thrown_away(self, prompt: list[Message]) -> None:
        """Mark the last answer in the ledger if the harness asks the same again without it.

        The last message of the question may differ: harnesses add an admonition to it. Where more differs the history
        was rewritten, and the answer is a part of what was.
        """
        if not self.backend.tracks_tokens or not self.steps or not self.steps[-1]:
            return
        ledger = cast(TrackingBackend, self.backend).ledger
        refs = {turn.ref for turn in self.steps[-1] if turn.ref}
        kept = any(message.get(TURN_KEY) in refs for message in prompt)
        if not kept and len(prompt) >= len(self._prompt) and prompt[: len(self._prompt) - 1] == self._prompt[:-1]:
            for ref in refs:
                ledger.discard(ref, "the harness threw the answer away and asked again")

    def _with_own_id(self, call: ToolCall) -> ToolCall:
        """Some servers number the calls of each answer anew."""
        if call.id in self._call_ids:
            call = call.model_copy(update={"id": ToolCall().id})
        self._call_ids.add(call.id)
        return call

    def expand(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with the failed attempts and the errors that the harness never saw, each in its place."""
        expanded: list[Message] = []
        place = 0
        while place < len(messages):
            message = dict(messages[place])
            place += 1
            exchange = self._exchanges.get(message.get(TURN_KEY, ""))
            if exchange is None:
                expanded.append(message)
                continue
            expanded += [*exchange.before, message]
            if exchange.errors:
                answers = dict(exchange.errors)
                while place < len(messages) and messages[place].get("role") == "tool":
                    answers[messages[place]["tool_call_id"]] = dict(messages[place])
                    place += 1
                expanded += [answers.pop(call_id) for call_id in exchange.order if call_id in answers]
                expanded += answers.values()
        return expanded

    def result(self, messages: Sequence[Mapping[str, Any]], stop_reason: StopReason, **known: Any) -> AgentResult:
        """What the rollout leaves.

        Args:
            messages: the whole conversation, expanded.
            known: further fields of ``AgentResult``.
        """
        answers = {m["tool_call_id"]: m for m in messages if m.get("role") == "tool" and "tool_call_id" in m}
        turns = [turn for attempts in self.steps for turn in attempts]
        result = AgentResult(
            success=stop_reason is StopReason.COMPLETED,
            steps=[
                agent_step(number, attempts, answers)
                for number, attempts in enumerate(filter(None, self.steps), start=1)
            ],
            total_tokens=sum(turn.prompt_tokens + turn.completion_tokens for turn in turns),
            messages=[dict(message) for message in messages],
            stop_reason=stop_reason,
            tracked=self.backend.tracks_tokens,
            **known,
        )
        if self.backend.tracks_tokens:
            tracking = cast(TrackingBackend, self.backend)
            result.attach_tokens(tracking.ledger, tracking.renderer.decode)
        return result

    @staticmethod
    def contract(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages without what ``expand`` puts in: what the harness knows of them."""
        return [dict(message) for message in messages if RETRY_KEY not in message]

    async def _sample(
        self, messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, sampling: dict[str, Any]
    ) -> ModelTurn:
        settings = self._settings
        request = {"messages": messages, "tools": tools, **sampling}
        log_exchange(logger, "request", request, limit=settings.request_limit)
        try:
            async with asyncio.timeout(settings.agent_chat_timeout_s), reports(settings.wait_report_every_s):
                turn = await self.backend.sample(messages, tools, **sampling)
        except TimeoutError as error:
            if settings.agent_chat_timeout_s is None or isinstance(error, BackendTimeoutError):
                raise
            raise BackendTimeoutError(
                f"The model gave no answer within ATROPOS_AGENT_CHAT_TIMEOUT_S={settings.agent_chat_timeout_s:g} s."
            ) from error
        log_exchange(logger, "response", turn, limit=settings.response_limit)
        return turn


#: What a failure means for the rollout; the first kind that fits counts.
FAILURES: dict[type[BaseException], StopReason] = {
    ToolCallRetriesError: StopReason.TOOL_CALL_RETRIES,
    ContextLengthError: StopReason.CONTEXT_LENGTH,
    TimeoutError: StopReason.TIMEOUT,
    BackendError: StopReason.SERVER_ERROR,
    KeyboardInterrupt: StopReason.INTERRUPTED,
    BaseException: StopReason.ERROR,
}


def stop_reason_of(failure: BaseException) -> StopReason:
    """Why a rollout ended that this failure ended."""
    return next(reason for kind, reason in FAILURES.items() if isinstance(failure, kind))


@contextlib.asynccontextmanager
async def reports(every: float | None) -> AsyncIterator[None]:
    """Log every so many seconds that the model is still being waited for."""

    async def report(every: float) -> None:
        waited = 0.0
        while True:
            await asyncio.sleep(every)
            waited += every
            logger.warning("waiting for the model for %.0f s", waited)

    task = asyncio.create_task(report(every)) if every else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


def assistant_message(turn: ModelTurn) -> Message:
    """The turn as a stored OpenAI message: valid calls as ``tool_calls``, invalid ones as text in the content."""
    faulty = [call.raw for call in turn.calls if not call.ok]
    message: Message = {
        "role": "assistant",
        "content": "\n".join(filter(None, [turn.content, *faulty])),
        TURN_KEY: turn.ref,
    }
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if calls := [call.to_openai() for call in turn.calls if call.ok]:
        message["tool_calls"] = calls
    return message


def tool_message(call: ToolCall, content: str) -> Message:
    """The answer to a call as an OpenAI message."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name or "tool", "content": content}


def agent_step(number: int, attempts: list[ModelTurn], answers: Mapping[str, Mapping[str, Any]]) -> AgentStep:
    """One step: the failed attempts at it, the answer that counted, and the stored answers to its calls, by call id."""
    calls = [call for turn in attempts for call in turn.calls]
    return AgentStep(
        step_number=number,
        assistant_message=attempts[-1].raw or attempts[-1].content or "",
        tool_calls=calls,
        tool_results=[tool_result(call, answers[call.id]) for call in calls if call.id in answers],
        turns=[turn.ref for turn in attempts if turn.ref],
        finish_reason=attempts[-1].finish_reason,
    )


def tool_result(call: ToolCall, message: Mapping[str, Any]) -> ToolResult:
    """What a stored answer says of its tool. Hermes' tools answer in JSON, with ``error`` and ``exit_code``."""
    content = str(message.get("content") or "")
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    error = call.error or answer.get("error") or None
    return ToolResult(
        name=call.name,
        content=content,
        success=error is None,
        error=None if error is None else str(error),
        exit_code=answer.get("exit_code") if isinstance(answer.get("exit_code"), int) else None,
        call_id=call.id,
    )
