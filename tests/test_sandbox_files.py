"""Files of a workspace from outside: what a policy puts there leads nobody out, and stops nobody.

Each try is first shown to succeed against code that knows no better: ``Path.read_bytes``, ``Path.write_bytes``,
``shutil.rmtree``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LIMIT

from hermes_atropos.errors import FileTooLargeError, SandboxError, UnsafePathError
from hermes_atropos.sandbox import files
from hermes_atropos.sandbox.files import copy_folder, read_bytes, remove_folder, write_bytes

SECRET = b"the solution\n"


@pytest.fixture
def solution(tmp_path: Path) -> Path:
    """A file of the trainer."""
    path = tmp_path / "trainer" / "solution.txt"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """For the length of the block this process may not do whatever it likes with any file, also where it is root's."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "links"),
    [
        ("answer.txt", {"answer.txt": "{trainer}/solution.txt"}),
        ("answer.txt", {"answer.txt": "../trainer/solution.txt"}),
        ("a/solution.txt", {"a": "{trainer}"}),
        ("a/b/solution.txt", {"a": ".", "b": "../trainer"}),
        ("a", {"a": "b", "b": "c/../trainer/solution.txt", "c": "."}),
        ("../trainer/solution.txt", {}),
        ("{trainer}/solution.txt", {}),
    ],
)
def test_no_path_leads_out(path: str, links: dict[str, str], solution: Path, workspace: Path) -> None:
    place = {"trainer": solution.parent}
    for name, target in links.items():
        (workspace / name).symlink_to(target.format(**place))
    path = path.format(**place)
    assert (workspace / path).read_bytes() == SECRET
    with pytest.raises(UnsafePathError, match=r"leads out of the workspace|not a path relative to the workspace"):
        read_bytes(workspace, path)
    assert issubclass(UnsafePathError, OSError)
    assert issubclass(UnsafePathError, SandboxError)


def test_a_workspace_that_was_replaced(solution: Path, workspace: Path) -> None:
    workspace.rmdir()
    workspace.symlink_to(solution.parent)
    assert (workspace / "solution.txt").read_bytes() == SECRET
    for use in (lambda: read_bytes(workspace, "solution.txt"), lambda: write_bytes(workspace, "solution.txt", b"")):
        with pytest.raises(UnsafePathError, match="replaced"):
            use()


def test_links_that_stay_within_are_followed(workspace: Path) -> None:
    write_bytes(workspace, "a/b/file", b"here")
    (workspace / "a" / "up").symlink_to("../a/b")
    (workspace / "a" / "b" / "link").symlink_to("./file")
    assert read_bytes(workspace, "a/up/link") == read_bytes(workspace, "a/up/../b//./file") == b"here"


@pytest.mark.parametrize("path", ["f/.", "f/..", "f/../f", "l"])
def test_a_file_is_no_folder(workspace: Path, path: str) -> None:
    write_bytes(workspace, "f", b"here")
    (workspace / "l").symlink_to("f/.")
    with pytest.raises(NotADirectoryError):
        read_bytes(workspace, path)


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(st.sampled_from(["a", "b", "c", "..", ".", "", "secret"]), min_size=1, max_size=5).map("/".join)
LINKS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "a/b", "b/a", "a/c"]), PATHS), max_size=6)


@settings(max_examples=100, deadline=None)
@given(folders=st.sets(NAMES), links=LINKS, path=PATHS)
def test_what_is_read_is_what_lies_within(folders: set[str], links: list[tuple[str, str]], path: str) -> None:
    """Whatever links there are: the file that the kernel finds if that is within, else an error, and at once."""
    with tempfile.TemporaryDirectory() as outside:
        workspace = Path(outside, "a")
        build(workspace, folders, links)
        Path(outside, "secret").write_bytes(SECRET)
        try:
            content = read_bytes(workspace, path)
        except OSError:
            return
        assert content == (workspace / path.strip("/")).read_bytes() == b"within"


def build(workspace: Path, folders: set[str], links: list[tuple[str, str]]) -> None:
    """A workspace with folders, in each a file and links; the first link of a name counts."""
    for folder in (workspace, *(workspace / name for name in sorted(folders))):
        folder.mkdir()
        (folder / "secret").write_bytes(b"within")
    for name, target in links:
        place = workspace / name
        if place.parent == workspace or place.parent.name in folders:
            with contextlib.suppress(FileExistsError):
                place.symlink_to(target or ".")


