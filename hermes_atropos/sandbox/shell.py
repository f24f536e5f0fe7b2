"""The shells of a sandbox: a bash that stays, and forks itself for each command.

Starting a bash costs more than most commands do, so it is started once. A command runs in a fork of it, in a process
group of its own, with its output in a named pipe. What a command exported, and the folder that it ended in, come back
to this side; the exports are given to the next fork. Functions, options and variables that were not exported end with
the fork.

A shell has three named pipes in the *channel*, a folder that the shell may only read. Requests go in by the first. A
request is a line with the pipes for the output and for what the fork tells, the length in bytes of what is evaluated
before the command and of the command, and the file for its standard input; then these two. Replies come out by the
second, and what forks tell by the third, each piece with a null byte at its end. A shell begins with the replies ``B``
and its process id, and ``S`` and its exports; ``E`` and the exit code end a command. A fork tells ``P`` and its process
group, and at the end ``S`` and the exports, ``D`` and the folder; a command that ends its own shell tells neither. Its
pipe is read once the command has ended, and now and then before: bash writes exports line by line, and each line would
wake this side.

A command knows the shell that stays as ``$$``, so ``kill $$`` is led to the fork. Whatever still ends the shell that
stays ends the command too, and the next command gets another shell.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hermes_atropos.errors import SandboxError

__all__ = ["COMMAND", "SCRIPTS", "Ended", "Launcher", "Request", "Shells"]

#: What a shell evaluates first. What it prints are its replies. 9 is a fork's way to tell something, which a command
#: doesn't inherit.
SETUP = r"""
exec 2>/dev/null
__hermes_exports() { export -n PWD OLDPWD; builtin printf S; builtin export -p; }
__hermes_next() {
    read -r __hermes_output __hermes_told __hermes_exports __hermes_command __hermes_input &&
        read -r -N "$__hermes_exports" __hermes_exports &&
        read -r -N "$__hermes_command" __hermes_command
}
__hermes_begin() { set +m; disown -a; __hermes_self=$BASHPID; printf 'P%s\0' "$BASHPID" >&9; }
__hermes_leave() { { __hermes_exports; builtin printf '\0D'; builtin pwd -P; builtin printf '\0'; } >&9 2>/dev/null; }
kill() {
    local given=("$@") index
    for index in "${!given[@]}"; do
        case ${given[index]} in
            "$$") given[index]=$__hermes_self ;;
            "-$$") given[index]=-$__hermes_self ;;
        esac
    done
    builtin kill "${given[@]}"
}
unset __hermes_setup __hermes_loop __hermes_first __hermes_limits
printf 'B%s\0' "$$"
(__hermes_exports; builtin printf '\0')
set -m
"""

#: What a shell that stays runs. The command stands on the third line: bash's messages name the line, and Hermes' own
#: script has it there.
LOOP = r"""__hermes_channel=$1; shift; eval "$__hermes_setup"; while LC_ALL=C __hermes_next; do (
__hermes_begin; eval "$__hermes_exports"
eval "$__hermes_command" 9>&-
__hermes_code=$?; __hermes_leave; exit "$__hermes_code"
) <"$__hermes_input" >"$__hermes_channel/$__hermes_output" 2>&1 9>"$__hermes_channel/$__hermes_told" &
wait "$!"; printf 'E%s\0' "$?"
done
"""

#: How a shell is started, with the path of the channel behind it. Its scripts are in its environment, and not in what a
#: list of processes shows.
COMMAND = ("--norc", "--noprofile", "-c", 'eval "$__hermes_loop"', "bash")
SCRIPTS = {"__hermes_loop": LOOP, "__hermes_setup": SETUP}

#: Seconds between SIGTERM and SIGKILL, so that a cancelled tool is gone within a second.
GRACE = 0.2
#: Seconds in which a shell whose command was killed must answer, before it is killed too.
PATIENCE = 1.0
#: Seconds for which output is awaited from what a command left running: at most between two pieces, and in all.
IDLE, LINGER = 0.3, 2.0
#: Seconds between two looks at whether the command is still wanted, at first and at most.
FIRST_LOOK, LAST_LOOK = 0.005, 0.2

Reason = Literal["exited", "timeout", "stopped", "killed"]


@dataclass(frozen=True, slots=True)
class Request:
    """A command for bash.

    Attributes:
        command: what bash evaluates.
        timeout: seconds after which its process group is killed.
        collect: called with each piece of its output, standard output and standard error as one stream; once it answers
            False, the process group is killed.
        folder: where it starts; exit code 126 if that is none.
        stdin: what it reads; nothing by default.
        stopped: looked at a few times a second; once true, the process group is killed.
    """

    command: str
    timeout: float
    collect: Callable[[bytes], object]
    folder: str
    stdin: bytes | None = None
    stopped: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; 128 and the signal's number if a signal ended its shell.
        reason: it exited, its time was up, it was to be stopped, or the shell that stays was killed.
        folder: the one that it ended in; None if it ended its shell.
    """

    code: int
    reason: Reason
    folder: str | None


