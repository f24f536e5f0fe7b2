"""What a rollout leaves: steps, sequences of tokens, the cause of its end; and its record."""

from hermes_atropos.trajectory.result import (
    RECORD_VERSION,
    AgentResult,
    AgentStep,
    SequenceData,
    StopReason,
    ToolResult,
    read_record,
    read_records,
    scored_group,
    write_record,
)

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
