"""What a rollout leaves: sequences of tokens, steps, the cause of its end; as training data and as a JSONL record."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hermes_atropos.errors import (
    ConfigurationError,
    HermesAtroposError,
    RecordError,
    TokenFidelityError,
    UntrackedError,
)
from hermes_atropos.settings import is_number
from hermes_atropos.tokens.ledger import MASK, PROMPT_LOGPROB, BreakCause, FidelityReport, Ledger
from hermes_atropos.toolcalls import ParseStatus, ToolCall, tool_response

__all__ = [
    "RECORD_VERSION",
    "AgentResult",
    "AgentStep",
    "SequenceData",
    "StopReason",
    "ToolResult",
    "read_record",
    "read_records",
    "scored_group",
    "write_record",
]

logger = logging.getLogger(__name__)

#: Raised by one whenever a record of the former version can no longer be read.
RECORD_VERSION = 1
RECORD_FORMAT = "hermes-atropos/rollout"

SURROGATE = re.compile("[\ud800-\udfff]")


class StopReason(StrEnum):
    """Why a rollout ended."""

    COMPLETED = "completed"
    """The model answered without calling a tool."""
    ITERATION_LIMIT = "iteration_limit"
    """The limit on steps was reached before an answer."""
    INTERRUPTED = "interrupted"
    """``interrupt()`` or Ctrl-C asked the agent to stop."""
    CANCELLED = "cancelled"
    """The task that awaited the rollout was cancelled."""
    TIMEOUT = "timeout"
    """A time limit on the turn or on the rollout ran out."""
    CONTEXT_LENGTH = "context_length"
    """The conversation filled the model's context."""
    TRUNCATED = "truncated"
    """The model ran out of ``max_tokens`` in the middle of its answer or of a tool call."""
    TOOL_CALL_RETRIES = "tool_call_retries"
    """The model kept making malformed tool calls until its retries were spent."""
    EMPTY_RESPONSE = "empty_response"
    """The model said nothing and called nothing."""
    SERVER_ERROR = "server_error"
    """The inference server failed for good."""
    ERROR = "error"
    """Anything else that raised; ``AgentResult.error`` has it."""


@dataclass
class SequenceData:
    """One unbroken token stream: what was sent to the server and sampled from it, position by position.

    Attributes:
        full_text: the tokens as text, special tokens included. A function that makes it will do: it is called when the
            text is first read, which training never does.
        tokens: ``[seq_len] int``.
        masked_tokens: ``[seq_len] int``, the token where it was sampled, -100 elsewhere.
        logprobs: ``[seq_len] float``, finite and ≤ 0 where sampled, 1.0 elsewhere.
        metadata: whatever else is known. Under ``turns``, where it came from a ledger, a dict for each turn in it:
            ``ref``, the ``start`` and ``end`` of what it sampled, ``finish_reason``, ``discarded``: why the harness
            threw it away, or None, and ``cause``: why a stream starts with it (a ``BreakCause``), or None.

    Raises:
        TokenFidelityError: at construction, if the three differ in length or a position breaks these rules.
    """

    full_text: str
    tokens: list[int]
    masked_tokens: list[int]
    logprobs: list[float]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.masked_tokens) == len(self.logprobs):
            raise TokenFidelityError(
                "tokens, masks and logprobs differ in length",
                expected=f"{len(self.tokens)} of each",
                found=f"{len(self.masked_tokens)} masks and {len(self.logprobs)} logprobs",
            )
        if (position := self._first_misfit()) is not None:
            raise TokenFidelityError(
                f"position {position} is neither sampled nor masked",
                position=position,
                expected="(token, token, finite logprob <= 0) or (token, -100, 1.0)",
                found=(self.tokens[position], self.masked_tokens[position], self.logprobs[position]),
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "full_text": self.full_text}

    def _first_misfit(self) -> int | None:
        if not {*map(type, self.tokens)} <= {int}:
            return next(position for position, token in enumerate(self.tokens) if type(token) is not int)
        sampled = [position for position, mask in enumerate(self.masked_tokens) if mask != MASK]
        masked = len(self.tokens) - len(sampled)
        # No logprob that fits a sampled token counts here. Counting takes a fraction of looking at each position.
        counts = self.logprobs.count(PROMPT_LOGPROB) == masked and MASK not in self.tokens
        if counts and all(map(self._fits, sampled)):
            return None
        return next(position for position in range(len(self.tokens)) if not self._fits(position))

    def _fits(self, position: int) -> bool:
        token, mask, logprob = self.tokens[position], self.masked_tokens[position], self.logprobs[position]
        if mask == MASK:
            return token != MASK and logprob == PROMPT_LOGPROB
        return mask == token >= 0 and type(logprob) is float and -math.inf < logprob <= 0

    @classmethod
    def from_sequence_node(cls, node: Any) -> SequenceData:
        """From an atroposlib ``SequenceNode``, or anything with its attributes.

        Raises:
            TokenFidelityError: the node is misaligned (atroposlib's own managed server makes such nodes).
        """
        return cls(
            full_text=node.full_text,
            tokens=[int(token) for token in node.tokens],
            masked_tokens=[int(mask) for mask in node.masked_tokens],
            logprobs=[float(logprob) for logprob in node.logprobs],
            metadata=dict(node.metadata or {}),
        )

    @property
    def trainable(self) -> int:
        """How many tokens were sampled, and may be trained on."""
        return sum(mask != MASK for mask in self.masked_tokens)

    def __len__(self) -> int:
        return len(self.tokens)


