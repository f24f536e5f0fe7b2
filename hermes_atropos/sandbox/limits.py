"""How much a walled task may use, and what holds it to that.

A task's memory and its number of processes are held by control groups where this process may make them, below its own
(cgroups(7), version 1 or 2). Elsewhere each process has a limit of its own (setrlimit(2)), which is weaker: several
processes may use several times the memory. The rest is held by setrlimit and by the sizes of file systems.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from hermes_atropos.errors import ConfigurationError

__all__ = ["Group", "Limits", "mechanisms", "ulimits"]

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What a walled task may use. Reaching a limit ends a command, not the task.

    Attributes:
        memory_bytes: of its processes, with what they wrote to /tmp, their home and /dev/shm.
        processes: at once.
        cpu_seconds: of one process.
        file_bytes: of one file.
        space_bytes: of each of /tmp, the home and /dev/shm.
        open_files: of one process.

    Raises:
        ConfigurationError: one that is not a whole number above 0.
    """

    memory_bytes: int = 4_000 * MB
    processes: int = 1_000
    cpu_seconds: int = 3_600
    file_bytes: int = 2_000 * MB
    space_bytes: int = 1_000 * MB
    open_files: int = 4_096

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value <= 0:
                raise ConfigurationError(f"limits: {field.name}={value!r} is not a whole number above 0")


def ulimits(limits: Limits) -> str:
    """What the first process inside sets for itself and all others, in bash's words."""
    chosen = {"f": limits.file_bytes // 1024, "n": limits.open_files, "c": 0}
    held = hierarchies()
    if "pids" not in held:
        chosen["u"] = limits.processes
    if "memory" not in held:
        chosen["v"] = limits.memory_bytes // 1024
    # A process is told that its time is up, and killed if it goes on.
    time_s = f"ulimit -S -t {limits.cpu_seconds}; ulimit -H -t {limits.cpu_seconds + 5}"
    return "; ".join([time_s, *(f"ulimit -{letter} {value}" for letter, value in chosen.items())])


class Group:
    """A control group of a task's own in each hierarchy, until :meth:`remove`; nothing where there are none."""

    def __init__(self, limits: Limits, process: int) -> None:
        """Make them, with ``process`` in them and all that it will start."""
        name = f"hermes-atropos-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        held = hierarchies()
        self._folders = {hierarchy.folder / name: hierarchy for hierarchy in held.values()}
        for folder in self._folders:
            folder.mkdir()
        for controller, hierarchy in held.items():
            for file, value in hierarchy.settings(controller, limits).items():
                with contextlib.suppress(OSError):  # no swap is accounted for here
                    (hierarchy.folder / name / file).write_text(str(value))
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(process))
        self._ended = 0

    def out_of_memory(self) -> bool:
        """Whether the kernel has ended a process for the memory since the last look."""
        before, self._ended = self._ended, 0
        for folder, hierarchy in self._folders.items():
            with contextlib.suppress(OSError):
                for line in (folder / hierarchy.events).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        self._ended = int(line.split()[1])
        return self._ended > before

    def remove(self) -> None:
        """Once its processes have been killed; the kernel may take a moment to see them gone."""
        deadline = time.monotonic() + 5
        for folder in self._folders:
            while folder.exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(0.002)


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups can be made.

    Attributes:
        folder: in which.
        version: of cgroups.
    """

    folder: Path
    version: int

    @property
    def events(self) -> str:
        return "memory.events" if self.version == 2 else "memory.oom_control"

    def settings(self, controller: str, limits: Limits) -> Mapping[str, int]:
        if controller == "pids":
            return {"pids.max": limits.processes}
        if self.version == 2:
            return {"memory.max": limits.memory_bytes, "memory.swap.max": 0}
        return {"memory.limit_in_bytes": limits.memory_bytes, "memory.memsw.limit_in_bytes": limits.memory_bytes}


@functools.cache
def hierarchies() -> Mapping[str, Hierarchy]:
    """The hierarchies in which this process may make groups, by controller: ``memory``, ``pids``."""
    found: dict[str, Hierarchy] = {}
    with contextlib.suppress(OSError):
        own = dict(own_groups())
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, options, *_ = line.split()
            if kind == "cgroup":
                version, controllers = 1, options.split(",")
            elif kind == "cgroup2":
                version, controllers = 2, Path(mount, own[""], "cgroup.subtree_control").read_text().split()
            else:
                continue
            for controller in {"memory", "pids"}.intersection(controllers):
                hierarchy = Hierarchy(Path(mount, own[controller if version == 1 else ""]), version)
                if can_make_groups(hierarchy.folder):
                    found.setdefault(controller, hierarchy)
    for hierarchy in found.values():
        remove_leftovers(hierarchy.folder)
    return found


def remove_leftovers(folder: Path) -> None:
    """The groups of processes that were killed; the kernel keeps those that are in use."""
    for group in folder.glob("hermes-atropos-*-*"):
        if not Path("/proc", group.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                group.rmdir()


def own_groups() -> Iterator[tuple[str, str]]:
    """This process's groups, by controller; that of version 2 under the empty name."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path.lstrip("/")


def can_make_groups(folder: Path) -> bool:
    tried = folder / f"hermes-atropos-{uuid.uuid4().hex[:12]}"
    try:
        tried.mkdir()
        tried.rmdir()
    except OSError:
        return False
    return True


def mechanisms() -> Mapping[str, str]:
    """What holds a walled task to each of its limits on this machine."""
    held = hierarchies()
    group = {name: f"control group (version {held[name].version})" for name in held}
    return {
        "memory": group.get("memory", "setrlimit, for each process"),
        "processes": group.get(
            "pids", "setrlimit, for each user" if os.geteuid() else "nothing: root has no such limit"
        ),
        "CPU seconds, file size, open files": "setrlimit, for each process",
        "space of /tmp, home, /dev/shm": "the size of a tmpfs",
    }
