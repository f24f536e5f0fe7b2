"""Which tokens a rollout sent and which it sampled: a tree of turns, from which training sequences are cut.

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
from collections.abc import Collection, Hashable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hermes_atropos.errors import TokenFidelityError
from hermes_atropos.messages import TURN_KEY, Message

__all__ = [
    "MASK",
    "PROMPT_LOGPROB",
    "BreakCause",
    "FidelityReport",
    "Ledger",
    "Match",
    "Prompt",
    "Sequence",
    "Turn",
]

#: What stands in ``masks`` and in ``logprobs`` where a token is not trained (Atropos' convention).
MASK = -100
PROMPT_LOGPROB = 1.0

#: Float rounding can lift the logprob of a certain token above 0: up to this it is recorded as 0.0, beyond it refused.
ROUNDING = 1e-4

# Bytes of a number in an array of type "i" or "I".
WIDTH = array("i").itemsize

# One object per token id, shared by all ledgers: a growing list of ids then costs 8 bytes a token, not 40.
_TOKENS: dict[int, int] = {}


class BreakCause(StrEnum):
    """Why a turn starts a stream instead of continuing its parent's."""

    FIRST = "first"
    """It opens a conversation: no break."""
    TEMPLATE = "template"
    """The chat template changes earlier turns when messages are appended (drops their thinking, for instance)."""
    HISTORY_REWRITTEN = "history_rewritten"
    """The harness changed, dropped or inserted earlier messages, or changed the tools."""
    UNPROVABLE = "unprovable"
    """The renderer could not prove what the appended messages look like as tokens."""
    TRUNCATED = "truncated"
    """The parent's answer was cut off, and the renderer could not close it."""


@dataclass(slots=True, eq=False)
class Prompt:
    """What a model was asked; several turns share one where it was sampled more than once.

    Attributes:
        parent: the turn whose answer its messages follow; None at the start of a conversation.
        cause: why it starts a stream; None where it continues its parent's.
        length: tokens of the whole prompt.
    """

    parent: Turn | None = field(repr=False)
    cause: BreakCause | None
    length: int
    _messages: bytes = field(repr=False)
    _pieces: array[int] = field(repr=False)
    _tools: Any = field(repr=False)


@dataclass(slots=True, eq=False)
class Turn:
    """One sampled answer.

    Attributes:
        ref: what ``message[TURN_KEY]`` holds.
        number: its place in the ledger, from 0.
        prompt: what was asked.
        output_ids: [output_len] unsigned int, as sampled, end token included.
        logprobs: [output_len] float, of the sampled tokens.
        finish_reason: as the server reported it; None where it did not.
        discarded: why the harness threw the answer away; None if it did not.
        fault: why the answer can't be trusted; such a turn has no tokens, and ``metadata["rejected"]`` has what came.
        metadata: what is known of the call, such as ``server_url`` and ``weights_version``.
    """

    ref: str
    number: int
    prompt: Prompt
    output_ids: array[int] = field(repr=False)
    logprobs: array[float] = field(repr=False)
    finish_reason: str | None
    discarded: str | None = None
    fault: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    _answers: set[int] = field(default_factory=set, repr=False)

    @property
    def parent(self) -> Turn | None:
        """The turn that this one follows in the conversation, whether or not the stream was kept."""
        return self.prompt.parent

    @property
    def before(self) -> Turn | None:
        """The turn that this one continues token by token; None where its stream starts."""
        return self.prompt.parent if self.prompt.cause is None else None

    @property
    def cause(self) -> BreakCause | None:
        """Why its stream starts here; None where it goes on."""
        return self.prompt.cause


@dataclass(frozen=True, slots=True)
class Match:
    """Where a list of messages stands in the ledger.

    Attributes:
        turn: the latest recorded turn that the messages continue; None if they continue none.
        history: the messages up to and including that turn's answer; empty if there is none.
        new_messages: what follows.
        cause: ``FIRST`` or ``HISTORY_REWRITTEN`` where ``turn`` is None, else None.
        rewritten: whether the messages leave what was recorded after ``turn``: it was gone on from otherwise, or they
            hold answers that did not follow it so.
        prompt: the recorded prompt with exactly these messages and tools, if they were asked before.
    """

    turn: Turn | None
    history: list[Message]
    new_messages: list[Message]
    cause: BreakCause | None
    rewritten: bool
    prompt: Prompt | None
    _tools: Any


