"""Which tokens a rollout sent and which it sampled: a tree of turns.

A *stream* is one unbroken run of tokens: a prompt, what was sampled, what was appended, what was sampled … A turn
either continues its parent's stream or, where that can't be proven, starts one of its own. For the stream's tokens:

    stream(turn) = stream(parent) + prompt delta + output        if the turn continues its parent
                 =                  whole prompt + output        otherwise

Each turn stores its own part alone, and prompts that were rendered anew share the pieces that they have in common, so
memory grows with what was new in each call.

The ledger holds no text of the model and does no I/O; it is used from one thread at a time.
"""

from __future__ import annotations

import copy
import json
import math
import uuid
from array import array
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hermes_atropos.errors import TokenFidelityError
from hermes_atropos.messages import TURN_KEY, Message, call_function, text_of
from hermes_atropos.tokens import streams
from hermes_atropos.tokens.streams import FidelityReport, Sequence
from hermes_atropos.tokens.turns import WIDTH, BreakCause, Prompt, Turn, Weights, stream_ids

__all__ = ["Ledger", "Match", "call_key", "text_key"]

#: Float rounding can lift the logprob of a certain token above 0: up to this it is recorded as 0.0, beyond it refused.
ROUNDING = 1e-4

#: One object per token id, shared by all ledgers: what is stored then costs 8 bytes a token, not 40.
_TOKENS: dict[int, int] = {}

_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


@dataclass(frozen=True, slots=True)
class Match:
    """Where a list of messages stands in the ledger.

    Attributes:
        turn: the latest recorded turn that the messages continue; None if they continue none.
        history: the messages up to and including that turn's answer; empty if there is none.
        new_messages: what follows.
        cause: ``FIRST`` or ``HISTORY_REWRITTEN`` where ``turn`` is None, else None.
        rewritten: whether the messages leave what was recorded after ``turn``: it was continued in another way, or they
            hold answers that did not follow it so.
        prompt: the recorded prompt with exactly these messages and tools, if they were asked before.
        tools: what was offered with them.
    """

    turn: Turn | None
    history: list[Message]
    new_messages: list[Message]
    cause: BreakCause | None
    rewritten: bool
    prompt: Prompt | None
    tools: Any