class MadeWhenRead:
    """An attribute that may be set to a function: it is called when the attribute is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return value

    def __set__(self, instance: object, value: Any) -> None:
        vars(instance)[self._name] = value


SequenceData.full_text = MadeWhenRead("full_text")  # type: ignore[assignment]


@dataclass(slots=True)
class ToolResult:
    """What a tool call came back with.

    Attributes:
        name: the tool's name.
        content: what the model reads.
        success: False if the tool raised, ran out of time, or never ran. A command that exits non-zero is a success.
        error: one sentence on what went wrong with the tool; None if nothing did.
        duration_s: seconds; None where the tool never ran.
        exit_code: the exit code of a command; None for other tools.
        call_id: ``id`` of the call that this answers.
        overflow: path of the file with the whole result, where ``content`` is cut; None where it is whole.
    """

    name: str
    content: str
    success: bool = True
    error: str | None = None
    duration_s: float | None = None
    exit_code: int | None = None
    call_id: str = ""
    overflow: str | None = None

    def to_xml(self) -> str:
        """A ``<tool_response>`` block, for chat templates that have no role for tools."""
        return tool_response(self.name, self.content, self.duration_s)

    def to_message(self) -> dict[str, Any]:
        """An OpenAI message of role ``tool``."""
        return {"role": "tool", "tool_call_id": self.call_id, "name": self.name, "content": self.content}


@dataclass(slots=True)
class AgentStep:
    """One turn and the tools it called, the conversation's own retries included.

    Attributes:
        step_number: from 1.
        assistant_message: what the model said, tool calls as it wrote them.
        tool_calls: every attempt at a call, malformed ones included; ``tool_calls[i].status`` tells them apart.
        tool_results: the answers, in the order of the calls.
        sequence_data: the sequence that holds the step's tokens, shared by the steps in it; None where untracked.
        reward: the step's own reward, where the environment gives one; see ``AgentResult.to_scored_data``.
        turns: references of the step's model calls, the last one being the one that counted.
        finish_reason: as the server reported it.
    """

    step_number: int
    assistant_message: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_results: list[ToolResult] = field(default_factory=list)
    sequence_data: SequenceData | None = None
    reward: float | None = None
    turns: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def has_tool_calls(self) -> bool:
        return bool(self.tool_calls)

    @property
    def malformed_calls(self) -> int:
        """How many attempts at a call could not be run as written."""
        return sum(call.status is not ParseStatus.OK for call in self.tool_calls)

    @property
    def tool_errors(self) -> int:
        """How many tools failed; a command that exits non-zero is no failure."""
        return sum(not result.success for result in self.tool_results)


@dataclass
class AgentResult:
    """What a rollout leaves, however it ended.

    Attributes:
        success: whether the model came to an answer (not whether the answer is right).
        final_response: its text; empty where there is none.
        steps: in order.
        total_tokens: tokens of all sequences; where untracked, what the server counted.
        error: what went wrong, in words; None if nothing did.
        stop_reason: why it ended.
        messages: the whole conversation as OpenAI messages, the system prompt and retries included.
        tools: OpenAI definitions of the tools that the model was offered.
        sequences: what may be trained on; over them each sampled token is trainable once.
        all_sequences: the same with what the harness threw away made trainable too; empty if it threw nothing away.
        fidelity: the ledger's report: turns, sequences, breaks by cause, tokens left out and why; None where untracked.
        tracked: whether the backend gave token ids. Untracked rollouts serve evaluation and SFT, not RL.
        untrainable: why the tokens must not be trained on; None if they may.
        sampling: the sampling parameters of the model calls.
        packages: versions of the packages that made this; filled in when a record is written.
    """

    success: bool
    final_response: str = ""
    steps: list[AgentStep] = field(default_factory=list)
    total_tokens: int = 0
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    stop_reason: StopReason = StopReason.COMPLETED
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    sequences: list[SequenceData] = field(default_factory=list)
    all_sequences: list[SequenceData] = field(default_factory=list)
    fidelity: FidelityReport | None = None
    tracked: bool = True
    untrainable: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def trajectory_data(self) -> SequenceData | None:
        """The sequence of the last step that has one."""
        of_steps = (step.sequence_data for step in reversed(self.steps) if step.sequence_data is not None)
        return next(of_steps, self.sequences[-1] if self.sequences else None)

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def total_tool_calls(self) -> int:
        """Attempts at tool calls, malformed ones included."""
        return sum(len(step.tool_calls) for step in self.steps)

    @property
    def tool_errors(self) -> int:
        return sum(step.tool_errors for step in self.steps)

    def attach_tokens(self, ledger: Ledger, decode: Callable[[list[int]], str]) -> None:
        """Take over what a ledger recorded, and give each step the sequence that holds its tokens.

        Args:
            ledger: of this rollout.
            decode: token ids to text, special tokens included.
        """
        self.fidelity = ledger.report()
        self.sequences = _sequences(ledger, decode, include_discarded=False)
        if any(turn.discarded is not None for turn in ledger.turns):
            self.all_sequences = _sequences(ledger, decode, include_discarded=True)
        self.total_tokens = sum(map(len, self.sequences))
        self.untrainable = next((turn.fault for turn in ledger.turns if turn.fault is not None), None)
        # Reversed, so that a turn which several streams share counts as the first one's: that one trains it.
        holders = {
            turn["ref"]: sequence for sequence in reversed(self.sequences) for turn in sequence.metadata["turns"]
        }
        for step in self.steps:
            held = (holders[ref] for ref in reversed(step.turns) if ref in holders)
            step.sequence_data = next(held, None)

    def to_messages(self) -> list[dict[str, Any]]:
        """The conversation as plain OpenAI messages, without this library's own keys: for evaluation and SFT."""
        return [
            {key: value for key, value in message.items() if not key.startswith("atropos_")}
            for message in self.messages
        ]

    def to_scored_items(self, score: float, *, include_discarded: bool = False) -> list[dict[str, Any]]:
        """One atroposlib ``ScoredDataItem`` a sequence; empty where nothing was sampled.

        ``BaseEnv.collect_trajectory`` can return one item only, and the default ``collect_trajectories`` drops
        ``inference_logprobs``; override ``collect_trajectories`` and return ``scored_group`` to keep both.

        Args:
            score: of the whole rollout; each of its sequences carries it.
            include_discarded: train also on what the harness threw away.

        Returns:
            dicts with ``tokens``, ``masks``, ``inference_logprobs`` (each ``[seq_len]``), ``scores``, ``messages``,
            ``overrides`` (the temperature, which the trainer divides its logits by), and ``advantages``
            (``[seq_len]``, or None if no step has a reward): for a sampled token its step's reward, or the score if
            that step has none; 0.0 elsewhere. No baseline is taken off: that takes the whole group.

        Raises:
            UntrackedError: the rollout has no token ids, or must not be trained on.
            ConfigurationError: the score is not finite.
        """
        if not self.tracked:
            raise UntrackedError(
                "this rollout ran on a server without token ids: it has messages for evaluation and SFT, but no tokens "
                "to train on. Use a server that tracks tokens (vLLM, SGLang, or any APIServer with a token call)"
            )
        if self.untrainable:
            raise UntrackedError(f"this rollout must not be trained on: {self.untrainable}")
        if not math.isfinite(score):
            raise ConfigurationError(f"a score must be a finite number, not {score!r}")
        temperature = self.sampling.get("temperature")
        messages = [{**message, "content": message.get("content") or ""} for message in self.to_messages()]
        return [
            {
                "tokens": list(sequence.tokens),
                "masks": list(sequence.masked_tokens),
                "scores": float(score),
                "advantages": self._advantages(sequence, float(score)),
                "ref_logprobs": None,
                "inference_logprobs": list(sequence.logprobs),
                "messages": messages,
                "group_overrides": None,
                "overrides": {} if temperature is None else {"temperature": temperature},
                "images": None,
            }
            for sequence in ((include_discarded and self.all_sequences) or self.sequences)
        ]

    def to_scored_data(self, score: float, *, include_discarded: bool = False) -> dict[str, Any]:
        """This rollout alone as an atroposlib ``ScoredDataGroup``; see ``scored_group`` for several.

        Raises:
            UntrackedError: the rollout has no token ids, sampled nothing, or must not be trained on.
            ConfigurationError: the score is not finite.
        """
        return scored_group([self], [score], include_discarded=include_discarded)

    def _advantages(self, sequence: SequenceData, score: float) -> list[float] | None:
        if all(step.reward is None for step in self.steps):
            return None
        for step in self.steps:
            if step.reward is not None and not is_number(step.reward):
                raise ConfigurationError(
                    f"step {step.step_number} has the reward {step.reward!r}: give a finite number"
                )
        rewards = {ref: step.reward for step in self.steps if step.reward is not None for ref in step.turns}
        advantages = [0.0 if mask == MASK else score for mask in sequence.masked_tokens]
        for turn in sequence.metadata.get("turns", ()):
            if turn["ref"] in rewards:
                for position in range(turn["start"], turn["end"]):
                    if sequence.masked_tokens[position] != MASK:
                        advantages[position] = float(rewards[turn["ref"]])
        return advantages


