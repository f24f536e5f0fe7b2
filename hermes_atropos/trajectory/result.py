"""What a rollout leaves: its steps, the sequences of its tokens, and the cause of its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hermes_atropos.exports import atropos
from hermes_atropos.tokens import FidelityReport
from hermes_atropos.toolcalls import ToolCall, tool_response
from hermes_atropos.trajectory.sequence import SequenceData

if TYPE_CHECKING:
    from hermes_atropos.tokens import Ledger

__all__ = ["AgentResult", "AgentStep", "StopReason", "ToolResult"]


class StopReason(StrEnum):
    """Why a rollout ended."""

    COMPLETED = "completed"
    """The model answered without calling a tool."""
    ITERATION_LIMIT = "iteration_limit"
    """A limit on steps, or on calls that repeat themselves, was reached before an answer."""
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
        return sum(not call.ok for call in self.tool_calls)

    @property
    def tool_errors(self) -> int:
        """How many tools failed; a command that exits non-zero is not a failure."""
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
        vocabulary: what each token of the sequences says, by its id: its text, or its bytes where it is a part of a
            character; empty where that is unknown.
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
    vocabulary: dict[int, str | bytes] = field(default_factory=dict)
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

    def attach_tokens(
        self,
        ledger: Ledger,
        decode: Callable[[list[int]], str],
        vocabulary: Mapping[int, str | bytes] | None = None,
    ) -> None:
        """Take over what a ledger recorded, and give each step the sequence that holds its tokens.

        Args:
            ledger: of this rollout.
            decode: token ids to text, special tokens included.
            vocabulary: what each token says, those of this rollout among them.
        """
        self.fidelity = ledger.report()
        cut = ledger.sequences()
        self.total_tokens = sum(map(len, cut))
        self.sequences = [SequenceData.cut(sequence, decode) for sequence in cut]
        if any(turn.discarded is not None for turn in ledger.turns):
            everything = ledger.sequences(include_discarded=True)
            self.all_sequences = [SequenceData.cut(sequence, decode) for sequence in everything]
        self.untrainable = next((turn.fault for turn in ledger.turns if turn.fault is not None), None)
        if vocabulary is not None:
            self.vocabulary = {token: vocabulary[token] for token in sorted(self.token_ids())}
        # Reversed, so that a turn which several sequences hold counts as the first one's: that one trains it.
        holders = {ref: sequence for sequence in reversed(self.sequences) for ref in sequence.turns}
        for step in self.steps:
            held = (holders[ref] for ref in reversed(step.turns) if ref in holders)
            step.sequence_data = next(held, None)

    def token_ids(self) -> set[int]:
        """The ids that occur in its sequences."""
        return {token for sequence in (*self.sequences, *self.all_sequences) for token in sequence.tokens}

    def to_messages(self) -> list[dict[str, Any]]:
        """The conversation as plain OpenAI messages, without this library's own keys: for evaluation and SFT."""
        return [
            {key: value for key, value in message.items() if not key.startswith("atropos_")}
            for message in self.messages
        ]

    def to_scored_items(self, score: float, *, include_discarded: bool = False) -> list[dict[str, Any]]:
        """This rollout as atroposlib ``ScoredDataItem``s; see ``exports.atropos.scored_items``."""
        return atropos.scored_items(self, score, include_discarded=include_discarded)

    def to_scored_data(self, score: float, *, include_discarded: bool = False) -> dict[str, Any]:
        """This rollout alone as an atroposlib ``ScoredDataGroup``; see ``exports.atropos.scored_group``."""
        return atropos.scored_group([self], [score], include_discarded=include_discarded)
