"""Environments from the command line, by name: one process, or several that are watched over."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermes_atropos.errors import ConfigurationError, HermesAtroposError

__all__ = ["named", "run", "supervise"]

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
        return getattr(module, class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{name!r} does not name an environment, as MODULE:CLASS does: {error}") from error


def run(environment: type[Any], command: str, name: str, arguments: Sequence[str]) -> None:
    """atroposlib's ``serve``, ``process`` or ``evaluate`` of an environment, known as ``name``, in this process.

    Raises:
        SystemExit: when it is through.
    """
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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while sum(child.watch() for child in children):  # each is looked at, which any() would not
                time.sleep(LOOK)
    finally:
        running = [child.process for child in children if child.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(LAST_WORDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)


class Child:
    """One process of several."""

    def __init__(self, name: str, number: int, count: int, arguments: Sequence[str]) -> None:
        share = ["--env.process_index", str(number), "--env.process_count", str(count)]
        self._command = [sys.executable, "-c", CHILD, "serve", name, *arguments, *share]
        self._number = number
        self._deaths = 0
        self._not_before = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def watch(self) -> bool:
        """Start it where it does not run; whether it is still to run.

        Raises:
            HermesAtroposError: it keeps dying.
        """
        now = time.monotonic()
        if self.process is None:
            if now >= self._not_before:
                # Its input is a pipe in which nothing comes: it ends when this process does, however that happens.
                self._started, self.process = now, subprocess.Popen(self._command, stdin=subprocess.PIPE)
            return True
        code = self.process.poll()
        if code is None or code == 0:
            return code is None
        self.process = None
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


def end_with_the_supervisor() -> None:
    """End this process as a SIGTERM does, once the process that started it is gone, and at the latest LAST_WORDS on."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WORDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the supervisor", daemon=True).start()
