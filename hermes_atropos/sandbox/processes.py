"""The processes of a sandbox, found by a mark in their environment, wherever they have moved."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hermes_atropos.runtime import turnstile

__all__ = ["MARKER", "kill_processes"]

#: The variable that every process of a sandbox inherits. Its value is the sandbox's mark; some have more behind a dot,
#: by which they are told from the others.
MARKER = "HERMES_ATROPOS_SANDBOX"

MARK = re.compile(rf"{MARKER}=(([^\0.]*)[^\0]*)".encode())

#: Bytes that are read at once. The kernel gives less only at the end.
CHUNK = 16384

#: Seconds that a process may take to load a program, or to end, on a very busy machine.
PATIENCE = 1.0

#: Seconds between two looks at most.
MOST_BETWEEN = 0.1


@dataclass(eq=False)
class Search:
    """What one sandbox looks for: processes that carry ``mark`` or work in a folder under ``root``."""

    mark: bytes
    root: str | None
    done: bool = False


_searches: list[Search] = []
_looking = threading.Lock()
_next_look = 0.0


def kill_processes(mark: str, root: Path | None) -> None:
    """Kill every process that carries ``mark`` or works in a folder under ``root``, until none is found.

    Sessions and parents do not identify a sandbox's processes, because a process can leave both. The mark is
    inherited; a process that has cleared its environment is found by its working folder. A workspace that the user gave
    is not under ``root``: the user's own shell may work there.

    Every process of the machine has to be looked at, so one look serves all the sandboxes that wait for one, and where
    many end one after the other, looks take about a tenth of the time. Where a process began meanwhile, the next look
    follows at once.
    """
    global _next_look
    search = Search(mark.encode(), None if root is None else f"{root}/")
    _searches.append(search)
    while not search.done:
        with _looking:
            if not search.done:
                time.sleep(max(0.0, _next_look - time.monotonic()))
                with turnstile.first():
                    started = time.monotonic()
                    all_done = look(list(_searches))
                    ended = time.monotonic()
                    _next_look = ended + min(9 * (ended - started), MOST_BETWEEN) if all_done else ended


def look(searches: list[Search]) -> bool:
    """Kill what is found; whether all searches are done. One is, unless a process was found that began meanwhile."""
    there = running()
    kill(there, searches)
    found = kill(running() - there, searches)
    for search in searches:
        if search not in found:
            search.done = True
            _searches.remove(search)
    return not found


def kill(pids: Collection[str], searches: list[Search]) -> set[Search]:
    """Kill those of the processes that are searched for, and wait for their ends; for whom there was one.

    A process that is loading a program shows no environment yet, so it is looked at again.
    """
    marks = {search.mark: search for search in searches}
    roots = {search.root: search for search in searches if search.root is not None}
    found: set[Search] = set()
    killed: set[str] = set()
    deadline = time.monotonic() + PATIENCE
    while pids:
        again = []
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
                if pid in killed:
                    unsettled = is_ending(pid)
                else:
                    environment = contents(f"/proc/{pid}/environ")
                    search = searched(pid, environment, marks, roots)
                    if search is not None:
                        os.kill(int(pid), signal.SIGKILL)
                        killed.add(pid)
                        found.add(search)
                    unsettled = search is not None or (not environment and is_loading(pid))
                if unsettled:
                    again.append(pid)
        pids = again if time.monotonic() < deadline else ()
        if pids:
            time.sleep(0.001)
    return found


def searched(pid: str, environment: bytes, marks: dict[bytes, Search], roots: dict[str, Search]) -> Search | None:
    """Who searches for a process."""
    for mark in MARK.finditer(environment):
        search = marks.get(mark[1]) or marks.get(mark[2])
        if search is not None:
            return search
    if roots:
        folder = os.readlink(f"/proc/{pid}/cwd") + "/"
        if folder.startswith(tuple(roots)):
            return next(search for root, search in roots.items() if folder.startswith(root))
    return None


def running() -> set[str]:
    """The ids of all processes but this one; none on a system without /proc."""
    if not os.path.isdir("/proc"):
        return set()
    return {pid for pid in os.listdir("/proc") if pid.isdigit()} - {str(os.getpid())}


def is_loading(pid: str) -> bool:
    """Whether a process without an environment is just in the middle of ``execve``."""
    state = status(pid)
    memory, code, start, end = state[20], state[23], state[47], state[48]  # 23, 26, 50 and 51 in proc(5)
    # The kernel sets the address of the code last, when the environment is already there.
    return memory != b"0" and (code == b"0" or start != end)


def is_ending(pid: str) -> bool:
    """Whether a process that was killed can't be waited for yet by its parent."""
    return status(pid)[0] not in (b"Z", b"X")


def status(pid: str) -> list[bytes]:
    """What proc(5) numbers from 3 on in ``/proc/PID/stat``."""
    return contents(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def contents(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read = piece = os.read(descriptor, CHUNK)
        while len(piece) == CHUNK:
            piece = os.read(descriptor, CHUNK)
            read += piece
        return read
    finally:
        os.close(descriptor)
