"""What a rollout leaves: steps, sequences of tokens, the cause of its end; and its record."""

from hermes_atropos.exports.atropos import scored_group
from hermes_atropos.trajectory.records import RECORD_VERSION, Recording, read_record, read_records, write_record
from hermes_atropos.trajectory.result import AgentResult, AgentStep, StopReason, ToolResult
from hermes_atropos.trajectory.sequence import SequenceData

__all__ = [
    "RECORD_VERSION",
    "AgentResult",
    "AgentStep",
    "Recording",
    "SequenceData",
    "StopReason",
    "ToolResult",
    "read_record",
    "read_records",
    "scored_group",
    "write_record",
]