def test_links_in_a_circle(workspace: Path) -> None:
    (workspace / "a").symlink_to("b")
    (workspace / "b").symlink_to("a")
    with pytest.raises(UnsafePathError, match="circle"):
        read_bytes(workspace, "a")


def test_folders_that_would_use_up_the_descriptors(workspace: Path) -> None:
    """A process has a thousand or so, and the trainer needs them."""
    (workspace / "d").mkdir()
    deep = "/".join(["d"] * 500)
    (workspace / deep).mkdir(parents=True)
    (workspace / "link").symlink_to(f"{deep}/{'../' * 499}d")
    before = len(os.listdir("/proc/self/fd"))
    for path in (deep, "link"):
        with pytest.raises(UnsafePathError, match="more than 100 folders"):
            read_bytes(workspace, path)
    assert len(os.listdir("/proc/self/fd")) == before
    (workspace / "back").symlink_to("d/../" * 500 + "file")
    write_bytes(workspace, "file", b"x")
    assert read_bytes(workspace, "back") == b"x"


def test_a_named_pipe_stops_nobody(workspace: Path) -> None:
    pipe = workspace / "answer.txt"
    os.mkfifo(pipe)
    naive = threading.Thread(target=pipe.read_bytes)
    naive.start()
    naive.join(0.2)
    assert naive.is_alive(), "it waits for somebody to write"
    with pipe.open("wb"):
        pass
    naive.join(LIMIT)
    with pytest.raises(UnsafePathError, match="a named pipe, not a regular file"):
        read_bytes(workspace, "answer.txt")
    write_bytes(workspace, "answer.txt", b"42")
    assert read_bytes(workspace, "answer.txt") == b"42"


def test_a_socket_a_folder_and_a_device(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    (workspace / "folder").mkdir()
    for name in ("socket", "folder"):
        with pytest.raises(UnsafePathError, match=f"'{name}' is a {name}"):
            read_bytes(workspace, name)
    with Path("/dev/zero").open("rb") as device:
        assert len(device.read(files.LIMIT_BYTES + 1)) > files.LIMIT_BYTES, "it has no end"
    with pytest.raises(UnsafePathError, match="'zero' is a device"):
        read_bytes(Path("/dev"), "zero")
    with pytest.raises(UnsafePathError, match="is a folder"):
        read_bytes(workspace, ".")


def test_a_file_without_end(workspace: Path) -> None:
    with (workspace / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileTooLargeError, match=r"1,099,511,627,776 bytes, more than limit_bytes=10,000,000"):
        read_bytes(workspace, "sparse")
    write_bytes(workspace, "exact", b"12345")
    assert read_bytes(workspace, "exact", 5) == b"12345"
    with pytest.raises(FileTooLargeError):
        read_bytes(workspace, "exact", 4)


def test_a_folder_is_not_listed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it doesn't matter how much is in it."""

    def listed(*_: object) -> None:
        raise AssertionError("the folder was listed")

    write_bytes(workspace, "folder/answer.txt", b"42")
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, listed)
    assert read_bytes(workspace, "folder/answer.txt") == b"42"


def test_names(workspace: Path) -> None:
    strange = os.fsdecode(b"\xff\n'")
    write_bytes(workspace, strange, b"1")
    assert os.listdir(os.fsencode(workspace)) == [b"\xff\n'"]
    assert read_bytes(workspace, strange) == b"1"
    for path in ("a\0b", "\ud800", "", "/", "a/"):
        with pytest.raises((UnsafePathError, FileNotFoundError)):
            read_bytes(workspace, path)
        with pytest.raises(UnsafePathError):
            write_bytes(workspace, path, b"")
    with pytest.raises(OSError, match="too long"):
        read_bytes(workspace, "a" * 5000)
    with pytest.raises(FileNotFoundError, match="no such file in the workspace: 'a/b'"):
        read_bytes(workspace, "a/b")
    write_bytes(workspace, "a", b"")
    with pytest.raises(NotADirectoryError):
        read_bytes(workspace, "a/b")


EXCHANGE = """
import os, sys
honest, secret = sys.argv[1:]
print(flush=True)
while os.getppid() != 1:
    os.symlink(secret, "t"); os.replace("t", "answer.txt")
    os.link(honest, "t"); os.replace("t", "answer.txt")
"""


