"""The wall: what a policy tries against its trainer works in a folder, and not behind it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import LIMIT, nothing_left, until

from hermes_atropos.cli import main
from hermes_atropos.errors import ConfigurationError, SandboxError, SandboxUnavailableError
from hermes_atropos.hermes import environments
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.hermes.walled import WalledSandbox
from hermes_atropos.sandbox import limits, overlay, wall
from hermes_atropos.sandbox.check import run_check
from hermes_atropos.sandbox.limits import Limits, hierarchies
from hermes_atropos.sandbox.wall import WallOptions

SECRET = "the key to the answers"


def python(code: str) -> str:
    return f"python3 -I -c {shlex.quote(code)}"


PTRACE = """\
import ctypes
libc = ctypes.CDLL(None)
assert libc.ptrace(16, {victim}, 0, 0) == 0
libc.ptrace(17, {victim}, 0, 0)
"""
MEMORY = """\
start, end = next(line.split()[0].split("-") for line in open("/proc/{victim}/maps") if "[stack]" in line)
memory = open("/proc/{victim}/mem", "rb")
memory.seek(int(start, 16))
assert memory.read(16)
"""
CONNECT = "import socket; socket.socket(socket.{family}, socket.{kind}).connect({address})"

SYSCALL = """\
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": {x86_64}, "aarch64": {aarch64}}[platform.machine()]
assert libc.syscall(number, {arguments}) >= 0
"""
KEY = "ctypes.c_char_p(b'user'), ctypes.c_char_p(b'{beside}')"


def call(x86_64: int, aarch64: int, arguments: str) -> str:
    code = SYSCALL.replace("{x86_64}", str(x86_64)).replace("{aarch64}", str(aarch64))
    return python(code.replace("{arguments}", arguments))


#: What a policy tries, and what the try would be good for. ``{…}`` is what :func:`world` has of the trainer's.
TRIES = {
    "read a file": "grep key {secret}",
    "overwrite a file": "echo mine > {precious}",
    "add a file": "echo mine > {folder}/planted",
    "remove a file": "rm {doomed}",
    "list a folder": "ls {folder}",
    "read by a link": "ln -s {secret} link && grep key link",
    "read by a hard link": "ln {secret} hard && grep key hard",
    "read what is in the trainer's /tmp": "ls /tmp/{beside}",
    "read shared memory": "ls /dev/shm/{beside}",
    "read the users of the machine": "grep ^root: /etc/passwd",
    "read their passwords": "test -e /etc/shadow",
    "read the user's home": "ls {home}/.profile",
    "read another rollout's workspace": "grep answer {other}/answer.txt",
    "write into another rollout's workspace": "echo wrong > {other}/answer.txt",
    "read another rollout's variables": "grep -aqs ANSWER_OF_ANOTHER /proc/[0-9]*/environ",
    "read the root of a process": "grep key /proc/{victim}/root{secret}",
    "read the folder of a process": "ls /proc/{victim}/cwd/secret",
    "read an open file of a process": "grep key /proc/{victim}/fd/0",
    "read the variables of a process": "grep -a NOTE_OF_THE_TRAINER /proc/{victim}/environ",
    "read the arguments of a process": "grep -a sleep /proc/{victim}/cmdline",
    "read the memory of a process": python(MEMORY),
    "trace a process": python(PTRACE),
    "see a process": "kill -0 {victim}",
    "stop a process": "kill -STOP {victim} && kill -CONT {victim}",
    "slow a process down": "renice -n 1 -p {victim}",
    "change the limits of a process": "prlimit --pid {victim} --core=0",
    "read a variable of the trainer's": 'test "$NOTE_OF_THE_TRAINER"',
    "connect to a port": "exec 3<>/dev/tcp/127.0.0.1/{port}",
    "send a datagram": "echo hello > /dev/udp/127.0.0.1/{port} && grep -q :$(printf %04X {port}) /proc/net/udp",
    "connect to a socket": python(CONNECT.format(family="AF_UNIX", kind="SOCK_STREAM", address="'{socket}'")),
    "connect to an abstract socket": python(
        CONNECT.format(family="AF_UNIX", kind="SOCK_STREAM", address="chr(0) + '{abstract}'")
    ),
    "see who listens": "grep -i :$(printf %04X {port}) /proc/net/tcp",
    "read the machine's name": 'test "$(hostname)" = {hostname}',
    "make a user namespace": "unshare --user --map-root-user true",
    "mount in a namespace of its own": "unshare --user --map-root-user --mount mount -t tmpfs none /mnt",
    "gain privileges by a program": "grep NoNewPrivs:.0 /proc/self/status",
    "find a key of the trainer's": call(249, 218, f"{KEY}, None, 0"),
    "keep a key": call(248, 217, "ctypes.c_char_p(b'user'), ctypes.c_char_p(b'mine'), ctypes.c_char_p(b'x'), 1, -3"),
    "read the devices": "ls /sys/devices",
    "read the control groups": "ls /sys/fs/cgroup",
    "write to the terminal of the machine": "ls /dev/ttyS0 /dev/console /dev/kmsg /dev/tty1",
}

#: What root alone can do, where there is no wall.
TRIES_OF_ROOT = {
    "write to the system": "test -w /usr/bin",
    "change the settings of the kernel": "cat /proc/sys/vm/swappiness > kept && cat kept > /proc/sys/vm/swappiness",
    "make a device": "mknod device c 1 3",
    "mount": "mkdir -p here && mount -t tmpfs none here && umount here",
    "use a capability": "grep -E 'CapEff:.*[1-9a-f]' /proc/self/status",
    "change the machine's name": "hostname {hostname}",
    "hear the network": python("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "change another user's file": "chown 1 {precious} && chown 0 {precious}",
    "leave by chroot": "chroot / true",
}

ALL = TRIES | (TRIES_OF_ROOT if os.geteuid() == 0 else {})


@pytest.fixture(scope="module")
def world() -> Iterator[Mapping[str, Any]]:
    """A trainer with something to lose, and another rollout."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        for name in ("secret", "precious", "doomed"):
            (folder / name).write_text(SECRET)
        home = folder / "home"
        home.mkdir()
        (home / ".profile").touch()
        beside = f"hermes-atropos-test-{os.getpid()}"
        for place in (Path("/tmp"), Path("/dev/shm")):
            (place / beside).touch()
            held.callback((place / beside).unlink)
        patch = held.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("NOTE_OF_THE_TRAINER", SECRET)
        victim = subprocess.Popen(["sleep", "1000"], stdin=(folder / "secret").open(), cwd=folder)
        held.callback(victim.wait)
        held.callback(victim.kill)
        abstract = beside
        listening = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            (socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract),
        ):
            listener = held.enter_context(socket.socket(family, kind))
            listener.bind(address)
            listener.listen()
            listening.append(listener)
        port = listening[0].getsockname()[1]
        held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("127.0.0.1", port))
        add_key = {"x86_64": 248, "aarch64": 217}[platform.machine()]
        ctypes.CDLL(None).syscall(add_key, b"user", beside.encode(), SECRET.encode(), len(SECRET), -3)
        other = HermesSandbox()
        held.callback(other.release)
        other.run("echo the answer > answer.txt; export ANSWER_OF_ANOTHER=1; sleep 1000 > /dev/null &")
        yield {
            "folder": folder,
            "secret": folder / "secret",
            "precious": folder / "precious",
            "doomed": folder / "doomed",
            "home": home,
            "beside": beside,
            "victim": victim.pid,
            "port": port,
            "socket": folder / "socket",
            "abstract": abstract,
            "other": other.workspace,
            "hostname": platform.node(),
        }