def _sequences(ledger: Ledger, decode: Callable[[list[int]], str], *, include_discarded: bool) -> list[SequenceData]:
    sequences = []
    for stream in ledger.sequences(include_discarded=include_discarded):
        turns = []
        for ref, (start, end) in zip(stream.turns, stream.spans, strict=True):
            turn = ledger.turn(ref)
            facts = {"finish_reason": turn.finish_reason, "discarded": turn.discarded, "cause": turn.cause}
            turns.append({"ref": ref, "start": start, "end": end} | facts)
        text: Any = functools.partial(decode, stream.tokens)
        sequences.append(SequenceData(text, stream.tokens, stream.masks, stream.logprobs, {"turns": turns}))
    return sequences


def scored_group(
    results: Sequence[AgentResult], scores: Sequence[float], *, include_discarded: bool = False
) -> dict[str, Any]:
    """The rollouts of one item as an atroposlib ``ScoredDataGroup``: what ``collect_trajectories`` returns.

    A rollout whose history was rewritten adds several sequences, and one that sampled nothing adds none. So the group's
    own size stands in ``group_overrides["group_size"]``: ``BaseEnv`` skips a group of another size than the configured
    one. It also skips a group whose scores are all the same (``ensure_scores_are_not_same``).

    Args:
        results: the rollouts.
        scores: one a rollout.
        include_discarded: train also on what the harness threw away.

    Returns:
        ``tokens``, ``masks``, ``inference_logprobs``: ``[n_sequences][seq_len]``; ``scores``, ``messages``,
        ``overrides``: ``[n_sequences]``; ``advantages``: ``[n_sequences][seq_len]``, or None if no step has a reward;
        ``generation_params``; ``group_overrides``.

    Raises:
        UntrackedError: a rollout has no token ids or must not be trained on, or none of them sampled anything.
        ConfigurationError: a score is not finite, or there is not one for each rollout.
    """
    if len(results) != len(scores):
        raise ConfigurationError(f"{len(results)} rollouts need as many scores, not {len(scores)}")
    items = []
    for result, score in zip(results, scores, strict=True):
        of_rollout = result.to_scored_items(score, include_discarded=include_discarded)
        if not of_rollout:
            logger.warning("a rollout that sampled nothing is left out of its group: %s", result.error)
        items += of_rollout
    if not items:
        errors = "; ".join(sorted({result.error or result.stop_reason for result in results})) or "no rollouts"
        raise UntrackedError(f"nothing was sampled, so there is nothing to train on ({errors})")
    group: dict[str, Any] = {
        key: [item[key] for item in items]
        for key in ("tokens", "masks", "scores", "inference_logprobs", "messages", "overrides")
    }
    if any(item["advantages"] for item in items):
        group["advantages"] = [
            item["advantages"] or [0.0 if mask == MASK else item["scores"] for mask in item["masks"]] for item in items
        ]
    else:
        group["advantages"] = None
    return group | {
        "ref_logprobs": None,
        "generation_params": _plain(results[0].sampling),
        "group_overrides": {"group_size": len(items)},
        "images": None,
    }