class Ledger:
    """The turns of one rollout, its subagents included.

    Args:
        vocab_size: sampled ids must be below it; None does not check.
        boundaries: token ids after which stored prompts are cut into pieces that other prompts can share. The tokens
            that end a turn are the right ones; without any, each prompt that is rendered anew is stored whole.
    """

    def __init__(self, *, vocab_size: int | None = None, boundaries: Collection[int] = ()) -> None:
        self.turns: list[Turn] = []
        self._by_ref: dict[str, Turn] = {}
        # What follows is kept here: a prompt and a turn that knew each other would be left to the garbage collector.
        self._answers: dict[Prompt, list[Turn]] = {}
        self._prompts: dict[Turn | None, list[Prompt]] = {None: []}
        self._id = uuid.uuid4().hex[:12]
        self._limit = 2**32 if vocab_size is None else vocab_size
        self._boundaries = [array("I", [boundary]).tobytes() for boundary in boundaries]
        self._numbers: dict[Hashable, int] = {}
        self._pieces: dict[bytes, tuple[int, ...]] = {}
        # Most lists continue the last one: where that led to, without a choice between turns.
        self._last: tuple[Turn | None, list[Message], Any] = (None, [], None)

    def turn(self, ref: str) -> Turn:
        """The turn of that reference.

        Raises:
            KeyError: there is none.
        """
        return self._by_ref[ref]

    def answers(self, prompt: Prompt) -> SequenceOf[Turn]:
        """What was sampled from a prompt, in order."""
        return self._answers[prompt]

    def prompts(self, turn: Turn | None) -> SequenceOf[Prompt]:
        """What was asked after that answer, in order; None: at the start of a conversation."""
        return self._prompts.get(turn, ())

    def locate(self, messages: SequenceOf[Message], tools: Any = None) -> Match:
        """Find the latest recorded turn that ``messages`` continue.

        They continue a turn if they begin with the very messages of its prompt and its answer. Its answer is the
        message that carries its reference under ``TURN_KEY`` (whatever else was rewritten in it) or, where a message
        carries none, one of the forms that ``answered`` was told. Other messages are compared by role, text without
        surrounding whitespace, tool calls, tool call id and name. ``tools`` must equal those that the conversation
        started with.

        Without a match the messages start a conversation: ``FIRST``, or ``HISTORY_REWRITTEN`` if they carry the
        reference of a recorded turn or share their first message, the system prompt aside, with a recorded
        conversation. (A subagent, an auxiliary call or a second task shares neither.)
        """
        tools = list(tools) if tools else None
        best, done = self._followed(messages, tools)
        numbers = array("i")
        for message in messages[done:]:
            numbers.append(self._numbers.get(_key(message), -1))
            if numbers[-1] < 0:  # nothing that is recorded goes on with it
                break
        packed = numbers.tobytes()
        end = 0
        chosen = False
        open_prompts = [(prompt, 0) for prompt in self.prompts(best)]
        while open_prompts:
            prompt, start = open_prompts.pop()
            stop = start + prompt.added
            if stop >= len(numbers) or not packed.startswith(prompt.messages, start * WIDTH):
                continue
            if prompt.parent is None and prompt.tools != tools:
                continue
            turns = [turn for turn in self.answers(prompt) if numbers[stop] in turn.forms]
            if len(turns) > 1:
                chosen = True
                # Samples that say the same: the first of those that were not thrown away and least continued.
                turns.sort(key=lambda turn: (turn.discarded is not None, len(self.prompts(turn)), turn.number))
            for turn in turns:
                if end <= stop:
                    best, end = turn, stop + 1
                open_prompts += [(child, stop + 1) for child in self.prompts(turn)]
        if best is not None and not chosen:
            self._follow(messages[done : done + end], tools, best, done)
        history, new_messages = list(messages[: done + end]), list(messages[done + end :])
        return Match(
            turn=best,
            history=history,
            new_messages=new_messages,
            cause=None if best else self._opening(messages),
            rewritten=best is not None and self._left(best, new_messages),
            prompt=self._asked(best, packed[end * WIDTH :], tools),
            tools=tools,
        )

    def prompt(self, match: Match, ids: SequenceOf[int], cause: BreakCause | None = None) -> Prompt:
        """The prompt that asks what was located; hand it to ``record`` once there is an answer.

        Args:
            match: from ``locate``. If its messages were asked meanwhile, that prompt is returned.
            ids: [n] int: what is appended to the stream of ``match.turn`` or, with a ``cause``, the whole prompt.
            cause: why the stream of ``match.turn`` is not continued.

        Raises:
            ValueError: neither a turn to continue nor a cause.
        """
        cause = cause or match.cause
        if cause is None and match.turn is None:
            raise ValueError("a prompt continues a turn or has a cause to start a stream; this one has neither")
        keys = [_key(message) for message in match.new_messages]
        messages = array("i", map(self._number, keys)).tobytes()
        if messages and (asked := self._asked(match.turn, messages, match.tools)):
            return asked
        prompt = Prompt(
            parent=match.turn,
            cause=cause,
            length=len(ids) + (match.turn.end if match.turn and cause is None else 0),
            pieces=tuple(self._cut(ids)),
            messages=messages,
        )
        if match.turn is None:
            prompt.tools, prompt.topic = _kept(match.tools), _topic(keys)
        self._answers[prompt] = []
        self._prompts.setdefault(match.turn, []).append(prompt)
        return prompt

    def ids(self, goal: Prompt | Turn) -> list[int]:
        """The whole prompt, or the stream through a turn's output, [n] int, in a list of the caller's own."""
        return stream_ids(goal)

    def tail(self, prompt: Prompt, count: int) -> list[int]:
        """The last ids of what the prompt adds to its parent's stream, ``count`` of them if it has so many."""
        ids: tuple[int, ...] = ()
        for piece in reversed(prompt.pieces):
            ids = piece + ids
            if len(ids) >= count:
                break
        return list(ids[-count:])

    def record(
        self,
        prompt: Prompt,
        output_ids: SequenceOf[int],
        logprobs: SequenceOf[float],
        finish_reason: str | None = None,
        *,
        echo: SequenceOf[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        weights: SequenceOf[Weights] = (),
        sampling: Mapping[str, Any] | None = None,
        skew: str | None = None,
        barred: bool = False,
    ) -> Turn:
        """Keep one answer.

        Args:
            prompt: what was asked.
            output_ids, logprobs: [output_len] each, as the server sampled them.
            echo: the prompt's ids as the server says it received them; None or empty where it doesn't say.
            metadata, weights, sampling, skew, barred: as in ``Turn``.

        Raises:
            TokenFidelityError: lengths differ, an id is not an int of the vocabulary, a logprob is not finite or above
                0 (by more than rounding), or the echo is another prompt. The answer is kept as a turn with a ``fault``.
        """
        number = len(self.turns)
        fault = self._fault(number, prompt, output_ids, logprobs, echo)
        turn = Turn(
            ref=f"{self._id}.{number}",
            number=number,
            prompt=prompt,
            output_ids=() if fault else tuple(map(_TOKENS.setdefault, output_ids, output_ids)),
            logprobs=array("d", [] if fault else [value if value < 0 else 0.0 for value in logprobs]),
            finish_reason=finish_reason,
            metadata=dict(metadata or {}),
            weights=() if fault else tuple(weights),
            sampling=sampling or {},
            skew=skew,
            barred=barred,
        )
        turn.forms.add(self._number(turn.ref))
        self.turns.append(turn)
        self._by_ref[turn.ref] = turn
        if fault is not None:
            turn.fault = str(fault)
            turn.metadata["rejected"] = {"echo": echo, "output_ids": output_ids, "logprobs": logprobs}
            raise fault
        self._answers[prompt].append(turn)
        if len(self._answers[prompt]) > 1:
            self._last = (None, [], None)
        return turn

    def answered(self, turn: Turn, *forms: Message) -> None:
        """Say as which assistant messages a harness may hand this turn back without its reference."""
        turn.forms.update(self._number(_key(form)) for form in forms)

    def discard(self, ref: str, reason: str) -> None:
        """Mark an answer that the harness threw away: kept, and left out of training unless asked for.

        Raises:
            KeyError: no such turn.
        """
        self._by_ref[ref].discarded = reason

    def sequences(self, include_discarded: bool = False) -> list[Sequence]:
        """The streams from their starts to their last turns, each sampled token trained in exactly one of them.

        A turn through which several streams run is trained in the first and not in the others. A discarded turn is not
        trained where a stream runs through it, and no stream ends with one, unless ``include_discarded``. Nor does one
        end with a turn without a token. A barred turn is not trained either. Streams come in the order in which they
        left one another.

        What is recorded later does not change them.
        """
        return [Sequence(path, trained) for path, trained in streams.paths_of(self.turns, include_discarded)]

    def turn_sequences(self) -> list[Sequence]:
        """One stream for each turn, up to its end, trained on that turn's tokens alone."""
        return [Sequence(streams.path_to(turn), {turn}) for turn in streams.wanted(self.turns)]

    def report(self) -> FidelityReport:
        """What became of the tokens, as ``sequences()`` would hand them out."""
        return streams.report(self.turns)

    def _followed(self, messages: SequenceOf[Message], tools: Any) -> tuple[Turn | None, int]:
        """The turn that the last list continued, and how many messages lead to it, if this list begins with them."""
        turn, known, known_tools = self._last
        done = len(known)
        return (turn, done) if tools == known_tools and list(messages[:done]) == known else (None, 0)

    def _follow(self, messages: SequenceOf[Message], tools: Any, turn: Turn, done: int) -> None:
        """Remember that these messages, after the first ``done`` of the last list, lead to this turn."""
        _, known, known_tools = self._last if done else (None, [], _kept(tools))
        known += map(_copied, messages)
        self._last = turn, known, known_tools

    def _number(self, key: Hashable) -> int:
        """What stands for a message from now on."""
        return self._numbers.setdefault(key, len(self._numbers))

    def _asked(self, turn: Turn | None, messages: bytes, tools: Any) -> Prompt | None:
        """The recorded prompt that asks just that after this turn."""
        for prompt in self.prompts(turn):
            if prompt.messages == messages and (turn is not None or prompt.tools == tools):
                return prompt
        return None

    def _left(self, turn: Turn, new_messages: SequenceOf[Message]) -> bool:
        followers = (follower for prompt in self.prompts(turn) for follower in self.answers(prompt))
        return self._refer(new_messages) or any(follower.discarded is None for follower in followers)

    def _refer(self, messages: SequenceOf[Message]) -> bool:
        return any(message.get(TURN_KEY) in self._by_ref for message in messages)

    def _opening(self, messages: SequenceOf[Message]) -> BreakCause:
        topics = (prompt.topic for prompt in self.prompts(None) if self.answers(prompt))
        known = self._refer(messages) or _topic(map(_key, messages)) in topics
        return BreakCause.HISTORY_REWRITTEN if known else BreakCause.FIRST

    def _cut(self, ids: SequenceOf[int]) -> Iterator[tuple[int, ...]]:
        """The ids in pieces, each of them the object that other prompts hold too."""
        packed = array("I", ids).tobytes()
        ends = {0, len(packed)}
        for boundary in self._boundaries:
            place = packed.find(boundary)
            while place >= 0:
                if place % WIDTH == 0:
                    ends.add(place + WIDTH)
                place = packed.find(boundary, place + 1)
        for start, end in pairwise(sorted(ends)):
            packed_piece = packed[start:end]
            piece = self._pieces.get(packed_piece)
            if piece is None:
                new = ids[start // WIDTH : end // WIDTH]
                piece = self._pieces[packed_piece] = tuple(map(_TOKENS.setdefault, new, new))
            yield piece

    def _fault(
        self,
        number: int,
        prompt: Prompt,
        output_ids: SequenceOf[int],
        logprobs: SequenceOf[float],
        echo: SequenceOf[int] | None,
    ) -> TokenFidelityError | None:
        def fault(message: str, position: int | None, expected: Any, found: Any) -> TokenFidelityError:
            return TokenFidelityError(message, turn=number, position=position, expected=expected, found=found)

        if echo and echo != (sent := self.ids(prompt)):
            if len(echo) != len(sent):
                return fault("the server answered a prompt of another length", None, len(sent), len(echo))
            position = next(i for i, (ours, theirs) in enumerate(zip(sent, echo, strict=True)) if ours != theirs)
            return fault("the server answered another prompt", position, sent[position], echo[position])
        if len(output_ids) != len(logprobs):
            return fault("as many logprobs as sampled tokens are needed", None, len(output_ids), len(logprobs))
        for position, token in enumerate(output_ids):
            if type(token) is not int or not 0 <= token < self._limit:
                message = (
                    "a sampled token is not an id of the vocabulary: where the model has more ids than its tokenizer, "
                    "pass vocab_size= (the rows of its embedding), or have the server mask those above"
                )
                return fault(message, position, f"int below {self._limit}", token)
        for position, value in enumerate(logprobs):
            if type(value) not in (float, int) or not -math.inf < value <= ROUNDING:
                return fault("a logprob is not a finite number up to 0", position, "<= 0", value)
        return None


def _key(message: Message) -> Hashable:
    """What makes two messages the same."""
    ref: str | None = message.get(TURN_KEY)
    if ref is not None:
        return ref
    calls = message.get("tool_calls")
    return (
        message.get("role"),
        text_key(message),
        tuple(map(call_key, calls)) if calls else None,
        message.get("tool_call_id"),
        message.get("name"),
    )


def text_key(message: Message) -> str:
    """What makes two contents the same: the text, white space around it aside."""
    content = message.get("content")
    text = content if isinstance(content, str) else text_of(content)
    return _canonical(content) if text is None else text.strip()


def call_key(call: Mapping[str, Any]) -> tuple[Any, str]:
    """What makes two calls the same: the name, and the arguments as JSON with sorted keys."""
    function = call_function(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return function.get("name"), arguments.strip()
    return function.get("name"), _canonical(arguments)


#: The copies of tools that were made last.
_copies: deque[Any] = deque(maxlen=8)


def _kept(tools: Any) -> Any:
    """A copy that the harness cannot alter, one for all rollouts that have the same tools."""
    if tools is None:
        return None
    kept = next((known for known in tuple(_copies) if known == tools), None)
    if kept is None:
        kept = copy.deepcopy(tools)
        _copies.append(kept)
    return kept


def _copied(message: Message) -> Message:
    """A copy that stays as it is if the message is altered; what is inside matters only where there is no reference."""
    nested = message.get("tool_calls") or not isinstance(message.get("content"), str)
    return copy.deepcopy(message) if nested and TURN_KEY not in message else dict(message)


def _topic(keys: Iterable[Hashable]) -> Hashable:
    """The first message, the system prompt aside."""
    return next((key for key in keys if not (isinstance(key, tuple) and key[0] in ("system", "developer"))), None)
