"""Environments from the command line, by name: one process, or several that are watched over."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hermes_atropos.errors import ConfigurationError, HermesAtroposError

__all__ = ["command_line", "named", "run", "supervise"]

logger = logging.getLogger(__name__)

#: Seconds: between two looks at the processes; the longest wait before one is started again; after how long one that
#: ends is not taken for one that can't start; what processes have for their last words.
LOOK, LONGEST_WAIT, STARTED, LAST_WORDS = 0.2, 60.0, 60.0, 90.0

#: How often in a row a process may end right after its start.
TRIES = 5

#: What a process of an environment runs.
CHILD = """
from hermes_atropos.environment.launch import end_with_the_supervisor
end_with_the_supervisor()
from hermes_atropos.cli import main
raise SystemExit(main())
"""


def named(name: str) -> type[Any]:
    """The environment that ``MODULE:CLASS`` or ``FILE.py:CLASS`` names, seen from the current folder.

    Raises:
        ConfigurationError: there is none.
    """
    module_name, _, class_name = name.rpartition(":")
    path = Path(module_name).resolve()
    sys.path.insert(0, str(path.parent if path.suffix == ".py" else Path.cwd()))
    try:
        module = importlib.import_module(path.stem if path.suffix == ".py" else module_name)
        found: type[Any] = getattr(module, class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{name!r} does not name an environment, as MODULE:CLASS does: {error}") from error
    return found


def command_line(name: str, command: str, arguments: Sequence[str]) -> None:
    """atroposlib's ``serve``, ``process`` or ``evaluate`` of an environment, in this process.

    Raises:
        ConfigurationError: the name names none.
        SystemExit: when it is through.
    """
    run(named(name), command, name, arguments)


def run(environment: type[Any], command: str, name: str, arguments: Sequence[str]) -> None:
    """One of atroposlib's commands of an environment that is known as ``name``; as :func:`command_line`."""
    sys.argv = [name, command, *arguments]
    if command == "evaluate" and not any(given.startswith("--env.data_dir_to_save_evals") for given in arguments):
        # Where an evaluation that was cut goes on.
        sys.argv += ["--env.data_dir_to_save_evals", f"evaluations/{environment.name or environment.__name__}"]
    environment.cli()


def supervise(name: str, processes: int, arguments: Sequence[str]) -> None:
    """Serve an environment with several processes, until all of them are through.

    Each has its share of the items and of ``max_num_workers``, and a file of its own in the outbox. One that dies is
    started again, after a wait that doubles each time.

    Raises:
        HermesAtroposError: one keeps dying right after its start; the others are ended then.
    """
    children = [Child(name, number, processes, arguments) for number in range(processes)]
    with ended_by_signals(children):
        while sum(child.watch() for child in children):  # each is looked at, which any() would not
            time.sleep(LOOK)


class Child:
    """One process of several."""

    def __init__(self, name: str, number: int, count: int, arguments: Sequence[str]) -> None:
        share = ["--env.process_index", str(number), "--env.process_count", str(count)]
        self._command = [sys.executable, "-c", CHILD, "serve", name, *arguments, *share]
        self._number = number
        self._deaths = 0
        self._not_before = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def watch(self) -> bool:
        """Start it where it does not run; whether it is still to run.

        Raises:
            HermesAtroposError: it keeps dying.
        """
        now = time.monotonic()
        if self._process is None:
            if now >= self._not_before:
                # Its input is a pipe in which nothing comes: it ends when this process does, however that happens.
                self._started, self._process = now, subprocess.Popen(self._command, stdin=subprocess.PIPE)
            return True
        code = self._process.poll()
        if code is None or code == 0:
            return code is None
        self._process = None
        self._deaths = 1 if now - self._started > STARTED else self._deaths + 1
        if self._deaths >= TRIES:
            raise HermesAtroposError(
                f"process {self._number} of the environment ended {TRIES} times right after its start, at last with "
                f"exit code {code}: what it said is above"
            )
        wait = min(LONGEST_WAIT, 2.0 ** (self._deaths - 1))
        logger.warning("process %d ended with exit code %d: it is started again in %g s", self._number, code, wait)
        self._not_before = now + wait
        return True

    def end(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> None:
        """Until it has ended, which it must."""
        if self._process is not None:
            try:
                self._process.wait(LAST_WORDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def end_with_the_supervisor() -> None:
    """End this process as a SIGTERM does, once the process that started it is gone, and at the latest LAST_WORDS on."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WORDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the supervisor", daemon=True).start()


@contextlib.contextmanager
def ended_by_signals(children: Sequence[Child]) -> Iterator[None]:
    """When the block ends, or SIGTERM or Ctrl-C comes, the children end."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for child in children:
            child.end()
        for child in children:
            child.wait()
        signal.signal(signal.SIGTERM, before)
