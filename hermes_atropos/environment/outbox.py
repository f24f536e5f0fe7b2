"""Finished groups on disk until Atropos' API has taken them, so that no end of a process loses one.

A process writes one file, a JSON line an event, each on disk (fsync) before the next thing is done:

    began     the rollouts of an item were started
    failed    they came to no group
    ready     a group is finished, and the line has all of it; or, after sending, it was not sent after all
    sending   the group is about to be sent
    taken     the API has taken it, into a queue that ends with the API
    drawn     the trainer has drawn it from that queue
    refused   the API, or a policy, has refused it for good
    unknown   it was sent, and whether the API has it can't be known
    gone      the API had taken it, and may have ended before the trainer drew it

The file is locked by its process. One that nobody holds is left over: the next process of the environment goes on with
it. A group that is `ready` is sent; one that is `sending` may have been taken and is not sent again. A last line that
was torn by the process's end never happened.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import uuid
from collections import Counter, deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hermes_atropos.errors import ConfigurationError, RecordError

__all__ = ["Entry", "Event", "Journal", "Outbox"]

#: Bytes after which a file is given up for a new one, once nothing in it waits.
ROTATE_AT = 64 * 2**20


class Event(StrEnum):
    BEGAN = "began"
    FAILED = "failed"
    READY = "ready"
    SENDING = "sending"
    TAKEN = "taken"
    DRAWN = "drawn"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    GONE = "gone"


#: After these nothing more is to be done for a group.
ENDS = {Event.FAILED, Event.DRAWN, Event.REFUSED, Event.UNKNOWN, Event.GONE}


@dataclass(eq=False, slots=True)
class Entry:
    """What became of one item's rollouts.

    Attributes:
        id: also ``group_overrides["group_id"]`` of each of its groups.
        item: the item, as text.
        state: the last event.
        groups: what is to be sent, in one request; empty until it is ready.
    """

    id: str
    item: str
    journal: Journal
    state: Event = Event.BEGAN
    groups: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """One file, held by this process until :meth:`close`.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._file)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        whole = self.path.read_bytes()
        os.ftruncate(self._file, whole.rfind(b"\n") + 1)  # a torn line

    def write(self, event: Event, entry_id: str, **more: Any) -> None:
        """Add a line; it is on disk when this returns."""
        line = json.dumps({"event": event, "id": entry_id, **more}, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def entries(self) -> dict[str, Entry]:
        """What the file says, by id, in the order in which things began.

        Raises:
            RecordError: a line is damaged.
        """
        entries: dict[str, Entry] = {}
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    said = json.loads(line)
                    event, entry_id = Event(said["event"]), said["id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RecordError(
                        f"{self.path}, line {number} is damaged ({error!r}): move the file away to start without it"
                    ) from error
                entry = entries.setdefault(entry_id, Entry(entry_id, said.get("item", ""), self))
                entry.state = event
                entry.groups = said.get("groups", entry.groups)
        return entries

    def close(self) -> None:
        os.close(self._file)


class Outbox:
    """The groups of one environment process that the API has not taken yet. Its methods may be called on any thread.

    Args:
        folder: shared by the processes of an environment.
        name: the environment's.

    Attributes:
        waiting: what is to be sent, first in, first out.
        doubtful: what an ended process had sent without hearing of it.
        queued: what the API had taken from an ended process, and the trainer had not drawn.
        cut: what an ended process had begun.
        counts: how often each event happened.

    Raises:
        ConfigurationError: the folder can't be used.
        RecordError: a file in it is damaged.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self._folder, self._name = Path(folder), name.replace("/", "-")
        self._lock = threading.Lock()
        self.waiting: deque[Entry] = deque()
        self.doubtful: list[Entry] = []
        self.queued: list[Entry] = []
        self.cut: list[Entry] = []
        self.counts: Counter[Event] = Counter()
        self._open: dict[Journal, set[str]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_over()
            self._journal = self._new_journal()
        except OSError as error:
            raise ConfigurationError(f"outbox_path={str(folder)!r} cannot be used: {error}") from error

    def _new_journal(self) -> Journal:
        journal = Journal(self._folder / f"{self._name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl")
        self._open[journal] = set()
        return journal

    def _take_over(self) -> None:
        """Go on with the files that no process holds."""
        left: dict[Event, MutableSequence[Entry]] = {
            Event.READY: self.waiting,
            Event.SENDING: self.doubtful,
            Event.TAKEN: self.queued,
            Event.BEGAN: self.cut,
        }
        for path in sorted(self._folder.glob(f"{self._name}-*-*.jsonl"), key=lambda path: path.stat().st_mtime):
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                journal = Journal(path)
                unended = [entry for entry in journal.entries().values() if entry.state not in ENDS]
                self._open[journal] = {entry.id for entry in unended}
                for entry in unended:
                    left[entry.state].append(entry)
                if not unended:
                    self._put_away(journal)

    def began(self, entry_id: str, item: Any) -> Entry:
        """The rollouts of an item start."""
        entry = Entry(entry_id, repr(item)[:200], self._journal)
        self.note(entry, Event.BEGAN, item=entry.item)
        return entry

    def ready(self, entry: Entry, groups: list[dict[str, Any]]) -> None:
        """Its groups are finished; they wait to be sent."""
        entry.groups = groups
        self.note(entry, Event.READY, groups=groups)
        self.waiting.append(entry)

    def note(self, entry: Entry, event: Event, **more: Any) -> None:
        """Write down what has happened to an entry, with what is to be known beside."""
        with self._lock:
            entry.journal.write(event, entry.id, **more)
            entry.state = event
            self.counts[event] += 1
            if event is Event.TAKEN or event in ENDS:
                entry.groups = []
            open_ = self._open[entry.journal]
            if event not in ENDS:
                open_.add(entry.id)
                return
            open_.discard(entry.id)
            if not open_ and entry.journal is not self._journal:
                self._put_away(entry.journal)
            elif not open_ and self._journal.path.stat().st_size > ROTATE_AT:
                full, self._journal = self._journal, self._new_journal()
                self._put_away(full)

    def _put_away(self, journal: Journal) -> None:
        """A file in which nothing waits: removed if all of it was taken, else kept by another name."""
        states = {entry.state for entry in journal.entries().values()}
        if states <= {Event.DRAWN, Event.FAILED}:
            journal.path.unlink()
        else:
            journal.path.rename(journal.path.with_suffix(".kept"))
        journal.close()
        del self._open[journal]

    def summary(self) -> str:
        """What became of the groups, in words."""
        return ", ".join(f"{self.counts[event]} {event}" for event in Event if self.counts[event]) or "there were none"

    def close(self) -> None:
        """Let go of the files; what waits in them is for the next process."""
        with self._lock:
            for journal in list(self._open):
                if self._open[journal]:
                    journal.close()
                else:
                    self._put_away(journal)
            self._open.clear()