def write_record(result: AgentResult, path: str | Path, *, append: bool = False) -> None:
    """Write a rollout as one line of JSON. The same result makes the same bytes, also after it was read back.

    Values of ``metadata`` that JSON cannot hold are written as their text.

    Args:
        result: what to write; ``packages`` is filled in where it is empty.
        path: the file, ``.jsonl`` by custom; missing folders are made.
        append: add a line to the file instead of replacing it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if append else "wb", buffering=0) as file:
        file.write(_line(result))


def read_record(path: str | Path) -> AgentResult:
    """Read the one rollout of a file.

    Raises:
        RecordError: the record is truncated, damaged or of another version, or the file holds none or several.
    """
    records = read_records(path)
    result = next(records, None)
    if result is None:
        raise RecordError(f"{path} is empty: the rollout was never written; run it again")
    if next(records, None) is not None:
        raise RecordError(f"{path} holds several records: use read_records")
    return result


def read_records(path: str | Path) -> Iterator[AgentResult]:
    """Read the rollouts of a file one after the other.

    Raises:
        RecordError: the file cannot be read, or a record is truncated, damaged or of another version.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _result(line, f"{path}, line {number}")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from error


def _line(result: AgentResult) -> bytes:
    places = {id(sequence): place for place, sequence in enumerate(result.sequences)}
    rollout = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    rollout["packages"] = result.packages or package_versions()
    # Steps share the rollout's sequences, so that a sequence's place is enough.
    rollout["steps"] = [
        {entry.name: getattr(step, entry.name) for entry in fields(step)}
        | {"sequence_data": places.get(id(step.sequence_data), step.sequence_data)}
        for step in result.steps
    ]
    text = json.dumps(
        {"format": RECORD_FORMAT, "version": RECORD_VERSION, "rollout": _plain(rollout)},
        ensure_ascii=False,
        allow_nan=False,
        sort_keys=True,
        separators=(",", ":"),
    )
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode() + b"\n"


