"""One rollout of a stranger: its endpoint's key and limits, its answers, and the trajectory that it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.backends.tracked import CHAT_ONLY, SAMPLING
from hermes_atropos.conversation import agent_step, assistant_message, stop_reason_of
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.messages import TURN_KEY, Message
from hermes_atropos.proxy.history import History
from hermes_atropos.proxy.journal import Journal, replay
from hermes_atropos.proxy.wire import Ask, Refused, Said
from hermes_atropos.rendering.tokenizers import decode
from hermes_atropos.tokens import Turn
from hermes_atropos.toolcalls import ParsedText, from_openai
from hermes_atropos.trajectory import AgentResult, AgentStep, StopReason
from hermes_atropos.values import is_number

__all__ = ["Facts", "Limits", "Session"]

T = TypeVar("T")

#: How often the model is asked in all for a call that it must make.
DEMANDS = 4

#: What of a request reaches the server. Harnesses send much else, such as ``reasoning_effort``, wherever they are.
SENT = SAMPLING | {"extra_body", "max_completion_tokens", "max_new_tokens"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may use; None sets no limit.

    Attributes:
        max_tokens: tokens that may be sampled.
        max_requests: requests for answers.
        max_seconds: from its start to its last request.
    """

    max_tokens: int | None = None
    max_requests: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not (is_number(limit, whole=name != "max_seconds") and limit > 0):
                raise ConfigurationError(f"{name}={limit!r} is not a limit: give a positive number, or leave it out")


@dataclass(slots=True)
class Facts:
    """What a session's journal says first.

    Attributes:
        id: in its URL.
        key: what its clients send as the API key; None asks for none.
        options: of ``ExactManagedServer``, and ``base_url``: the server that takes all of its calls.
        created: seconds since the epoch.
    """

    id: str
    key: str | None
    limits: Limits
    options: dict[str, Any]
    created: float = field(default_factory=time.time)