def test_a_link_that_is_exchanged_while_it_is_read(solution: Path, workspace: Path) -> None:
    (workspace / "honest.txt").write_bytes(b"42")
    (workspace / "answer.txt").write_bytes(b"42")
    command = [sys.executable, "-I", "-S", "-c", EXCHANGE, "honest.txt", str(solution)]
    with subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE) as exchanging:
        try:
            assert exchanging.stdout is not None
            exchanging.stdout.readline()
            seen = set[object]()
            for _ in range(10_000):
                try:
                    seen.add(read_bytes(workspace, "answer.txt"))
                except UnsafePathError:
                    seen.add(UnsafePathError)
            assert seen == {b"42", UnsafePathError}
            while SECRET not in seen:  # looked at first, and then opened
                if not (workspace / "answer.txt").is_symlink():
                    seen.add((workspace / "answer.txt").read_bytes())
        finally:
            exchanging.kill()


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_writing_overwrites_nothing_outside(solution: Path, workspace: Path) -> None:
    (workspace / "link").symlink_to(solution)
    (workspace / "folder").symlink_to(solution.parent)
    os.link(solution, workspace / "hard")
    (workspace / "link").write_bytes(b"naive")
    assert solution.read_bytes() == b"naive"
    for path in ("link", "hard"):
        write_bytes(workspace, path, b"new")
        assert read_bytes(workspace, path) == b"new"
    for path in (
        "folder/solution.txt",
        "folder/new/file",
        "../trainer/solution.txt",
        "a/../../trainer/x",
        str(solution),
    ):
        with pytest.raises(UnsafePathError):
            write_bytes(workspace, path, b"new")
    assert solution.read_bytes() == b"naive"
    assert os.listdir(solution.parent) == ["solution.txt"]


def test_writing_keeps_what_is_in_order(workspace: Path) -> None:
    write_bytes(workspace, "deep/er/run.sh", b"#!/bin/sh\n")
    (workspace / "deep" / "er" / "run.sh").chmod(0o750)
    (workspace / "short").symlink_to("deep/er")
    write_bytes(workspace, "short/run.sh", b"#!/bin/sh\necho\n")
    written = workspace / "deep" / "er" / "run.sh"
    assert (written.read_bytes(), stat.S_IMODE(written.stat().st_mode)) == (b"#!/bin/sh\necho\n", 0o750)
    with pytest.raises(IsADirectoryError):
        write_bytes(workspace, "deep/er", b"")
    assert os.listdir(workspace / "deep") == ["er"], "nothing is left beside it"


