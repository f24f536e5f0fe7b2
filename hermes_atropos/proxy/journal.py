"""A session on disk, turn by turn: what a killed process had finished is there when it starts again.

Each line is JSON. The first says whose session it is; each further one is a turn, with what its prompt adds to the turn
that it continues, or that a turn was discarded. A line that was cut off belongs to a turn that no client saw.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hermes_atropos.errors import RecordError, TokenFidelityError
from hermes_atropos.messages import Message
from hermes_atropos.tokens import BreakCause, Ledger, Match, Prompt, Turn, Weights
from hermes_atropos.values import plain

__all__ = ["Journal", "read", "replay"]


class Journal:
    """Writes the lines of one session.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None, session: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._prompts: dict[Prompt, int] = {}
        if path is not None and session is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600, exist_ok=False)
            self._append({"session": session})

    def turn(self, turn: Turn, asked: Sequence[Message], message: Message | None) -> None:
        """Keep a turn, before its client has it.

        Args:
            asked: the messages that its prompt adds.
            message: what the client gets; None if it gets nothing.
        """
        if self.path is None:
            return
        prompt, rejected = turn.prompt, turn.metadata.get("rejected")
        entry: dict[str, Any] = {
            "turn": turn.number,
            "prompt": self._prompts.get(prompt),
            "finish_reason": turn.finish_reason,
            "metadata": {key: value for key, value in turn.metadata.items() if key != "rejected"},
            "weights": turn.weights,
            "sampling": turn.sampling,
            "skew": turn.skew,
            "barred": turn.barred,
            "message": message,
            **(rejected or {"output_ids": turn.output_ids, "logprobs": turn.logprobs.tolist()}),
        }
        if entry["prompt"] is None:
            entry["asked"] = {
                "parent": prompt.parent and prompt.parent.number,
                "cause": prompt.cause,
                "ids": [token for piece in prompt.pieces for token in piece],
                "messages": asked,
                "tools": prompt.tools,
            }
            self.known(prompt)
        self._append(entry)

    def discard(self, turn: Turn) -> None:
        """Keep that a turn was discarded."""
        self._append({"discard": turn.number, "reason": turn.discarded})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            line = json.dumps(plain(entry), separators=(",", ":")).encode() + b"\n"
            with self.path.open("ab", buffering=0) as file:
                file.write(line)

    def known(self, prompt: Prompt) -> None:
        """The prompt stands in the file already."""
        self._prompts[prompt] = len(self._prompts)

    def close(self) -> None:
        """Remove the file: the session's record takes its place."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a journal says of its session, and its other lines; a line that was cut off is removed.

    Raises:
        RecordError: it isn't a journal.
    """
    *lines, cut_off = path.read_bytes().split(b"\n")
    if cut_off:
        os.truncate(path, path.stat().st_size - len(cut_off))
    try:
        first, *entries = map(json.loads, lines)
        return first["session"], entries
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not the journal of a session ({error}); move it elsewhere") from error


def replay(
    entries: Sequence[Mapping[str, Any]], ledger: Ledger, journal: Journal
) -> Iterator[tuple[Turn, list[Message], Message | None]]:
    """Record a journal's turns in an empty ledger; gives each turn, the messages that it answers, and its own."""
    turns: dict[int | None, Turn | None] = {None: None}
    prompts: list[tuple[Prompt, list[Message]]] = []
    for entry in entries:
        if "discard" in entry:
            if turn := turns.get(entry["discard"]):
                turn.discarded = entry["reason"]
            continue
        if asked := entry.get("asked"):
            parent, cause = turns[asked["parent"]], asked["cause"] and BreakCause(asked["cause"])
            match = Match(parent, [], asked["messages"], cause, False, None, asked["tools"])
            prompts.append((ledger.prompt(match, asked["ids"], cause), asked["messages"]))
            journal.known(prompts[-1][0])
        prompt, messages = prompts[-1 if asked else entry["prompt"]]
        with contextlib.suppress(TokenFidelityError):  # it was refused then, too, and is kept as such
            ledger.record(
                prompt,
                entry["output_ids"],
                entry["logprobs"],
                entry["finish_reason"],
                echo=entry.get("echo"),
                weights=[Weights(**weights) for weights in entry["weights"]],
                **{name: entry[name] for name in ("metadata", "sampling", "skew", "barred")},
            )
        turns[entry["turn"]] = turn = ledger.turns[-1]
        yield turn, messages, entry["message"]