class Session:
    """Answers one rollout's requests, from one event loop.

    Args:
        managed: keeps what is sent and sampled; used by this session alone.
        journal: where turns are kept on disk, until the trajectory is kept elsewhere.
    """

    def __init__(self, facts: Facts, managed: ExactManagedServer, journal: Journal) -> None:
        self.facts = facts
        self.managed = managed
        self.backend = managed.backend
        self.journal = journal
        self.last_used = time.time()
        self.ended = False
        self._history = History()
        self._asked: dict[Turn, Sequence[Message]] = {}
        self._shown: dict[Turn, Message] = {}
        self._requests = 0
        self._not_sent: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return bool(self._tasks)

    def restore(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Take over the turns of a journal."""
        for turn, asked, message in replay(entries, self.backend.ledger, self.journal):
            self._keep(turn, asked, message)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; the end of the session cancels it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self.ended:
                raise Refused(410, "the session has ended", "session_ended") from None
            raise
        finally:
            self._tasks.discard(task)
            self.last_used = time.time()

    async def answer(self, ask: Ask) -> tuple[list[Said], dict[str, int]]:
        """The answers to a request, and its usage. What was sampled is on disk before they are there.

        Raises:
            Refused: a limit of the session was reached, or the model does not call the tool that it must.
            BackendError, TokenFidelityError, ChatTemplateError: as ``TrackedBackend.sample_group``.
        """
        self._within_limits()
        self._requests += 1
        self._not_sent |= ask.sampling.keys() - SENT - CHAT_ONLY
        messages = self._history.recognise(ask.messages)
        before = len(self.backend.ledger.turns)
        try:
            turns = await self._sampled(ask, messages)
        except Exception as error:
            self._failure = error
            raise
        finally:
            for turn in self.backend.ledger.turns[before:]:
                if (turn.fault or turn.discarded) and turn not in self._asked:
                    self._record(turn, messages, None)
        self._failure = None
        said = [self._said(turn, ask, messages) for turn in turns]
        sampled = sum(turn.completion_tokens for turn in turns)
        prompt = turns[0].prompt_tokens
        return said, {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    async def _sampled(self, ask: Ask, messages: list[Message]) -> list[ModelTurn]:
        """The answers. Those without the call that must be there are thrown away, and asked for again."""
        sampling = {name: value for name, value in ask.sampling.items() if name in SENT}
        turns: list[ModelTurn] = []
        for _ in range(DEMANDS):
            for turn in await self.backend.sample_group(messages, ask.tools, n=ask.n - len(turns), **sampling):
                if ask.demanded and not {call.name for call in turn.calls if call.ok} & ask.demanded:
                    self.backend.ledger.discard(str(turn.ref), "it has not the call that tool_choice demands")
                else:
                    turns.append(turn)
            if len(turns) == ask.n:
                return turns
        for turn in turns:
            self.backend.ledger.discard(str(turn.ref), "another answer to the same request was refused")
        raise Refused(
            422,
            f"tool_choice demands a call of {' or '.join(sorted(ask.demanded))}, and the model made none in {DEMANDS} "
            "answers: ask with tool_choice auto, or say in the messages what is to be called",
            "tool_choice_not_met",
        )

    async def preview(self, ask: Ask) -> tuple[str, list[int]]:
        """What the model would read for a request: as text, and as ids ``[prompt_len] int``.

        Raises:
            ChatTemplateError: the template cannot render the messages.
        """
        return await self.backend.preview(self._history.recognise(ask.messages), ask.tools)

    def undelivered(self, said: Sequence[Said]) -> None:
        """The client went away before it had these answers: it can't act on them, so they are not training data."""
        for answer in said:
            turn = self.backend.ledger.turn(answer.message[TURN_KEY])
            self.backend.ledger.discard(turn.ref, "the client went away before it had the answer")
            self.journal.discard(turn)

    async def end(self) -> None:
        """End what is under way, and take no more requests."""
        self.ended = True
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def trajectory(self, stop_reason: StopReason | None = None) -> AgentResult:
        """What the rollout left so far; the messages are those of the conversation with the last answer.

        Args:
            stop_reason: why the session ended; by default its last answer, or the failure in place of one, tells.
        """
        turns = [turn for turn in self.backend.ledger.turns if turn in self._shown and turn.discarded is None]
        last = turns[-1] if turns else None
        messages = self._messages(last)
        stop_reason = stop_reason or self._stop_reason(last)
        answers = {m["tool_call_id"]: m for asked in self._asked.values() for m in asked if m.get("tool_call_id")}
        result = AgentResult(
            success=stop_reason is StopReason.COMPLETED,
            final_response=str(messages[-1].get("content") or "") if messages else "",
            steps=[self._step(number, turn, answers) for number, turn in enumerate(turns, start=1)],
            error=None if self._failure is None else str(self._failure),
            stop_reason=stop_reason,
            messages=messages,
            tools=self._tools(last) if last else [],
            metadata={
                "session": self.facts.id,
                "requests": self._requests,
                **({"not_sent": sorted(self._not_sent)} if self._not_sent else {}),
            },
        )
        renderer = self.backend.renderer
        result.attach_tokens(self.backend.ledger, renderer.decode, renderer.vocabulary)
        return result

    def _within_limits(self) -> None:
        limits = self.facts.limits
        used = {
            "max_requests": self._requests,
            "max_seconds": time.time() - self.facts.created,
            "max_tokens": sum(len(turn.output_ids) for turn in self.backend.ledger.turns) if limits.max_tokens else 0,
        }
        for name, limit in asdict(limits).items():
            if limit is not None and used[name] >= limit:
                raise Refused(403, f"the session has reached its limit of {name}={limit:g}", "session_limit")

    def _said(self, answer: ModelTurn, ask: Ask, messages: Sequence[Message]) -> Said:
        turn = self.backend.ledger.turn(str(answer.ref))
        message = shown(answer, ask)
        self._record(turn, messages, message)
        tokens = None
        if ask.logprobs:
            texts = [decode(self.managed.tokenizer, [token]) for token in turn.output_ids]
            tokens = list(zip(turn.output_ids, texts, turn.logprobs, strict=True))
        stopped = answer.finish_reason == "stop" and "tool_calls" in message
        return Said(message, "tool_calls" if stopped else answer.finish_reason, tokens)

    def _record(self, turn: Turn, messages: Sequence[Message], message: Message | None) -> None:
        asked = list(messages[len(messages) - turn.prompt.added :])
        self.journal.turn(turn, asked, message)
        if turn.discarded:
            self.journal.discard(turn)
        self._keep(turn, asked, message)

    def _keep(self, turn: Turn, asked: Sequence[Message], message: Message | None) -> None:
        self._asked[turn] = asked
        if message is not None:
            self._shown[turn] = message = {**message, TURN_KEY: turn.ref}
            self.backend.ledger.answered(turn, {key: message[key] for key in message if key != TURN_KEY})
            self._history.remember(turn, message, self.backend.ledger.answers(turn.prompt))

    def _messages(self, turn: Turn | None) -> list[dict[str, Any]]:
        parts: list[list[Message]] = []
        while turn is not None:
            parts.append([*self._asked[turn], self._shown.get(turn, {"role": "assistant", "content": ""})])
            turn = turn.prompt.parent
        return [dict(message) for part in reversed(parts) for message in part]

    def _tools(self, turn: Turn) -> list[dict[str, Any]]:
        while turn.prompt.parent is not None:
            turn = turn.prompt.parent
        return list(turn.prompt.tools or [])

    def _step(self, number: int, turn: Turn, answers: Mapping[str, Message]) -> AgentStep:
        said = ParsedText(None, None, from_openai(self._shown[turn].get("tool_calls")))
        return agent_step(number, [self.backend.model_turn(turn, said)], answers, {})

    def _stop_reason(self, last: Turn | None) -> StopReason:
        if self._failure is not None:
            return stop_reason_of(self._failure)
        if last is None:
            return StopReason.CANCELLED
        if self.backend.finish_reason(last) == "length":
            return StopReason.TRUNCATED
        return StopReason.INTERRUPTED if self._shown[last].get("tool_calls") else StopReason.COMPLETED


def shown(turn: ModelTurn, ask: Ask) -> dict[str, Any]:
    """The answer as a client gets it: well-formed calls where there are tools, all else as text, up to a stop text."""
    calls = [call for call in turn.calls if call.ok] if ask.calls else []
    others = [call.raw for call in turn.calls if call not in calls]
    content = "\n".join(filter(None, [turn.content, *others])) or None
    for stop in ask.stop:
        content = content and content.partition(stop)[0]
    message = assistant_message(replace(turn, content=content, calls=calls))
    return message | {"content": content if calls else content or ""}