# ── Copying ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(folders=st.sets(NAMES), links=LINKS)
def test_no_link_leads_out_of_a_copy(folders: set[str], links: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as outside:
        build(Path(outside, "a"), folders, links)
        copy = Path(outside, "b")
        copy_folder(Path(outside, "a"), copy)
        for found in [copy, *copy.rglob("*")]:
            if found.is_symlink():
                try:
                    assert found.resolve(strict=True).is_relative_to(copy)
                except (OSError, RuntimeError):  # it leads nowhere, or in a circle
                    continue
        assert {path.name for path in copy.iterdir() if path.is_dir() and not path.is_symlink()} == folders
        remove_folder(copy)


def test_a_copy_has_what_can_be_read_and_nobody_writes_in_it(solution: Path, workspace: Path) -> None:
    write_bytes(workspace, "bin/run.sh", b"#!/bin/sh\necho ran\n")
    (workspace / "bin" / "run.sh").chmod(0o755)
    (workspace / "run").symlink_to("bin/run.sh")
    (workspace / "solution").symlink_to(solution)
    os.mkfifo(workspace / "pipe")
    (workspace / os.fsdecode(b"\xff")).touch()
    copy = workspace.parent / "copy"
    copy_folder(workspace, copy)
    assert sorted(os.listdir(os.fsencode(copy))) == [b"bin", b"run", b"\xff"]
    assert subprocess.run([copy / "run"], capture_output=True, check=True).stdout == b"ran\n"
    with as_ordinary_user():
        for path in (copy / "new", copy / "bin" / "new", copy / "bin" / "run.sh"):
            with pytest.raises(PermissionError):
                path.write_bytes(b"")
    remove_folder(copy)
    assert not copy.exists()


@pytest.mark.parametrize("fill", ["sparse", "many", "deep"])
def test_a_workspace_that_is_too_large_to_copy(fill: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "COPY_ENTRIES", 5 if fill == "many" else 1000)
    if fill == "sparse":
        with (workspace / "sparse").open("wb") as file:
            file.truncate(1 << 40)
    elif fill == "many":
        for number in range(6):
            (workspace / str(number)).touch()
    else:
        (workspace / "/".join(["d"] * 200)).mkdir(parents=True)
    error = UnsafePathError if fill == "deep" else FileTooLargeError
    with pytest.raises(error, match="workspace has more than"):
        copy_folder(workspace, workspace.parent / "copy")
    remove_folder(workspace.parent / "copy")


# ── Removing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_removed_folder_takes_nothing_else_with_it(solution: Path, workspace: Path) -> None:
    (workspace / "link").symlink_to(solution.parent)
    (workspace / "a" / "b").mkdir(parents=True)
    (workspace / "a" / "b" / "link").symlink_to(solution)
    remove_folder(workspace)
    assert not workspace.exists()
    assert solution.read_bytes() == SECRET


def test_a_folder_of_any_depth(workspace: Path) -> None:
    """Too deep for a path, for recursion and for a descriptor each."""
    before = os.getcwd()
    try:
        os.chdir(workspace)
        for _ in range(1500):
            os.mkdir("deeper")
            os.chdir("deeper")
        Path("file").touch()
    finally:
        os.chdir(before)
    remove_folder(workspace)
    assert not workspace.exists()


def test_folders_that_nobody_may_enter() -> None:
    with as_ordinary_user():
        folder = Path(tempfile.mkdtemp())
        for mode in (0o000, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600):
            inner = folder / f"{mode:o}" / "inner"
            inner.mkdir(parents=True)
            (inner / "file").touch()
            inner.chmod(mode)
            inner.parent.chmod(mode)
        folder.chmod(0o300)
        remove_folder(folder)
        assert not folder.exists()


def test_what_cannot_be_removed_is_said(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        remove_folder(workspace / "gone")
    assert "gone could not be removed: " in caplog.text
    assert "No such file" in caplog.text


MOUNTED = """
import logging, os, shutil, subprocess, sys
from pathlib import Path
from hermes_atropos.errors import UnsafePathError
from hermes_atropos.sandbox.files import copy_folder, read_bytes, remove_folder

def mount(where):
    subprocess.run(["mount", "--bind", "trainer", where], check=True)

logging.basicConfig(format="%(message)s", stream=sys.stdout)
for remove in (shutil.rmtree, remove_folder):
    Path("trainer").mkdir(exist_ok=True)
    Path("trainer/solution.txt").write_text("the solution")
    Path("w/a/mounted").mkdir(parents=True)
    mount("w/a/mounted")
    try:
        read_bytes(Path("w"), "a/mounted/solution.txt")
    except UnsafePathError as error:
        print(error)
    copy_folder(Path("w"), Path("copy"))
    print(os.path.exists("copy/a/mounted"))
    remove_folder(Path("copy"))
    try:
        remove(Path("w"))
    except OSError as error:
        print("left to the caller:", error.strerror)
    print(remove.__name__, os.listdir("trainer"))
    [left] = [line.split()[4] for line in open("/proc/self/mountinfo") if " " + os.getcwd() + "/w" in line]
    subprocess.run(["umount", left], check=True)
    remove_folder(Path("w"))
    print(os.path.exists("w"))

Path("trainer/solution.txt").write_text("the solution")
Path("w").mkdir()
mount("w")
remove_folder(Path("w"))
print(os.listdir("trainer"))
"""


def test_what_is_mounted_in_a_workspace_is_left_alone(tmp_path: Path) -> None:
    """In namespaces of its own, where anybody may mount: the same file system, so that the device is no sign of it."""
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", MOUNTED]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    refused = "'a/mounted/solution.txt' leads out of the workspace: something is mounted at 'mounted'"
    lines = done.stdout.splitlines()
    assert lines[:5] == [refused, "False", "left to the caller: Device or resource busy", "rmtree []", "False"]
    assert lines[5:7] == [refused, "False"]
    assert lines[7].startswith("w could not be removed: w/")
    assert "Device or resource busy" in lines[7]
    assert lines[8:10] == ["remove_folder ['solution.txt']", "False"]
    assert lines[10].startswith("w could not be removed: ")
    assert "mounted here" in lines[10]
    assert lines[11] == "['solution.txt']"
