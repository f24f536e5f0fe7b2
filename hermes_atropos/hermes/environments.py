"""Hermes' terminal environments over the shells of a sandbox: in folders of this machine, and behind a wall.

Hermes' own environments start a bash for each command, which reads what the last one left from a file. These run each
command in a fork of a shell that stays. Everything else that Hermes expects of an environment is as in its own.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools import terminal_tool
from tools.environments import base, local
from tools.environments.base import BaseEnvironment
from tools.environments.local import LocalEnvironment
from tools.interrupt import is_interrupted

from hermes_atropos.hermes import seams
from hermes_atropos.hermes.profile import provider_credentials
from hermes_atropos.hermes.releases import release
from hermes_atropos.logs import keys_in
from hermes_atropos.runtime import turnstile
from hermes_atropos.sandbox.files import remove_folder
from hermes_atropos.sandbox.folder import FolderLauncher, Folders
from hermes_atropos.sandbox.processes import MARKER
from hermes_atropos.sandbox.shell import Ended, Request, Shells
from hermes_atropos.sandbox.wall import TEMPORARY, WORKSPACE, Wall, WallOptions

__all__ = ["InShells", "TaskEnvironment", "WalledEnvironment"]

_login_lock = threading.Lock()

#: The most characters of output that are kept where none may be left out.
OUTPUT = 100_000_000


class InShells(BaseEnvironment):
    """An environment whose commands run in the shells of a sandbox."""

    _shells: Shells

    def cleanup(self) -> None:
        """Does nothing: Hermes calls this after each run, before the verifier has seen the task."""

    def close(self) -> None:
        """Let go of the shells; the sandbox's processes must have ended."""
        self._shells.close()

    def execute(
        self,
        command: str,
        cwd: str = "",
        *,
        timeout: float | None = None,
        stdin_data: str | None = None,
        rewrite_compound_background: bool = True,
        bounded_capture: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Run a command: its output, its exit code, and what Hermes asks for in its newest releases.

        Args:
            bounded_capture: keep no more of the output than the terminal tool shows.
        """
        prepared, password = self._prepare_command(command)
        if rewrite_compound_background:
            prepared = release().rewrite_background(prepared)
        given = None if password is None and stdin_data is None else (password or "") + (stdin_data or "")
        limit = self.timeout if timeout is None else timeout
        kept = Kept(release().shown_characters() if bounded_capture else None)
        activity = {"last_touch": time.monotonic(), "start": time.monotonic()}

        def stopped() -> bool:
            base.touch_activity_if_due(activity, "terminal command running")
            return bool(is_interrupted())

        request = Request(
            prepared,
            limit,
            kept.add,
            folder=cwd or self.cwd,
            stdin=None if given is None else given.encode(errors="surrogateescape"),
            stopped=stopped,
        )
        with turnstile.outside():
            ended = self._shells.run(request)
        return self._result(ended, kept, limit)

    def _result(self, ended: Ended, kept: Kept, limit: float) -> dict[str, Any]:
        if ended.reason == "timeout":
            notice = f"\n[Command timed out after {limit}s]"
            return {"output": kept.text(notice).lstrip("\n"), "returncode": 124, "hermes_timed_out": True}
        if kept.too_much:
            return {
                "output": kept.text(f"\n[Command ended: it wrote more than {OUTPUT:,} characters]"),
                "returncode": 137,
            }
        if ended.reason == "stopped":
            return {"output": kept.text("\n[Command interrupted]"), "returncode": 130, "hermes_interrupted": True}
        result: dict[str, Any] = {"output": kept.text(), "returncode": ended.code}
        if ended.folder:
            self.cwd = result["cwd"] = ended.folder
            result["cwd_observed"] = True
        return result


class Kept:
    """The output of a command, decoded; with a limit, its first 40 and its last 60 percent, as Hermes keeps it.

    Args:
        limit: characters.

    Attributes:
        too_much: whether it is more than ``OUTPUT``, and none of it may be left out.
    """

    too_much = False

    def __init__(self, limit: int | None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._limit = limit
        self._pieces: list[str] = []
        self._held = self._omitted = 0

    def add(self, piece: bytes) -> bool:
        """Keep a piece; whether more may come."""
        if self.too_much:
            return False
        self._pieces.append(self._decoder.decode(piece))
        self._held += len(self._pieces[-1])
        if self._limit is None:
            self.too_much = self._held > OUTPUT
        elif self._held > 4 * self._limit:  # then the first and the last of that many are enough
            text = "".join(self._pieces)
            self._pieces = [text[: self._limit], text[-self._limit :]]
            self._omitted += len(text) - 2 * self._limit
            self._held = 2 * self._limit
        return not self.too_much

    def text(self, suffix: str = "") -> str:
        self._pieces.append(self._decoder.decode(b"", final=True))
        text = "".join(self._pieces)
        total = len(text) + self._omitted
        if self._limit is None or total + len(suffix) <= self._limit:
            return text + suffix
        # Hermes counts its notice, which tells how much is left out, among the characters that it shows.
        notice, room = "", self._limit - len(suffix)
        for _ in range(4):
            shown = max(0, room - len(notice))
            notice = f"\n\n... [OUTPUT TRUNCATED - {total - shown:,} chars omitted out of {total:,} total] ...\n\n"
        head = int(shown * 0.4)
        tail = shown - head
        return text[:head] + notice + (text[-tail:] if tail else "") + suffix


class TaskEnvironment(InShells, LocalEnvironment):
    """Hermes' local environment in a task's folders, closed by its sandbox alone.

    In private folders the shell starts from what a login shell with an empty home adds, found once per process. In
    others it starts from the user's login shell, as Hermes' own does.
    """

    def __init__(self, folders: Folders) -> None:
        self._private = folders.root is not None
        self._login = threading.Lock()
        self._logged_in = False
        if folders.root is not None:
            self._channel = folders.root / "channel"  # removed with the task's folders
        else:
            self._channel = Path(tempfile.mkdtemp(prefix="hermes-atropos-channel-"))
        # Hermes' background processes get the trainer's environment and these: what is not for them is empty there.
        hidden = dict.fromkeys(not_for_a_task(dict(os.environ)), "") if self._private else {}
        LocalEnvironment.__init__(
            self,
            cwd=str(folders.workspace),
            timeout=terminal_tool._get_env_config()["timeout"],
            env=hidden | folders.variables,
        )
        seams.check_attributes(self, "LocalEnvironment")

    def init_session(self) -> None:
        """Hermes starts a login shell here, which is slow: it is started at the first command instead."""

    def execute(self, *args: Any, **options: Any) -> dict[str, Any]:
        with self._login:
            if not self._logged_in:
                first = self._log_in()
                if first is None:
                    return self._result(Ended(130, "stopped", None), Kept(None), 0)
                self._launcher = FolderLauncher(
                    self._channel,
                    local._find_bash(),
                    functools.partial(shell_environ, self.env, self._login_variables, self._private),
                )
                self._shells = Shells(self._launcher, first)
                self._logged_in = True
        self.cwd = local._resolve_safe_cwd(self.cwd)  # of one that was removed, the one above it
        return InShells.execute(self, *args, **options)

    def _log_in(self) -> bytes | None:
        """Find out what a login shell adds; returns what is evaluated before the first command; None if interrupted."""
        if not self._private:
            self._login_variables: Mapping[str, str] = {}
            return self._users_login()
        trainers = dict(os.environ)
        environ = without(not_for_a_task(trainers), trainers)
        with _login_lock:
            self._login_variables, aliases = login(tuple(sorted(environ.items())))
        return aliases

    def _users_login(self) -> bytes | None:
        """What the user's login shell leaves: found again once the environment or one of the shell's files changes.

        One that fails leaves nothing, and is not tried again: Hermes waits 30 s for it, in one task after another.
        """
        session = {name for name in os.environ if name.startswith("HERMES_SESSION")}
        state = (tuple(sorted(without(session, os.environ).items())), shell_files())
        with _login_lock:
            if state not in _users_logins:
                LocalEnvironment.init_session(self)
                if not self._snapshot_ready and is_interrupted():
                    return None
                own = "|".join(map(re.escape, {"PWD", "OLDPWD", "SHLVL", "_", *session, *self.env}))
                own_lines = re.compile(rf"^declare -x ({own})(=.*)?\n".encode(), re.MULTILINE)
                _users_logins.clear()
                left = Path(self._snapshot_path).read_bytes() if self._snapshot_ready else b""
                _users_logins[state] = own_lines.sub(b"", left)
            return _users_logins[state]

    def close(self) -> None:
        """Remove the environment's own files that are not in the task's folders; its processes must have ended."""
        if self._logged_in:
            self._shells.close()
            self._launcher.wait()
        if not self._private:
            LocalEnvironment.cleanup(self)
            remove_folder(self._channel)


#: What the user's login shell leaves, by the environment that it starts from and the state of its files; the last one.
_users_logins: dict[tuple[Any, ...], bytes] = {}


def shell_files() -> tuple[tuple[str, int, int], ...]:
    """The files that a login shell of the user's reads first, with time and size. What they read in turn counts not."""
    home = Path.home()
    own = [str(home / name) for name in (".bash_profile", ".bash_login", ".profile", ".bashrc")]
    system = ["/etc/profile", *sorted(glob.glob("/etc/profile.d/*")), "/etc/bash.bashrc"]
    states = []
    for file in [*system, *own, *local._resolve_shell_init_files()]:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            states.append((file, status.st_mtime_ns, status.st_size))
    return tuple(states)


def not_for_a_task(environ: dict[str, str]) -> set[str]:
    """The variables that a task of its own is not shown: the trainer's keys, its model providers, and Hermes' notes.

    Hermes notes the session that it is at, and how its terminal is configured, in the process's environment.
    """
    notes = {name for name in environ if name.startswith(("HERMES_SESSION", "TERMINAL_"))}
    return notes | keys_in(environ) | provider_credentials() & environ.keys()


def without(names: set[str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def shell_environ(own: Mapping[str, str], login_variables: Mapping[str, str], private: bool) -> dict[str, str]:
    """What a shell starts with; a private one with what the login shell had, which is more than Hermes would give."""
    if not private:
        return {**local._make_run_env(dict(own)), **own}
    environ = {**login_variables, **own}
    return without(not_for_a_task(environ), environ)


@functools.lru_cache(maxsize=8)
def login(environ: tuple[tuple[str, str], ...]) -> tuple[Mapping[str, str], bytes]:
    """The variables of a login shell with an empty home, started with ``environ``, and the lines that make its aliases.

    What differs from task to task is left out, because each task gives its own.
    """
    with tempfile.TemporaryDirectory() as home:
        shell = subprocess.run(
            ["bash", "-l", "-c", "env -0; printf '\\0'; alias -p"],
            env=dict(environ, HOME=home),
            capture_output=True,
            timeout=30,
            check=True,
        )
    listed, _, aliases = shell.stdout.partition(b"\0\0")
    variables = dict(os.fsdecode(line).split("=", 1) for line in listed.split(b"\0") if b"=" in line)
    own = {"HOME", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_", MARKER}
    added = {name: value for name, value in variables.items() if name not in own}
    return added, b"shopt -s expand_aliases\n" + aliases if aliases else b""


class WalledEnvironment(InShells):
    """A terminal environment behind a wall, closed by its sandbox alone.

    Args:
        wall: where its commands run.
        options: what the wall lets through.

    Attributes:
        outside: the tools that may act outside, because the task asked for them by name.
        network: whether the wall lets the network through.
    """

    def __init__(self, wall: Wall, options: WallOptions) -> None:
        self.outside = frozenset(options.outside)
        self.network = options.network
        self._locks: dict[str, threading.Lock] = {}
        self._wall, self._memory = wall, options.limits.memory_bytes
        self._shells = Shells(wall)
        super().__init__(cwd=WORKSPACE, timeout=terminal_tool._get_env_config()["timeout"])

    def lock(self, path: str) -> threading.Lock:
        """Held by who reads, changes and writes that file of the task."""
        return self._locks.setdefault(path, threading.Lock())

    def get_temp_dir(self) -> str:
        return TEMPORARY

    def _prepare_command(self, command: str) -> tuple[str, str | None]:
        """The user's password for sudo, which Hermes would add, does not go behind the wall."""
        return command, None

    def execute(self, command: str, cwd: str = "", **options: Any) -> dict[str, Any]:
        before = self.cwd
        result = super().execute(command, cwd, **options)
        if cwd == "/" == self.cwd:  # Hermes' own errands for execute_code are not where the task is
            self.cwd = before
        if self._wall.out_of_memory():
            result["output"] += f"\n[A process was ended: the sandbox has {self._memory:,} bytes of memory]"
        if result["returncode"] == 126 and "cwd" not in result:  # the folder of the last command may be gone
            self.cwd = WORKSPACE
        return result