@dataclass(slots=True)
class Sequence:
    """One stream, ready for a trainer.

    Attributes:
        tokens: [seq_len] int, as sent and sampled.
        masks: [seq_len] int: the token's id where it is trained, else -100.
        logprobs: [seq_len] float: the sampled logprob where it is trained, else 1.0.
        turns: refs of the turns in the stream, in order.
        spans: [n_turns] (start, stop) of each turn's output in ``tokens``.
    """

    tokens: list[int]
    masks: list[int]
    logprobs: list[float]
    turns: list[str]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """What became of a rollout's tokens; ``+`` and ``sum(reports, FidelityReport())`` add reports up.

    ``tokens_sampled == tokens_trained + tokens_discarded``.

    Attributes:
        turns: sampled answers.
        sequences: how many training sequences they make.
        breaks: sequences that exist because a stream was broken, by cause.
        mismatches: answers that did not fit what was asked.
        tokens_sampled, tokens_trained, tokens_discarded: counts.
        left_out: a sentence for each turn that is not trained.
    """

    turns: int = 0
    sequences: int = 0
    breaks: dict[BreakCause, int] = field(default_factory=dict)
    mismatches: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    tokens_discarded: int = 0
    left_out: list[str] = field(default_factory=list)

    def __add__(self, other: FidelityReport) -> FidelityReport:
        causes = [*self.breaks, *(cause for cause in other.breaks if cause not in self.breaks)]
        return FidelityReport(
            turns=self.turns + other.turns,
            sequences=self.sequences + other.sequences,
            breaks={cause: self.breaks.get(cause, 0) + other.breaks.get(cause, 0) for cause in causes},
            mismatches=self.mismatches + other.mismatches,
            tokens_sampled=self.tokens_sampled + other.tokens_sampled,
            tokens_trained=self.tokens_trained + other.tokens_trained,
            tokens_discarded=self.tokens_discarded + other.tokens_discarded,
            left_out=self.left_out + other.left_out,
        )


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
        # What follows is kept here: a prompt and a turn that knew one another would be garbage for the collector alone.
        self._answers: dict[Prompt, list[Turn]] = {}
        self._prompts: dict[Turn | None, list[Prompt]] = {None: []}
        self._id = uuid.uuid4().hex[:12]
        self._limit = 2**32 if vocab_size is None else vocab_size
        self._boundaries = [array("I", [boundary]).tobytes() for boundary in boundaries]
        self._pieces = _Pool()
        self._messages = _Pool()
        self._last: list[tuple[Message | None, int]] = []
        # How far the last list was followed, without a choice between turns: a longer list is followed from there.
        self._walked = NOWHERE
        self._tip: Prompt | Turn | None = None
        # Garbage collection looks through a list each time, and at a tuple of numbers once.
        self._tip_ids: tuple[int, ...] = ()

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
        numbers = self._numbers(messages)
        packed = numbers.tobytes()
        tools = list(tools) if tools else None
        best, end, known, known_tools = self._walked
        plain = True
        if best is not None and packed.startswith(known) and known_tools == tools:
            open_prompts = [(prompt, end) for prompt in self.prompts(best)]
        else:
            best, end = None, 0
            open_prompts = [(prompt, 0) for prompt in self.prompts(None) if prompt._tools == tools]
        while open_prompts:
            prompt, start = open_prompts.pop()
            stop = start + len(prompt._messages) // WIDTH
            if stop >= len(numbers) or not packed.startswith(prompt._messages, start * WIDTH):
                continue
            answer = numbers[stop]
            turns = [turn for turn in self.answers(prompt) if answer in turn._answers]
            if len(turns) > 1:
                plain = False
                # Samples that say the same: the first of those that were not thrown away and least continued.
                turns.sort(key=lambda turn: (turn.discarded is not None, len(self.prompts(turn)), turn.number))
            for turn in turns:
                if end <= stop:
                    best, end = turn, stop + 1
                for child in self.prompts(turn):
                    open_prompts.append((child, stop + 1))
        if best is not None and plain:
            self._walked = best, end, packed[: end * WIDTH], self._keep(tools)
        return Match(
            turn=best,
            history=list(messages[:end]),
            new_messages=list(messages[end:]),
            cause=None if best else self._opening(messages),
            rewritten=best is not None and self._left(best, messages[end:]),
            prompt=self._same(self.prompts(best), packed[end * WIDTH :], tools),
            _tools=tools,
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
        before = match.turn if cause is None else None
        messages = array("i", [self._messages.add(_key(message)) for message in match.new_messages]).tobytes()
        known = messages and self._same(self.prompts(match.turn), messages, match._tools)
        if known:
            return known
        prompt = Prompt(
            parent=match.turn,
            cause=cause,
            length=(_end(before) if before else 0) + len(ids),
            _messages=messages,
            _pieces=array("I", [self._pieces.add(piece) for piece in self._cut(ids)]),
            _tools=self._keep(match._tools) if match.turn is None else None,
        )
        self._answers[prompt] = []
        self._prompts.setdefault(match.turn, []).append(prompt)
        return prompt

    def ids(self, prompt: Prompt) -> list[int]:
        """The whole prompt, [prompt.length] int, in a list of the caller's own."""
        return self._followed(prompt)

    def tail(self, prompt: Prompt, count: int) -> list[int]:
        """The last ids of what the prompt adds to its parent's stream, ``count`` of them if it has so many."""
        packed = b""
        for number in reversed(prompt._pieces):
            packed = self._pieces[number] + packed
            if len(packed) >= count * WIDTH:
                break
        return array("I", packed[-count * WIDTH :]).tolist()

    def prompt_ids(self, turn: Turn) -> list[int]:
        """The stream through that turn's output, in a list of the caller's own."""
        return self._followed(turn)

    def record(
        self,
        prompt: Prompt,
        output_ids: SequenceOf[int],
        logprobs: SequenceOf[float],
        finish_reason: str | None = None,
        *,
        echo: SequenceOf[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Turn:
        """Keep one answer.

        Args:
            prompt: what was asked.
            output_ids, logprobs: [output_len] each, as the server sampled them.
            echo: the prompt's ids as the server says it received them; None or empty where it doesn't say.

        Raises:
            TokenFidelityError: lengths differ, an id is no int of the vocabulary, a logprob is not finite or above 0
                (by more than rounding), or the echo is another prompt. The answer is kept as a turn with a ``fault``.
        """
        number = len(self.turns)
        fault = self._fault(number, prompt, output_ids, logprobs, echo)
        turn = Turn(
            ref=f"{self._id}.{number}",
            number=number,
            prompt=prompt,
            output_ids=array("I", [] if fault else output_ids),
            logprobs=array("d", [] if fault else [value if value < 0 else 0.0 for value in logprobs]),
            finish_reason=finish_reason,
            metadata=dict(metadata or {}),
        )
        turn._answers.add(self._messages.add(turn.ref))
        self.turns.append(turn)
        self._by_ref[turn.ref] = turn
        if fault is not None:
            turn.fault = str(fault)
            turn.metadata["rejected"] = {"echo": echo, "output_ids": output_ids, "logprobs": logprobs}
            raise fault
        self._answers[prompt].append(turn)
        if len(self._answers[prompt]) > 1:
            self._walked = NOWHERE
        return turn

    def answered(self, turn: Turn, *forms: Message) -> None:
        """Say as which assistant messages a harness may hand this turn back without its reference."""
        turn._answers |= {self._messages.add(_key(form)) for form in forms}

    def discard(self, ref: str, reason: str) -> None:
        """Mark an answer that the harness threw away: kept, and left out of training unless asked for.

        Raises:
            KeyError: no such turn.
        """
        self._by_ref[ref].discarded = reason

    def sequences(self, include_discarded: bool = False) -> list[Sequence]:
        """The streams from their starts to their last turns, each sampled token trained in exactly one of them.

        A turn through which several streams run is trained in the first and masked in the others. A discarded turn is
        masked where a stream runs through it, and no stream ends with one, unless ``include_discarded``. Nor does one
        end with a turn without a token. Streams come in the order in which they left one another.
        """
        return [self._sequence(path, trained) for path, trained in self._paths(include_discarded)]

    def turn_sequences(self, include_discarded: bool = False) -> list[Sequence]:
        """One stream for each turn, up to its end, trained on that turn's tokens alone."""
        return [self._sequence(self._path(turn), {turn}) for turn in self._wanted(include_discarded)]

    def report(self) -> FidelityReport:
        """What became of the tokens, as ``sequences()`` would hand them out."""
        paths = self._paths(include_discarded=False)
        breaks: dict[BreakCause, int] = {}
        asked: set[Prompt] = set()
        for path, trained in paths:
            first = next(turn for turn in path if turn in trained)
            prompts = {turn.prompt for turn in path}
            cause = BreakCause.HISTORY_REWRITTEN if prompts & asked else path[0].cause
            # Another sample of a prompt is no break.
            if first.prompt not in asked and cause is not None and cause is not BreakCause.FIRST:
                breaks[cause] = breaks.get(cause, 0) + 1
            asked |= prompts
        sampled = sum(_sampled(turn) for turn in self.turns)
        trained_tokens = sum(len(turn.output_ids) for _, trained in paths for turn in trained)
        return FidelityReport(
            turns=len(self.turns),
            sequences=len(paths),
            breaks=breaks,
            mismatches=sum(turn.fault is not None for turn in self.turns),
            tokens_sampled=sampled,
            tokens_trained=trained_tokens,
            tokens_discarded=sampled - trained_tokens,
            left_out=[
                f"turn {turn.number} ({_sampled(turn)} tokens): {turn.fault or turn.discarded}"
                for turn in self.turns
                if turn.fault is not None or turn.discarded is not None
            ],
        )

    def _numbers(self, messages: SequenceOf[Message]) -> array[int]:
        """The pool's number of each message, -1 for those that it does not have.

        Most lists begin as the last one did, and a message that equals the one there has its number. But one that holds
        further objects may have been altered in place, and would equal itself: its number is looked up anew.
        """
        last = self._last
        numbers = [number if old == message else -1 for (old, number), message in zip(last, messages, strict=False)]
        changed = [place for place, number in enumerate(numbers) if number < 0]
        for place in [*changed, *range(len(numbers), len(messages))]:
            message = messages[place]
            number = self._messages.find(_key(message))
            nested = message.get("tool_calls") or not isinstance(message.get("content"), str)
            numbers[place : place + 1] = [number]
            last[place : place + 1] = [(None if nested and TURN_KEY not in message else dict(message), number)]
        return array("i", numbers)

    def _same(self, prompts: SequenceOf[Prompt], messages: bytes, tools: Any) -> Prompt | None:
        """The one of these prompts that asks just that."""
        for prompt in prompts:
            if prompt._messages == messages and (prompt.parent is not None or prompt._tools == tools):
                return prompt
        return None

    def _left(self, turn: Turn, new_messages: SequenceOf[Message]) -> bool:
        followers = (follower for prompt in self.prompts(turn) for follower in self.answers(prompt))
        return self._refer(new_messages) or any(follower.discarded is None for follower in followers)

    def _refer(self, messages: SequenceOf[Message]) -> bool:
        return any(message.get(TURN_KEY) in self._by_ref for message in messages)

    def _opening(self, messages: SequenceOf[Message]) -> BreakCause:
        if self._refer(messages):
            return BreakCause.HISTORY_REWRITTEN
        first = _first(map(_key, messages))
        for prompt in self.prompts(None):
            if self.answers(prompt) and first == _first(
                self._messages[number] for number in array("i", prompt._messages)
            ):
                return BreakCause.HISTORY_REWRITTEN
        return BreakCause.FIRST

    def _keep(self, tools: Any) -> Any:
        """A copy that the harness cannot alter, one for all conversations that have the same tools."""
        return next((prompt._tools for prompt in self.prompts(None) if prompt._tools == tools), None) or copy.deepcopy(
            tools
        )

    def _cut(self, ids: SequenceOf[int]) -> list[bytes]:
        packed = array("I", ids).tobytes()
        ends = {len(packed)}
        for boundary in self._boundaries:
            place = packed.find(boundary)
            while place >= 0:
                if place % WIDTH == 0:
                    ends.add(place + WIDTH)
                place = packed.find(boundary, place + 1)
        pieces = []
        start = 0
        for end in sorted(ends):
            pieces.append(packed[start:end])
            start = end
        return pieces

    def _unpack(self, prompt: Prompt) -> list[int]:
        return array("I", b"".join([self._pieces[index] for index in prompt._pieces])).tolist()

    def _followed(self, goal: Prompt | Turn) -> list[int]:
        """The ids of the stream through a prompt or an answer.

        Those of the last goal are kept, so that what continues it costs a copy and what is new.
        """
        missing: list[Prompt | Turn] = []
        node: Prompt | Turn | None = goal
        while node is not None and node is not self._tip:
            missing.append(node)
            node = node.prompt if isinstance(node, Turn) else node.parent if node.cause is None else None
        followed = [] if node is None else list(self._tip_ids)
        for node in reversed(missing):
            ids = node.output_ids if isinstance(node, Turn) else self._unpack(node)
            followed.extend(map(_TOKENS.setdefault, ids, ids))
        if missing:
            self._tip, self._tip_ids = goal, tuple(followed)
        return followed

    def _paths(self, include_discarded: bool) -> list[tuple[list[Turn], set[Turn]]]:
        """The streams as lists of turns, each with the turns that are trained there."""
        wanted = self._wanted(include_discarded)
        continued = set()
        for turn in wanted:
            before = turn.before
            while before is not None and before not in continued:
                continued.add(before)
                before = before.before
        paths = [self._path(turn) for turn in wanted if turn not in continued]
        paths.sort(key=lambda path: [turn.number for turn in path])
        open_turns = set(wanted)
        shared = []
        for path in paths:
            trained = open_turns.intersection(path)
            open_turns -= trained
            shared.append((path, trained))
        return shared

    def _wanted(self, include_discarded: bool) -> list[Turn]:
        """The turns to train; those without a token have nothing to teach."""
        return [turn for turn in self.turns if turn.output_ids and (include_discarded or turn.discarded is None)]

    def _path(self, turn: Turn) -> list[Turn]:
        """The turns of its stream, up to it."""
        path = [turn]
        while (before := path[-1].before) is not None:
            path.append(before)
        return path[::-1]

    def _sequence(self, path: list[Turn], trained: set[Turn]) -> Sequence:
        tokens: list[int] = []
        masks: list[int] = []
        logprobs: list[float] = []
        spans = []
        for turn in path:
            delta = self._unpack(turn.prompt)
            output = turn.output_ids.tolist()
            tokens += delta
            spans.append((len(tokens), len(tokens) + len(output)))
            tokens += output
            masks += [MASK] * len(delta) + (output if turn in trained else [MASK] * len(output))
            logprobs += [PROMPT_LOGPROB] * len(delta)
            logprobs += turn.logprobs if turn in trained else [PROMPT_LOGPROB] * len(output)
        return Sequence(tokens, masks, logprobs, [turn.ref for turn in path], spans)

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
                return fault("a sampled token is no id of the vocabulary", position, f"int below {self._limit}", token)
        for position, value in enumerate(logprobs):
            if type(value) not in (float, int) or not -math.inf < value <= ROUNDING:
                return fault("a logprob is no finite number up to 0", position, "<= 0", value)
        return None


NOWHERE: tuple[Turn | None, int, bytes, Any] = (None, 0, b"", None)


class _Pool:
    """Values stored once, and named by a number."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def __getitem__(self, number: int) -> Any:
        return self._values[number]

    def add(self, value: Hashable) -> int:
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def find(self, value: Hashable) -> int:
        """Its number, or -1 if it was never added."""
        return self._numbers.get(value, -1)


def _key(message: Message) -> Hashable:
    """What makes two messages the same."""
    ref: str | None = message.get(TURN_KEY)
    if ref is not None:
        return ref
    content = message.get("content")
    calls = message.get("tool_calls")
    return (
        message.get("role"),
        content.strip() if isinstance(content, str) else _text(content),
        tuple(map(_call_key, calls)) if calls else None,
        message.get("tool_call_id"),
        message.get("name"),
    )


def _text(content: Any) -> str:
    """The text of content that is no string: nothing, or a list of parts."""
    if content is None:
        return ""
    if all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content).strip()
    return json.dumps(content, sort_keys=True, default=str)


def _call_key(call: Any) -> tuple[Any, str]:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return function.get("name"), arguments.strip()
    return function.get("name"), json.dumps(arguments, sort_keys=True, default=str)


def _first(keys: Any) -> Any:
    """The first message's key, the system prompt aside."""
    return next((key for key in keys if not (isinstance(key, tuple) and key[0] in ("system", "developer"))), None)


def _end(turn: Turn) -> int:
    return turn.prompt.length + len(turn.output_ids)


def _sampled(turn: Turn) -> int:
    return len(turn.metadata["rejected"]["output_ids"]) if turn.fault is not None else len(turn.output_ids)
