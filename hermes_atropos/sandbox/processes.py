"""The processes of a sandbox, found by a mark in their environment, wherever they have moved."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

__all__ = ["MARKER", "kill_processes"]

#: The variable that every process of a sandbox inherits. Its value is the sandbox's mark.
MARKER = "HERMES_ATROPOS_SANDBOX"

#: Seconds that a process may take to load a program on a very busy machine.
LOADING = 1.0


def kill_processes(mark: str, root: Path | None) -> None:
    """Kill every process that carries ``mark`` or works in a folder under ``root``, until none is found.

    Sessions and parents do not identify a sandbox's processes, because a process can leave both. The mark is
    inherited; a process that has cleared its environment is found by its working folder. A workspace that the user gave
    is not under ``root``: the user's own shell may work there. A process that is loading a program shows no
    environment yet: it is looked at again, for ``LOADING`` seconds at most.
    """
    deadline = time.monotonic() + LOADING
    marked, own = f"{MARKER}={mark}".encode(), str(os.getpid())
    pids = running()
    while pids:
        killed, loading = False, []
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
                with open(f"/proc/{pid}/environ", "rb", buffering=0) as environ:
                    variables = environ.read()
                within = root is not None and f"{os.readlink(f'/proc/{pid}/cwd')}/".startswith(f"{root}/")
                if pid != own and (marked in variables or within):
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
                elif not variables and not has_no_environment(pid):
                    loading.append(pid)
        pids = running() if killed else loading if time.monotonic() < deadline else []


def running() -> list[str]:
    """The ids of all processes; none on a system without /proc."""
    return [pid for pid in os.listdir("/proc") if pid.isdigit()] if os.path.isdir("/proc") else []


def has_no_environment(pid: str) -> bool:
    """Whether a process has no environment for good, and is not just in the middle of ``execve``."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
        fields = stat.read().rpartition(b")")[2].split()
    memory, code, start, end = fields[20], fields[23], fields[47], fields[48]  # 23, 26, 50 and 51 in proc(5)
    # The kernel sets the address of the code last, when the environment is already there.
    return memory == b"0" or (code != b"0" and start == end)