def _written_by(record: dict[str, Any]) -> Any:
    rollout = record.get("rollout")
    return rollout.get("packages") if isinstance(rollout, dict) else "it does not say which"


def _result(line: bytes, where: str) -> AgentResult:
    if not line.endswith(b"\n"):
        raise RecordError(f"{where}: the record is truncated (it lacks its end): the writer was cut off; run it again")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: the record is damaged and is no JSON ({error}); remove this line") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise RecordError(f"{where}: this is no record of a rollout; hand in what write_record wrote")
    if record.get("version") != RECORD_VERSION:
        raise RecordError(
            f"{where}: the record is of version {record.get('version')!r}, and this release reads {RECORD_VERSION}; "
            f"read it with the release of hermes-atropos that wrote it: {_written_by(record)}"
        )
    try:
        rollout = record["rollout"]
        if not all(isinstance(message["role"], str) for message in rollout["messages"]):
            raise TypeError("a message has no role")
        sequences = [_whole_sequence(sequence) for sequence in rollout["sequences"]]
        steps = [
            AgentStep(
                **step
                | {
                    "tool_calls": [ToolCall.model_validate(call) for call in step["tool_calls"]],
                    "tool_results": [ToolResult(**answer) for answer in step["tool_results"]],
                    "sequence_data": _sequence(step["sequence_data"], sequences),
                }
            )
            for step in rollout["steps"]
        ]
        return AgentResult(
            **rollout
            | {
                "steps": steps,
                "sequences": sequences,
                "all_sequences": [_whole_sequence(sequence) for sequence in rollout["all_sequences"]],
                "stop_reason": StopReason(rollout["stop_reason"]),
                "fidelity": _fidelity(rollout["fidelity"]),
            }
        )
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, HermesAtroposError) as error:
        raise RecordError(f"{where}: the record is damaged ({error}); remove this line") from error


