"""A rollout as one line of JSON in a file, or, while it runs, as a line for each time that it grew."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from hermes_atropos.errors import HermesAtroposError, RecordError
from hermes_atropos.tokens import BreakCause, FidelityReport
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.trajectory.changes import apply, difference
from hermes_atropos.trajectory.result import AgentResult, AgentStep, StopReason, ToolResult
from hermes_atropos.trajectory.sequence import SequenceData
from hermes_atropos.values import SURROGATE, plain

__all__ = [
    "RECORD_VERSION",
    "Recording",
    "package_versions",
    "read_record",
    "read_records",
    "record_line",
    "write_record",
]

logger = logging.getLogger(__name__)

#: Raised by one whenever a record of the former version can no longer be read.
RECORD_VERSION = 1
RECORD_FORMAT = "hermes-atropos/rollout"

#: How a line begins that has a part of a rollout.
PART = b'{"part_of":'


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
        file.write(record_line(result))


class Recording:
    """The record of a rollout that is under way: a line for each time that it grew, with what is new.

    Several rollouts, of several processes too, may be recorded in one file. What was written stays, whatever becomes of
    the process.

    Args:
        path: the file, as of :func:`write_record`; ``read_records`` gives one result for each recording in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._id = uuid.uuid4().hex
        self._last: Any = None
        self._parts = 0
        self._lock = threading.Lock()

    def write(self, result: AgentResult) -> None:
        """Append what is new in ``result``, as it is by now."""
        with self._lock:
            now = _plain(result)
            change = difference(self._last, now)
            if change is None:
                return
            line = _encoded({"part_of": self._id, "number": self._parts, "change": change})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # someone was cut off
                        line = b"\n" + line
                file.write(line)
            self._last, self._parts = now, self._parts + 1


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
    parts: dict[str, Parts] = {}
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                if line.startswith(PART):
                    _put_together(parts, line, where)
                else:
                    yield _result(_record(line, where), where)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    for rollout in parts.values():
        yield _result({"rollout": rollout.value}, f"{rollout.where} and its further parts")


@dataclass(slots=True)
class Parts:
    """A rollout whose parts were read one after the other."""

    where: str
    value: Any = None
    count: int = 0


def _put_together(parts: dict[str, Parts], line: bytes, where: str) -> None:
    """Add a line to the rollout that it is a part of."""
    try:
        part = json.loads(line)
    except (ValueError, RecursionError):
        logger.warning("%s: the writer was cut off in this line; what it wrote before is read", where)
        return
    _check(part, where)
    try:
        rollout = parts.setdefault(part["part_of"], Parts(where))
        if part["number"] != rollout.count:
            raise ValueError(f"part {rollout.count} of it is missing")
        rollout.value, rollout.count = apply(rollout.value, part["change"]), rollout.count + 1
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where}: the record is damaged ({error}); remove this line") from error


def _plain(result: AgentResult) -> Any:
    places = {id(sequence): place for place, sequence in enumerate(result.sequences)}

    def written(sequence: SequenceData | None) -> int | dict[str, Any] | None:
        """Steps share the rollout's sequences, so that a sequence's place is enough."""
        return None if sequence is None else places.get(id(sequence), sequence.as_dict())

    return plain(
        _fields(result)
        | {
            "packages": result.packages or package_versions(),
            "vocabulary": {
                token: list(said) if isinstance(said, bytes) else said for token, said in result.vocabulary.items()
            },
            "steps": [_fields(step) | {"sequence_data": written(step.sequence_data)} for step in result.steps],
            "sequences": [sequence.as_dict() for sequence in result.sequences],
            "all_sequences": [sequence.as_dict() for sequence in result.all_sequences],
        }
    )


def record_line(result: AgentResult) -> bytes:
    """The line that ``write_record`` writes."""
    return _encoded({"rollout": _plain(result)})


def _encoded(content: dict[str, Any]) -> bytes:
    line = {**content, "format": RECORD_FORMAT, "version": RECORD_VERSION}
    text = json.dumps(line, ensure_ascii=False, allow_nan=False, sort_keys="part_of" not in line, separators=(",", ":"))
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode() + b"\n"


def _fields(value: AgentResult | AgentStep) -> dict[str, Any]:
    return {entry.name: getattr(value, entry.name) for entry in fields(value)}


def _record(line: bytes, where: str) -> Any:
    if not line.endswith(b"\n"):
        raise RecordError(f"{where}: the record is truncated (it lacks its end): the writer was cut off; run it again")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: the record is damaged and is not JSON ({error}); remove this line") from error
    _check(record, where)
    return record


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise RecordError(f"{where}: this is not a record of a rollout; pass what write_record wrote")
    if record.get("version") != RECORD_VERSION:
        rollout = record.get("rollout")
        written_by = rollout.get("packages") if isinstance(rollout, dict) else "it does not say which"
        raise RecordError(
            f"{where}: the record is of version {record.get('version')!r}, and this release reads {RECORD_VERSION}; "
            f"read it with the release of hermes-atropos that wrote it: {written_by}"
        )


def _result(record: Any, where: str) -> AgentResult:
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
        result = AgentResult(
            **rollout
            | {
                "vocabulary": _vocabulary(rollout.get("vocabulary", {})),
                "steps": steps,
                "sequences": sequences,
                "all_sequences": [_whole_sequence(sequence) for sequence in rollout["all_sequences"]],
                "stop_reason": StopReason(rollout["stop_reason"]),
                "fidelity": _fidelity(rollout["fidelity"]),
            }
        )
        if result.vocabulary and (unknown := result.token_ids() - result.vocabulary.keys()):
            raise ValueError(f"its vocabulary lacks the tokens {sorted(unknown)[:5]}")
        return result
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
    for turn in written["metadata"].get("turns", ()):
        if not (isinstance(turn["ref"], str) and 0 <= turn["start"] <= turn["end"] <= len(sequence)):
            raise ValueError(f"a sequence of {len(sequence)} tokens has no turn {turn}")
    return sequence


def _vocabulary(written: dict[str, str | list[int]]) -> dict[int, str | bytes]:
    return {int(token): said if isinstance(said, str) else bytes([*said]) for token, said in written.items()}


def _fidelity(written: dict[str, Any] | None) -> FidelityReport | None:
    if written is None:
        return None
    breaks = {BreakCause(cause): count for cause, count in written["breaks"].items()}
    return FidelityReport(**written | {"breaks": breaks})


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of what makes a rollout what it is, without importing any of it; a fork of Hermes by its own name."""
    names = ["hermes-atropos", "hermes-agent", "atroposlib", "renderers", "transformers"]
    installed = {found.name for found in distributions.distributions()}
    if "hermes-agent" not in installed:
        names[1:2] = distributions.packages_distributions().get("run_agent", [])
    versions = {name: distributions.version(name) for name in names if name in installed}
    return {"python": ".".join(map(str, sys.version_info[:3]))} | versions