class Launcher(ABC):
    """Starts shells where the commands of a sandbox run, and sends signals there.

    Attributes:
        channel: the folder of the pipes.
        channel_inside: its path as the shells see it.
    """

    channel: Path
    channel_inside: str

    @abstractmethod
    def start(self, name: str) -> None:
        """Start bash with :data:`COMMAND` and :data:`SCRIPTS`; it reads ``name.requests`` and writes ``name.replies``.

        Raises:
            SandboxError: nothing can be started there any more.
        """

    @abstractmethod
    def kill(self, process: int, number: signal.Signals) -> None:
        """Send a signal to a process, or to a group by its negative id; nothing if it has ended."""


class Shells:
    """The shells of a sandbox, as many as commands run at once, and what passes from one command to the next.

    Args:
        launcher: starts them.
        first: what bash evaluates before the first command, beside it.
    """

    def __init__(self, launcher: Launcher, first: bytes = b"") -> None:
        self._launcher = launcher
        self._exports = first
        self._idle: list[Shell] = []
        self._lock = threading.Lock()
        self._numbered = 0
        self._closed = False

    def run(self, request: Request) -> Ended:
        """Run a command to its end, in a shell as the last one to end left it.

        Raises:
            SandboxError: the shells were closed, or none can be started.
        """
        fresh = False
        while not fresh:
            with self._lock:
                if self._closed:
                    raise SandboxError("The sandbox has been released.")
                self._numbered += 1
                number, exports = self._numbered, self._exports
                shell = self._idle.pop() if self._idle else None
            fresh = shell is None
            shell = shell or Shell(self._launcher, f"shell{number}")
            run = Run(shell, request)
            try:
                ended = run.follow(number, exports)
            except BaseException:
                shell.close()
                raise
            with self._lock:
                if run.exports is not None:  # as long as they are a new shell's, there is nothing to give
                    self._exports = b"" if run.exports == shell.exports else run.exports
                kept = shell.open and not self._closed
                if kept:
                    self._idle.append(shell)
            if not kept:
                shell.close()
            if run.begun or ended.reason != "killed":
                return ended
            # The shell was killed while it waited, with what the last command left running: the command didn't begin.
        raise SandboxError("No shell can be started in the sandbox.")

    def close(self) -> None:
        """Let go of the shells. They end when their processes are killed, or when they read the end of the requests."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for shell in idle:
            shell.close()


class Shell:
    """One bash that stays, and this side's ends of its pipes."""

    def __init__(self, launcher: Launcher, name: str) -> None:
        self.launcher = launcher
        self.process: int | None = None
        self.exports: bytes | None = None
        self.open = True
        #: The pipe for the next command's output, if the last one left nobody who can write to it.
        self.output: Path | None = None
        requests, replies, self.told_path = (
            launcher.channel / f"{name}.{kind}" for kind in ("requests", "replies", "told")
        )
        for path in (requests, replies, self.told_path):
            os.mkfifo(path, 0o600)
        # For both ways, because a pipe that nobody reads yet cannot be opened for writing alone.
        self.requests = os.open(requests, os.O_RDWR | os.O_NONBLOCK)
        self.replies = Pieces(os.open(replies, os.O_RDONLY | os.O_NONBLOCK))
        self.told = os.open(self.told_path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            launcher.start(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill it, if it has said who it is, and close its pipes."""
        if self.open:
            self.open = False
            if self.process is not None:
                self.launcher.kill(self.process, signal.SIGKILL)
            os.close(self.requests)
            os.close(self.replies.pipe)
            os.close(self.told)


class Pieces:
    """What comes by a pipe, in pieces with a null byte at the end of each."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self._begun = b""

    def read(self) -> list[tuple[str, bytes]]:
        """The pieces that have come, each with its kind.

        Raises:
            EOFError: nobody has the pipe open for writing.
            BlockingIOError: nothing has come.
        """
        read = os.read(self.pipe, 65536)
        if not read:
            raise EOFError
        *whole, self._begun = (self._begun + read).split(b"\0")
        return [(chr(piece[0]), piece[1:]) for piece in whole if piece]


class Run:
    """A command in a shell, from the request to its end.

    Attributes:
        begun: whether the shell has forked itself for it.
        exports: what it left, as ``export -p`` prints it; None if it ended its shell.
    """

    def __init__(self, shell: Shell, request: Request) -> None:
        self._shell = shell
        self._told = Pieces(shell.told)
        self._request = request
        self._group: int | None = None
        self._folder: str | None = None
        self._code: int | None = None
        self._reason: Reason = "exited"
        self._enough = False
        self._read_to_end = False
        self.exports: bytes | None = None

    @property
    def begun(self) -> bool:
        return self._group is not None

    def follow(self, number: int, exports: bytes) -> Ended:
        launcher = self._shell.launcher
        output, given = self._shell.output or launcher.channel / f"{number}.out", launcher.channel / f"{number}.in"
        if self._shell.output is None:
            os.mkfifo(output, 0o600)
        self._output = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        try:
            stdin = os.devnull
            if self._request.stdin is not None:
                given.write_bytes(self._request.stdin)
                stdin = f"{launcher.channel_inside}/{given.name}"
            command, before = script(self._request.command), entering(self._request.folder) + exports
            if b"\0" in command:
                raise ValueError("The command holds a null byte, which bash cannot read.")
            request = f"{output.name} {self._shell.told_path.name} {len(before)} {len(command)} {stdin}\n"
            self._converse(request.encode() + before + command)
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        finally:
            os.close(self._output)
            if self._read_to_end:
                self._shell.output = output
            else:
                self._shell.output = None
                output.unlink(missing_ok=True)
            if self._request.stdin is not None:
                given.unlink(missing_ok=True)
        if self._code is None:
            return Ended(128 + signal.SIGKILL, "killed" if self._reason == "exited" else self._reason, None)
        return Ended(self._code, self._reason, self._folder)

    def _converse(self, unsent: bytes) -> None:
        """Send the request, pass the output on, and read the replies, until the command has ended."""
        shell = self._shell
        unsent = unsent[os.write(shell.requests, unsent) :]
        pipes = select.poll()
        if unsent:
            pipes.register(shell.requests, select.POLLOUT)
        pipes.register(shell.replies.pipe, select.POLLIN)
        pipes.register(self._output, select.POLLIN)
        deadline = time.monotonic() + self._request.timeout
        pause, look = FIRST_LOOK, time.monotonic()
        while self._code is None:
            now = time.monotonic()
            if now >= deadline or self._enough or (now >= look and self._request.stopped()):
                self._reason = "timeout" if now >= deadline else "stopped"
                return self._end()
            if now >= look:
                self._be_told()
                look, pause = now + pause, min(pause * 1.5, LAST_LOOK)
            for pipe, _ in pipes.poll((min(look, deadline) - now) * 1000):
                if pipe == shell.requests:
                    unsent = unsent[os.write(pipe, unsent) :]
                    if not unsent:
                        pipes.unregister(pipe)
                elif pipe == shell.replies.pipe:
                    if not self._listen():
                        self._be_told()
                        return self._end() if self.begun else shell.close()
                elif not self._pass_on():
                    pipes.unregister(pipe)
        self._be_told()
        if not self._read_to_end:
            linger(self._output, self._pass_on, LINGER, IDLE)

    def _listen(self) -> bool:
        """Read replies; False if the shell has ended, or says what no shell of ours says."""
        try:
            for kind, value in self._shell.replies.read():
                if kind == "B":
                    self._shell.process = int(value)
                elif kind == "S":
                    self._shell.exports = value
                elif kind == "E":
                    self._code = int(value)
        except (EOFError, ValueError):
            return False
        return True

    def _be_told(self) -> None:
        """Read what the command's fork tells, as far as it has come."""
        with contextlib.suppress(EOFError, BlockingIOError, ValueError):
            for kind, value in self._told.read():
                if kind == "P":
                    self._group = int(value)
                elif kind == "S":
                    self.exports = value
                elif kind == "D":
                    self._folder = value.decode(errors="surrogateescape").removesuffix("\n")

    def _pass_on(self) -> bool:
        """Pass a piece of output on; False if nobody has the pipe open any more."""
        piece = os.read(self._output, 65536)
        if piece and self._request.collect(piece) is False:
            self._enough = True
        self._read_to_end = not piece
        return bool(piece)

    def _end(self) -> None:
        """End the command: SIGTERM, and SIGKILL after a while; its shell too, unless it answers then."""
        self._signal(signal.SIGTERM)
        linger(self._output, self._pass_on, GRACE, GRACE)
        self._signal(signal.SIGKILL)
        linger(self._output, self._pass_on, PATIENCE, 0.0)
        linger(self._shell.replies.pipe, lambda: self._listen() and self._code is None, PATIENCE, PATIENCE)
        self._be_told()
        if self._code is None:
            self._shell.close()

    def _signal(self, number: signal.Signals) -> None:
        if not self.begun:
            self._be_told()
        if self._group is not None:
            self._shell.launcher.kill(-self._group, number)


def linger(pipe: int, read: Callable[[], bool], limit: float, idle: float) -> None:
    """Have ``read`` read from a pipe until it answers False, nothing came for ``idle`` seconds or ``limit`` is over."""
    pipes = select.poll()
    pipes.register(pipe, select.POLLIN)
    deadline = time.monotonic() + limit
    while (now := time.monotonic()) < deadline and pipes.poll(min(idle, deadline - now) * 1000):
        if not read():
            return


def script(command: str) -> bytes:
    """A command as bash's messages should see it: the lines of a longer one are counted from where it ends."""
    return ("\n" * command.count("\n") + command).encode(errors="surrogateescape")


def entering(folder: str) -> bytes:
    """What takes a shell into a folder. ``~`` is its home. To a command it is as if it had always been there."""
    home = folder == "~" or folder.startswith("~/")
    path = '"$HOME"' + shlex.quote(folder[1:]) if home else shlex.quote(folder)
    return f"builtin cd -- {path} || exit 126; OLDPWD=$PWD\n".encode(errors="surrogateescape")