def _sequence(written: Any, sequences: Sequence[SequenceData]) -> SequenceData | None:
    if isinstance(written, int):
        if written < 0:
            raise IndexError(f"there is no sequence {written}")
        return sequences[written]
    return None if written is None else _whole_sequence(written)


def _whole_sequence(written: dict[str, Any]) -> SequenceData:
    sequence = SequenceData(**written)
    for turn in sequence.metadata.get("turns", ()):
        if not (isinstance(turn["ref"], str) and 0 <= turn["start"] <= turn["end"] <= len(sequence)):
            raise ValueError(f"a sequence of {len(sequence)} tokens has no turn {turn}")
    return sequence


def _fidelity(written: dict[str, Any] | None) -> FidelityReport | None:
    if written is None:
        return None
    breaks = {BreakCause(cause): count for cause, count in written["breaks"].items()}
    return FidelityReport(**written | {"breaks": breaks})


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it: mappings with text keys, lists, text, finite numbers, None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # A pair of surrogates is one character once JSON was read; joined now, the first writing equals the second.
        return (
            value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            if SURROGATE.search(value)
            else value
        )
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if {*map(type, value)} <= {int} or ({*map(type, value)} == {float} and all(map(math.isfinite, value))):
            return value  # tokens and logprobs, by the hundred thousand
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return _plain(value.tolist())
    return str(value)


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of what makes a rollout what it is, without importing any of it."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("hermes-atropos", "hermes-agent", "atroposlib", "renderers", "transformers"):
        try:
            versions[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            continue
    return versions
