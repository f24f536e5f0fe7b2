"""One rollout's talk with the model: tool calls validated, faulty ones sent back, all of it kept.

A harness sees only answers whose tool calls are valid. What passed between the model and this room before that (faulty
calls, the errors that answered them) is part of the token stream all the same, so :meth:`Conversation.expand` puts it
back into whatever message list the harness holds: before each request, and before the messages are saved. What it
puts in carries ``RETRY_KEY``, and :meth:`Conversation.contract` takes it out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hermes_atropos.backends import Backend, ModelTurn
from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import BackendError, BackendTimeoutError, ContextLengthError, ToolCallRetriesError
from hermes_atropos.logs import log_exchange, show
from hermes_atropos.messages import SAMPLED_KEY, TURN_KEY, call_function
from hermes_atropos.settings import Settings
from hermes_atropos.toolcalls import ToolCall, error_result, parse_text, validate
from hermes_atropos.toolcalls.call import parsed_arguments
from hermes_atropos.toolcalls.strict_json import BrokenJSON
from hermes_atropos.trajectory import AgentResult, AgentStep, StopReason, ToolResult

__all__ = ["Conversation", "assistant_message", "stop_reason_of"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]

#: Key of the messages that passed between the model and this room alone.
RETRY_KEY = "atropos_retry"


@dataclass(slots=True)
class Exchange:
    """What belongs to a turn and the harness never saw, or forgets.

    Attributes:
        before: the failed attempts and their errors, in order, before the turn.
        errors: the answers to the turn's invalid calls, by the id of the call.
        calls: its calls as they were validated and as the model wrote them, in order.
        reasoning: what it thought.
        sampled_ids: the ids that the model gave its calls, by those that they have.
    """

    before: list[Message]
    errors: dict[str, Message]
    calls: list[tuple[ToolCall, ToolCall]]
    reasoning: str | None
    sampled_ids: dict[str, str] = field(init=False)
    _shown: tuple[Message, str, Message] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.sampled_ids = {call.id: written.sampled_id for call, written in self.calls if written.sampled_id}

    def as_sampled(self, stored: Message) -> Message:
        """The turn's stored message as the model wrote it: its thoughts and its calls, but for calls that the harness
        has changed.

        The last one is remembered, because each request has all earlier turns in it; the calls as text, because a
        harness changes them where they stand.
        """
        calls = repr(stored.get("tool_calls"))
        if self._shown and self._shown[1] == calls and self._shown[0] == stored:
            message = self._shown[2]
        else:
            message = dict(stored)
            if self.reasoning and not message.get("reasoning_content"):
                message["reasoning_content"] = self.reasoning
            if message.get("tool_calls"):
                message["tool_calls"] = [_as_written(call, self.calls) for call in message["tool_calls"]]
        self._shown = stored, calls, message
        return message


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
            written = turn.calls
            if tools:
                turn.calls = validate(_told_of_the_cut(turn), tools)
            else:  # nothing can be called: what looks like a call in the text is text
                text = [call.raw for call in turn.calls if call.format != "openai"]
                turn.content = "\n".join(filter(None, [turn.content, *text])) or None
                turn.calls = [call for call in turn.calls if call.format == "openai"]
            attempts.append(turn)
            errors = {
                call.id: ToolResult(call.name or "tool", error_result(call, tools), call_id=call.id).to_message()
                | {RETRY_KEY: True}
                for call in turn.calls
                if not call.ok
            }
            self._exchanges[turn.ref] = Exchange(
                list(before), errors, list(zip(turn.calls, written, strict=False)), turn.reasoning
            )
            answer = assistant_message(turn)
            self.messages = [*prompt, *before, answer]
            if not turn.calls or len(errors) < len(turn.calls):
                return turn
            # As long as no other follows, the attempt is an answer that a harness may go on from.
            self.messages += errors.values()
            before += [answer | {RETRY_KEY: True}, *errors.values()]
        raise ToolCallRetriesError(
            f"The model's tool calls were invalid {len(attempts)} times in a row; last error: {turn.calls[0].error}",
            messages=self.messages,
        )

    def _discard_if_thrown_away(self, prompt: list[Message]) -> None:
        """Mark the last answer in the ledger if the harness asks the same again without it.

        The last message of the question may differ: harnesses add an admonition to it. Where more differs the history
        was rewritten, and the answer is a part of what was.
        """
        if not self.backend.tracks_tokens or not self.steps:
            return
        ledger = cast(TrackedBackend, self.backend).ledger
        refs = {turn.ref for turn in self.steps[-1] if turn.ref}
        kept = any(message.get(TURN_KEY) in refs for message in reversed(prompt))
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
                expanded += [answers.pop(call.id) for call, _ in exchange.calls if call.id in answers]
                expanded += answers.values()
        return expanded

    def _as_sampled(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with each call and its result as the model wrote them: its id, its arguments, its reasoning.

        A harness sorts, escapes and numbers them. A call whose arguments it has changed stays so.
        """
        shown: list[Message] = []
        ids: dict[str, str] = {}
        for message in messages:
            exchange = self._exchanges.get(message.get(TURN_KEY, ""))
            if exchange is not None:
                ids = exchange.sampled_ids
                message = exchange.as_sampled(message)
            elif message.get("tool_call_id") in ids:
                message = {**message, "tool_call_id": ids[message["tool_call_id"]]}
            shown.append(message)
        return shown

    def result(self, messages: Sequence[Mapping[str, Any]], stop_reason: StopReason, **known: Any) -> AgentResult:
        """What the rollout leaves.

        Args:
            messages: the whole conversation, expanded.
            known: further fields of ``AgentResult``.
        """
        answers = {m["tool_call_id"]: m for m in messages if m.get("role") == "tool" and "tool_call_id" in m}
        ran = {m[TURN_KEY]: [call["id"] for call in m.get("tool_calls") or []] for m in messages if TURN_KEY in m}
        turns = [turn for attempts in self.steps for turn in attempts]
        if options := getattr(self.backend, "chat_template_kwargs", None):
            known["sampling"] = {**known.get("sampling", {}), "chat_template_kwargs": options}
        result = AgentResult(
            success=stop_reason is StopReason.COMPLETED,
            steps=[
                agent_step(number, attempts, answers, ran)
                for number, attempts in enumerate(filter(None, self.steps), start=1)
            ],
            total_tokens=sum(turn.prompt_tokens + turn.completion_tokens for turn in turns),
            messages=[dict(message) for message in messages],
            stop_reason=stop_reason,
            tracked=self.backend.tracks_tokens,
            **known,
        )
        if self.backend.tracks_tokens:
            tracked = cast(TrackedBackend, self.backend)
            result.attach_tokens(tracked.ledger, tracked.renderer.decode, tracked.renderer.vocabulary)
        return result

    @staticmethod
    def contract(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages without what ``expand`` puts in: what the harness knows of them."""
        return [dict(message) for message in messages if RETRY_KEY not in message]

    async def _sample(
        self, messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, sampling: dict[str, Any]
    ) -> ModelTurn:
        settings = self._settings
        messages = self._as_sampled(messages)
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


def _told_of_the_cut(turn: ModelTurn) -> list[ToolCall]:
    """The turn's calls; a last one that the length limit cut off says so, and not that its form is wrong."""
    if turn.finish_reason != "length" or not turn.calls or turn.calls[-1].ok:
        return turn.calls
    limit = f" after {turn.completion_tokens} tokens" if turn.completion_tokens else ""
    error = f"The answer was cut off by the token limit{limit}, within this call: write less at once, in several calls."
    return [*turn.calls[:-1], turn.calls[-1].model_copy(update={"error": error})]


def _as_written(stored: Mapping[str, Any], calls: Sequence[tuple[ToolCall, ToolCall]]) -> Mapping[str, Any]:
    """A stored call as the model wrote it, unless it is not the model's, or says something else by now."""
    blocks = _blocks([written for _, written in calls])
    for (valid, written), block in zip(calls, blocks, strict=True):
        if _is(stored, valid):
            return {**written.to_openai(), "id": written.sampled_id or written.id, SAMPLED_KEY: block}
    return stored


def _is(stored: Mapping[str, Any], call: ToolCall) -> bool:
    """Whether a stored call is that one, its arguments unchanged."""
    function = call_function(stored)
    try:
        arguments = parsed_arguments(function.get("arguments"))
    except BrokenJSON:
        return False
    return (stored.get("id"), function.get("name"), arguments) == (call.id, call.name, call.arguments)


def _blocks(calls: Sequence[ToolCall]) -> list[str]:
    """What the model wrote for each call; empty for one that stands in the block of the call before it."""
    blocks: list[str] = []
    for block, same in itertools.groupby(calls, key=lambda call: call.raw):
        together = list(same)
        each = len(parse_text(block, format=together[0].format).calls) if len(together) > 1 else 1
        blocks += [block if number % max(each, 1) == 0 else "" for number in range(len(together))]
    return blocks


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
            show(logger, "waiting for the model for %.0f s", waited)

    task = asyncio.create_task(report(every)) if every else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


def assistant_message(turn: ModelTurn) -> Message:
    """The turn as a stored OpenAI message: valid calls as ``tool_calls``, invalid ones as text in the content."""
    faulty = _blocks([call for call in turn.calls if not call.ok])
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


def agent_step(
    number: int,
    attempts: list[ModelTurn],
    answers: Mapping[str, Mapping[str, Any]],
    ran: Mapping[str, Sequence[str]],
) -> AgentStep:
    """One step: the failed attempts at it, the answer that counted, and what came back from its calls.

    Args:
        answers: the stored answers to calls, by the call's id.
        ran: the ids of the calls that the harness ran, by the turn's reference: it may split one call into several.
    """
    calls = {call.id: call for turn in attempts for call in turn.calls}
    split = [call_id for turn in attempts for call_id in ran.get(turn.ref or "", ()) if call_id not in calls]
    return AgentStep(
        step_number=number,
        assistant_message=attempts[-1].raw or attempts[-1].content or "",
        tool_calls=list(calls.values()),
        tool_results=[tool_result(calls.get(key), answers[key]) for key in [*calls, *split] if key in answers],
        turns=[turn.ref for turn in attempts if turn.ref],
        finish_reason=attempts[-1].finish_reason,
    )


def tool_result(call: ToolCall | None, message: Mapping[str, Any]) -> ToolResult:
    """What a stored answer says of its tool. Hermes' tools answer in JSON, with ``error`` and ``exit_code``.

    The tool that ran may not be the one that was called: Hermes' ``tool_call`` hands on to others.
    """
    content = str(message.get("content") or "")
    answer: Any = None
    with contextlib.suppress(ValueError):
        answer = json.loads(content)
    answer = answer if isinstance(answer, dict) else {}
    error = (call.error if call else None) or answer.get("error") or None
    return ToolResult(
        name=str(message.get("name") or (call.name if call else "")),
        content=content,
        success=error is None,
        error=None if error is None else str(error),
        exit_code=answer.get("exit_code") if isinstance(answer.get("exit_code"), int) else None,
        call_id=str(message["tool_call_id"]),
    )