@pytest.fixture(scope="module")
def walled() -> Iterator[WalledSandbox]:
    sandbox = WalledSandbox()
    yield sandbox
    sandbox.release()


@pytest.fixture(scope="module")
def folder() -> Iterator[HermesSandbox]:
    sandbox = HermesSandbox()
    yield sandbox
    sandbox.release()


class TestRedTeam:
    @pytest.mark.parametrize("name", ALL)
    def test_what_works_in_a_folder_fails_behind_the_wall(
        self, name: str, world: Mapping[str, Any], folder: HermesSandbox, walled: WalledSandbox
    ) -> None:
        attempt = ALL[name].replace("{", "{{").replace("}", "}}")
        for word in world:
            attempt = attempt.replace("{{" + word + "}}", str(world[word]))
        attempt = attempt.replace("{{", "{").replace("}}", "}")
        behind = walled.run(f"( {attempt} ) && echo it worked")
        assert not behind.output.endswith("it worked\n"), behind.output
        assert SECRET not in behind.output
        alone = folder.run(f"( {attempt} ) && echo it worked")
        assert alone.output.endswith("it worked\n"), alone.output

    def test_the_first_process_cannot_be_ended(self, walled: WalledSandbox) -> None:
        walled.run("kill -9 1; kill -9 -1; kill -STOP 1")
        assert walled.run("echo on").output == "on\n"

    def test_what_hides_from_its_sandbox_outlives_a_folder_and_not_the_wall(self, tmp_path: Path) -> None:
        hidden = "cd / && env -i setsid sleep {} > /dev/null 2>&1 &"
        seconds = 10_000 + os.getpid() / 1_000_000
        for number, kind in enumerate((HermesSandbox, WalledSandbox)):
            sandbox = kind(workspace=tmp_path)
            mark = f"sleep {seconds + number}"
            sandbox.run(hidden.format(seconds + number))
            until(lambda mark=mark: bool(running(mark)))
            sandbox.release()
            left = running(mark)
            for pid in left:
                os.kill(pid, 9)
            assert bool(left) == (kind is HermesSandbox)


