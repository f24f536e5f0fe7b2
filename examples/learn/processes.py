"""Processes that are to run until they are ended: one that dies is started again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Gone", "Process"]

#: Seconds: after how long a process that ends is not taken for one that can't start; the longest wait before one is
#: started again; what a process has for its last words.
STARTED, LONGEST_WAIT, LAST_WORDS = 60.0, 30.0, 60.0

#: How often in a row a process may end right after its start.
TRIES = 5

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Gone(RuntimeError):
    """A process keeps ending right after its start, or said that it can't go on."""


class Process:
    """A process of its own session, so that Ctrl-C in the terminal is the parent's to hear. It dies with the parent.

    Args:
        name: for messages and for the log's name.
        command: what to start; asked at each start.
        log: the file to which it writes.
        environ: variables beside those of this process.
        last: exit codes after which it isn't started again.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        log: Path,
        environ: Mapping[str, str],
        last: Sequence[int] = (),
    ) -> None:
        self.name, self._command, self.log, self._environ, self._last = name, command, log, environ, last
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._not_before = 0.0
        self._deaths = 0

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def watch(self) -> int | None:
        """Start it where it does not run; the exit code if that is one of ``last``.

        Raises:
            Gone: it keeps ending right after its start.
        """
        now = time.monotonic()
        if self._process is None:
            if now >= self._not_before:
                self._start(now)
            return None
        code = self._process.poll()
        if code is None or code in self._last:
            return code
        self._kill_session()
        self._process = None
        self._deaths = 1 if now - self._started > STARTED else self._deaths + 1
        if self._deaths >= TRIES:
            raise Gone(
                f"{self.name} ended {TRIES} times right after its start, at last with exit code {code}: see {self.log}"
            )
        wait = min(LONGEST_WAIT, 2.0 ** (self._deaths - 2))
        self._not_before = now + wait
        print(f"{self.name} ended with exit code {code}, and is started again", flush=True)
        return None

    def _start(self, now: float) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env={**os.environ, **self._environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dies_with_its_parent,
            )
        self._started = now

    def end(self) -> None:
        """Ask it to end, and see that it does, with all that it has started."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS)
        self._kill_session()
        self._process = None

    def _kill_session(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def dies_with_its_parent() -> None:
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