def running(command: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command in entry.read_text().replace("\0", " "):
                found.append(int(entry.parent.name))
    return found


class TestInside:
    def test_the_same_paths_in_each_rollout(self) -> None:
        with nothing_left():
            one, two = WalledSandbox(), WalledSandbox()
            look = "pwd; echo $HOME; id -un; hostname; env | sort"
            assert one.run(look) == two.run(look)
            assert one.run("pwd; echo $HOME").output == "/workspace\n/home/agent\n"
            one.release()
            two.release()

    def test_its_variables(self, walled: WalledSandbox) -> None:
        names = {line.split("=")[0] for line in walled.run("env").output.splitlines()}
        assert names == {"PATH", "HOME", "LANG", "TERM", "USER", "PWD", "OLDPWD", "SHLVL", "_"}

    def test_places_of_its_own_to_write(self, walled: WalledSandbox) -> None:
        written = walled.run("for place in /workspace ~ /tmp /dev/shm; do echo x > $place/file && echo $place; done")
        assert written.output == "/workspace\n/home/agent\n/tmp\n/dev/shm\n"

    def test_what_is_asked_for(self, tmp_path: Path) -> None:
        for name in ("read", "changed", "copied"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        options = WallOptions(
            mounts={
                str(tmp_path / "read"): "ro",
                str(tmp_path / "changed"): "rw",
                str(tmp_path / "copied"): "copy",
            },
            env={"COLOUR": "red green"},
        )
        with nothing_left():
            sandbox = WalledSandbox(options=options)
            result = sandbox.run(
                f"echo $COLOUR; cd {tmp_path}; for name in *; do cat $name/file; echo x > $name/file; done"
            )
            assert result.output.startswith("red green\nchangedcopiedread")
            assert "Read-only file system" in result.output
            assert sandbox.run(f"cat {tmp_path}/copied/file").output == "x\n"
            sandbox.release()
        assert [(tmp_path / name / "file").read_text() for name in ("read", "changed", "copied")] == [
            "read",
            "x\n",
            "copied",
        ]

    def test_the_network_where_it_is_asked_for(self, world: Mapping[str, Any]) -> None:
        sandbox = WalledSandbox(options=WallOptions(network=True))
        assert sandbox.run(f"exec 3<>/dev/tcp/127.0.0.1/{world['port']} && echo connected").output == "connected\n"
        sandbox.release()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"mounts": {"/usr/share": "rx"}}, "'ro', 'rw' or 'copy'"),
            ({"mounts": {"relative": "ro"}}, "plain absolute path"),
            ({"mounts": {"/nowhere/at/all": "ro"}}, "something that exists"),
            ({"mounts": {"/tmp": "ro"}}, "the wall's own /tmp"),
            ({"mounts": {"/proc/1": "ro"}}, "the wall's own /proc"),
            ({"mounts": {"/": "ro"}}, "the wall's own"),
            ({"env": {"A B": "x"}}, "not a variable"),
            ({"env": {"A": 1}}, "not a variable"),
        ],
    )
    def test_what_cannot_be(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            WallOptions(**options)


class TestCopy:
    """A copy of a folder is an overlay of it, or where that can't be, a copy."""

    @pytest.fixture(params=["overlay", "copy"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        if request.param == "copy":
            monkeypatch.setattr(overlay.shutil, "which", lambda name: None)
            wall.bubblewrap()
        folder = tmp_path / "folder"
        (folder / "deep").mkdir(parents=True)
        (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
        (folder / "run.sh").chmod(0o755)
        (folder / "link").symlink_to("run.sh")
        (folder / "deep" / "file").write_text("as it was")
        return folder

    def test_what_is_changed_is_seen_in_the_task_alone(self, folder: Path) -> None:
        with nothing_left():
            sandbox = WalledSandbox(workspace=folder, copy=True)
            assert sandbox.run("./link; echo changed > deep/file; rm run.sh; echo new > deep/new").output == "ran\n"
            assert sandbox.read_bytes("deep/file") == b"changed\n"
            sandbox.write_bytes("deep/written", b"from outside")
            assert run_check(sandbox, "ls . deep; cat deep/*; echo more > made").output == (
                ".:\ndeep\nlink\n\ndeep:\nfile\nnew\nwritten\nchanged\nnew\nfrom outside"
            )
            assert sandbox.run("cat made").output == "more\n"
            assert run_check(sandbox, "cat $WORKSPACE/made", {"file": ""}, copy=True).output == "more\n"
            sandbox.release()
        assert (folder / "deep" / "file").read_text() == "as it was"
        assert sorted(path.name for path in folder.rglob("*")) == ["deep", "file", "link", "run.sh"]

    @pytest.mark.parametrize("part", ["Wall", "WalledEnvironment"])
    def test_where_a_part_cannot_be_opened_nothing_is_left(
        self, folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*args: Any, **options: Any) -> None:
            raise SandboxError("not today")

        monkeypatch.setattr(f"hermes_atropos.hermes.walled.{part}", fails)
        with nothing_left(), pytest.raises(SandboxError, match="not today") as failed:
            WalledSandbox(workspace=folder, copy=True)
        assert failed.tb is not None, "which still holds what was opened"

    def test_several_of_one_folder(self, folder: Path) -> None:
        with nothing_left():
            sandboxes = [WalledSandbox(workspace=folder, copy=True) for _ in range(3)]
            for number, sandbox in enumerate(sandboxes):
                sandbox.run(f"echo {number} > deep/file")
            assert [sandbox.read_bytes("deep/file") for sandbox in sandboxes] == [b"0\n", b"1\n", b"2\n"]
            for sandbox in sandboxes:
                sandbox.release()


class TestEnd:
    def test_nothing_is_left(self) -> None:
        with nothing_left():
            for _ in range(5):
                sandbox = WalledSandbox()
                sandbox.run("setsid sleep 1000 > /dev/null 2>&1 & chmod 0 .")
                sandbox.release()

    def test_with_its_trainer(self, tmp_path: Path) -> None:
        """A trainer that is killed takes its walls with it."""
        script = (
            "from hermes_atropos.hermes.walled import WalledSandbox; import time\n"
            "sandbox = WalledSandbox(); sandbox.run('setsid sleep 4321.5 > /dev/null 2>&1 &')\n"
            "print('stands', flush=True); time.sleep(1000)"
        )
        environ = {**os.environ, "TMPDIR": str(tmp_path), "HERMES_HOME": str(tmp_path / "hermes")}
        trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environ)
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "stands\n"
        assert running("sleep 4321.5")
        trainer.kill()
        trainer.wait(LIMIT)
        trainer.stdout.close()
        until(lambda: not running("sleep 4321.5"))


class TestLimits:
    """Reaching one ends a command, in words that the model reads, and not the task."""

    @pytest.fixture
    def tight(self) -> Iterator[WalledSandbox]:
        limits = Limits(
            memory_bytes=200_000_000,
            processes=40,
            cpu_seconds=1,
            file_bytes=2_000_000,
            space_bytes=3_000_000,
            open_files=64,
        )
        sandbox = WalledSandbox(options=WallOptions(limits=limits))
        yield sandbox
        sandbox.release()

    @pytest.mark.parametrize(
        ("hog", "said"),
        [
            (python("x = bytearray(400_000_000)"), "Killed|MemoryError"),
            (python("while True: pass"), "CPU time limit exceeded"),
            ("head -c 9000000 /dev/zero > large", "File size limit exceeded"),
            ("for n in 1 2 3; do head -c 1900000 /dev/zero > /tmp/$n; done; rm /tmp/?", "No space left"),
            ("for n in 1 2 3; do head -c 1900000 /dev/zero > ~/$n; done; rm ~/?", "No space left"),
            ("for n in 1 2 3; do head -c 1900000 /dev/zero > /dev/shm/$n; done; rm /dev/shm/?", "No space left"),
            (python("files = [open('/dev/null') for _ in range(100)]"), "Too many open files"),
            (":() { : | : & }; : 2>&1 | head -c 1000; sleep 0.5; kill 0", "Resource temporarily unavailable"),
        ],
    )
    def test_a_hog(self, hog: str, said: str, tight: WalledSandbox) -> None:
        assert re.search(said, tight.run(hog, timeout=20).output)
        tight.stop_processes()
        until(lambda: tight.run("echo on").output == "on\n")

    def test_the_memory_is_said(self, tight: WalledSandbox) -> None:
        if "memory" in hierarchies():
            output = tight.run(python("x = bytearray(400_000_000)")).output
            assert output.endswith("[A process was ended: the sandbox has 200,000,000 bytes of memory]")

    def test_output_that_may_not_be_shortened(self, tight: WalledSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environments, "OUTPUT", 1_000_000)
        result = tight.run("yes")
        assert result.output.endswith("[Command ended: it wrote more than 1,000,000 characters]")
        assert len(result.output) < 2_000_000

    def test_no_group_is_left(self) -> None:
        sandbox = WalledSandbox()
        folders = [path for path in sandbox._wall._group._folders if path.exists()]
        assert len(folders) == len(set(hierarchies().values()))
        sandbox.release()
        assert not any(path.exists() for path in folders)

    def test_groups_of_a_process_that_was_killed_are_removed(self, tmp_path: Path) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        for process in (ended.pid, os.getpid()):
            (tmp_path / f"hermes-atropos-{process}-0123456789ab").mkdir()
        limits.remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f"hermes-atropos-{os.getpid()}-0123456789ab"]

    def test_where_no_groups_can_be_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "hierarchies", dict)
        assert "setrlimit" in limits.mechanisms()["memory"]
        sandbox = WalledSandbox(options=WallOptions(limits=Limits(memory_bytes=200_000_000)))
        assert "MemoryError" in sandbox.run(python("x = bytearray(400_000_000)")).output
        sandbox.release()

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
    def test_what_is_no_limit(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="is not a whole number above 0"):
            Limits(processes=value)


def test_a_mount_within_etc_is_that_task_s_alone() -> None:
    hidden = next(
        path for path in sorted(Path("/etc").iterdir()) if path.is_file() and not (wall.etc() / path.name).exists()
    )
    sandbox = WalledSandbox(options=WallOptions(mounts={str(hidden): "ro"}))
    assert sandbox.run(f"cat {hidden} | wc -c").output.strip() == str(hidden.stat().st_size)
    sandbox.release()
    other = WalledSandbox()
    assert "No such file" in other.run(f"cat {hidden}").output
    other.release()


def test_etc_is_made_again_when_somebody_cleared_the_temporary_files() -> None:
    shutil.rmtree(wall.etc())
    sandbox = WalledSandbox()
    assert sandbox.run("id -un").output == "agent\n"
    sandbox.release()


class TestUnavailable:
    @pytest.fixture(autouse=True)
    def _found_anew(self) -> Iterator[None]:
        wall.bubblewrap.cache_clear()
        yield
        wall.bubblewrap.cache_clear()

    def refusing(self, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "bin" / "bwrap"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def test_without_user_namespaces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a user namespace that may have none within, as where the system forbids them."""
        program, _ = wall.bubblewrap()
        wall.bubblewrap.cache_clear()
        forbid = f'echo 0 > /proc/sys/user/max_user_namespaces; exec {program} "$@"'
        within = f"unshare --user --map-root-user sh -c {shlex.quote(forbid)} -"
        self.refusing(tmp_path, f'[ "$1" = --version ] && exec {program} --version\nexec {within} "$@"', monkeypatch)
        with nothing_left(), pytest.raises(SandboxUnavailableError, match=r"user namespaces.*sandbox='folder'"):
            WalledSandbox()

    def test_with_an_old_bubblewrap_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusing(tmp_path, "echo bubblewrap 0.4.1", monkeypatch)
        monkeypatch.setattr(wall, "bundled", lambda: None)
        with nothing_left(), pytest.raises(SandboxUnavailableError, match=r"0\.4\.1.*hermes-atropos\[wall\]"):
            WalledSandbox()

    def test_with_none_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wall, "bundled", lambda: None)
        monkeypatch.setenv("PATH", str(tmp_path))
        with nothing_left(), pytest.raises(SandboxUnavailableError, match="no bubblewrap"):
            WalledSandbox()


def test_the_doctor_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for line in (
        r"python: 3\.",
        r"hermes-agent(-\w+)?: \d",
        r"bubblewrap: \d.* \(/",
        "wall: it stands",
        "limit of memory: ",
        "docker: ",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE), line


def test_walls_that_are_opened_at_once_hold_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may often have 1,024, and a wall is given two dozen to start with."""
    held: list[int] = []
    await_ready = wall.await_ready

    def counted(process: subprocess.Popen[bytes]) -> str | None:
        held.append(len(os.listdir("/proc/self/fd")))
        return await_ready(process)

    monkeypatch.setattr(wall, "await_ready", counted)
    before = len(os.listdir("/proc/self/fd"))

    def opened(number: int) -> wall.Wall:
        own, workspace = tmp_path / f"own{number}", tmp_path / f"workspace{number}"
        own.mkdir()
        workspace.mkdir()
        return wall.Wall(own, {wall.WORKSPACE: (workspace, True)}, WallOptions())

    with ThreadPoolExecutor(24) as pool:
        walls = list(pool.map(opened, range(24)))
    for one in walls:
        one.close()
    assert max(held) - before < 24 * 4 + 50, "four for each, and those of the one that is being started"
    assert len(os.listdir("/proc/self/fd")) == before
