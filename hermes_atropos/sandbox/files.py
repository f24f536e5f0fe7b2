"""A task's files, read, written and copied from outside without being led out of the workspace; folders removed.

What lies in a workspace was put there by a policy, and may change while it is looked at. So a path is walked entry by
entry: each is opened from the folder before it, without following a link and without touching what it is (``O_PATH``),
and what is then asked is asked of the open entry. A link's target is walked by the same rules. Nothing that is mounted
in a workspace is entered. Where the system has no ``O_PATH``, a path with a link in it is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hermes_atropos.errors import FileTooLargeError, UnsafePathError

__all__ = ["LIMIT_BYTES", "copy_folder", "hidden_folder", "read_bytes", "remove_at_end", "remove_folder", "write_bytes"]

logger = logging.getLogger(__name__)

#: The largest file that is read unless the verifier says otherwise.
LIMIT_BYTES = 10_000_000

#: What a copy of a workspace may hold.
COPY_BYTES, COPY_ENTRIES = 1_000_000_000, 100_000

#: Links in one path, as the kernel has it; folders in one another, so that no path can use up the file descriptors.
LINKS, DEPTH = 40, 100

ENTRY = getattr(os, "O_PATH", os.O_NONBLOCK | os.O_NOCTTY) | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(workspace: Path, path: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """A regular file, by a path relative to ``workspace``; a link is followed if it stays within.

    ``Sandbox.read_bytes`` says what it raises.
    """
    with opened(workspace, path) as found:
        if kind(found) != stat.S_IFREG:
            raise UnsafePathError(f"{path!r} is {KINDS[kind(found)]}, not a regular file")
        size = os.fstat(found).st_size
        if size > limit_bytes:
            raise FileTooLargeError(f"{path!r} has {size:,} bytes, more than limit_bytes={limit_bytes:,}")
        with open(readable(found), "rb") as file:
            return file.read(size)  # whatever is appended meanwhile came too late


def write_bytes(workspace: Path, path: str, content: bytes) -> None:
    """Write a file, by a path relative to ``workspace``; missing folders are made.

    The file is written beside its place and moved there. So what stood there is replaced, be it a link or a pipe, and
    whoever reads sees the old or the new. An existing file's permissions are kept.

    Raises:
        UnsafePathError: the path leads out of the workspace, or is that of no file.
        IsADirectoryError: a folder stands there.
    """
    parent, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        raise UnsafePathError(f"{path!r} is the path of no file")
    parts_of(path)
    with opened(workspace, parent, make=True) as folder:
        beside = f".{secrets.token_hex(8)}"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                with contextlib.suppress(FileNotFoundError):
                    before = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
                    if stat.S_ISREG(before):
                        os.fchmod(descriptor, before & 0o777)
            os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside, dir_fd=folder)
            raise


@contextlib.contextmanager
def opened(workspace: Path, path: str, *, make: bool = False) -> Iterator[int]:
    """What stands at the end of ``path``, open as :data:`ENTRY`; ``make`` makes the folders that are missing."""
    parts, links = parts_of(path), 0
    way = [open_workspace(workspace)]
    try:
        mount = mount_of(way[0])
        while parts:
            name = parts.pop()
            if name in (".", "..") and kind(way[-1]) != stat.S_IFDIR:
                raise NotADirectoryError(errno.ENOTDIR, "A file stands where a folder should", path)
            if name == ".":
                continue
            if name == "..":
                if len(way) == 1:
                    raise UnsafePathError(f"{path!r} leads out of the workspace")
                os.close(way.pop())
                continue
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=way[-1])
            way.append(open_entry(name, way[-1], path))
            if len(way) > DEPTH:
                raise UnsafePathError(f"{path!r} leads through more than {DEPTH} folders")
            if mount_of(way[-1]) != mount:
                raise UnsafePathError(f"{path!r} leads out of the workspace: something is mounted at {name!r}")
            if kind(way[-1]) == stat.S_IFLNK:
                target = os.readlink("", dir_fd=way[-1])
                os.close(way.pop())
                links += 1
                if target.startswith("/"):
                    raise UnsafePathError(f"{path!r} leads out of the workspace: {name!r} is a link to {target!r}")
                if links > LINKS:
                    raise UnsafePathError(f"{path!r} leads through more than {LINKS} links: they may go in a circle")
                parts += parts_of(target)
        yield way[-1]
    finally:
        for descriptor in way:
            os.close(descriptor)


def parts_of(path: str) -> list[str]:
    """The names in a path, the last first.

    Raises:
        UnsafePathError: it is absolute, or no system has such a path.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UnsafePathError(f"{path!r} is not a path: {error}") from error
    if path.startswith("/") or "\0" in path:
        raise UnsafePathError(f"{path!r} is not a path relative to the workspace")
    return [part for part in reversed(path.split("/")) if part]


def open_workspace(workspace: Path) -> int:
    try:
        return os.open(workspace, FOLDER)
    except NotADirectoryError as error:
        raise UnsafePathError(f"The workspace {workspace} has been replaced: it is not a folder any more") from error


def open_entry(name: str, folder: int, path: str) -> int:
    try:
        return os.open(name, ENTRY, dir_fd=folder)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "There is no such file in the workspace", path) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafePathError(f"{path!r} leads through the link {name!r}, which this system cannot open") from error


def kind(descriptor: int) -> int:
    return stat.S_IFMT(os.fstat(descriptor).st_mode)


def mount_of(descriptor: int) -> str:
    """The mount on which an open entry is. The device does not tell: a folder mounted elsewhere keeps it."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
            return next(line for line in info if line.startswith("mnt_id:"))
    except OSError:  # a system without /proc
        return str(os.fstat(descriptor).st_dev)


def readable(found: int) -> int:
    """A descriptor from which an entry opened as :data:`ENTRY`, a regular file or a folder, can be read."""
    return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC) if hasattr(os, "O_PATH") else os.dup(found)


@contextlib.contextmanager
def kept_open(descriptor: int) -> Iterator[int]:
    """``descriptor``, closed after the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ── Copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def copy_folder(workspace: Path, target: Path) -> None:
    """A copy of a workspace for a program that is to read it, and not to be led out of it nor to wait there.

    It has the folders, the regular files and the links that stay within. Nobody may write in it.

    Raises:
        FileTooLargeError: the workspace holds more than ``COPY_BYTES`` or ``COPY_ENTRIES``.
        UnsafePathError: its folders are nested deeper than ``DEPTH``.
    """
    with kept_open(open_workspace(workspace)) as root:
        Copy(mount_of(root), COPY_BYTES, COPY_ENTRIES).folder(root, target, 0)


@dataclass
class Copy:
    """One copy under way: the mount that it keeps to, and how much it may still hold."""

    mount: str
    bytes_left: int
    entries_left: int

    def folder(self, folder: int, target: Path, depth: int) -> None:
        if depth > DEPTH:
            raise UnsafePathError(f"The workspace has more than {DEPTH} folders in one another")
        target.mkdir()
        with kept_open(readable(folder)) as listed, os.scandir(listed) as entries:
            for entry in entries:
                self.entry(entry.name, folder, target / entry.name, depth)
        target.chmod(0o555)

    def entry(self, name: str, folder: int, target: Path, depth: int) -> None:
        self.entries_left -= 1
        if self.entries_left < 0:
            raise FileTooLargeError(f"The workspace has more than {COPY_ENTRIES:,} files and folders")
        with kept_open(open_entry(name, folder, name)) as found:
            if mount_of(found) != self.mount:
                return
            if kind(found) == stat.S_IFDIR:
                self.folder(found, target, depth + 1)
            elif kind(found) == stat.S_IFREG:
                self.file(found, target)
            elif kind(found) == stat.S_IFLNK and stays_within(link := os.readlink("", dir_fd=found), depth):
                target.symlink_to(link)

    def file(self, found: int, target: Path) -> None:
        status = os.fstat(found)
        left = status.st_size
        self.bytes_left -= left
        if self.bytes_left < 0:
            raise FileTooLargeError(f"The workspace has more than {COPY_BYTES:,} bytes")
        with open(readable(found), "rb") as source, target.open("xb") as copy:
            while left and (piece := source.read(min(left, 1 << 20))):
                copy.write(piece)
                left -= len(piece)
        target.chmod(status.st_mode & 0o555)


def stays_within(target: str, depth: int) -> bool:
    """Whether a link with this target, so many folders deep, can only lead to what lies within.

    From the link's own folder ``..`` leads to the folder above. Behind a name it may lead anywhere, because that name
    may be a link.
    """
    parts = target.split("/")
    up = next((place for place, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and up <= depth and ".." not in parts[up:]


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hidden_folder() -> Path:
    """A new folder that only this user may enter, in one that can't be listed: nobody comes upon its name."""
    outer = Path(tempfile.mkdtemp(prefix="hermes-atropos-")).resolve()
    folder = outer / secrets.token_hex(8)
    folder.mkdir(0o700)
    outer.chmod(0o300)
    return folder


def remove_at_end(folder: Path) -> None:
    """Remove a folder at the end of this process, not of one that was forked from it."""
    owner = os.getpid()
    atexit.register(lambda: remove_folder(folder) if os.getpid() == owner and folder.exists() else None)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, follow no link, and leave alone what is mounted there.

    Each folder within is moved to the top before it is emptied: the kernel moves no folder on which something is
    mounted, follows no link to move one, and it doesn't matter how deep they stood. What can't be removed stays, and a
    warning says why.
    """
    failures: list[str] = []
    with noted(failures, str(folder)), contextlib.ExitStack() as held:
        parent = held.enter_context(kept_open(os.open(folder.parent, FOLDER)))
        make_accessible(folder.name, parent)
        top = held.enter_context(kept_open(os.open(folder.name, FOLDER, dir_fd=parent)))
        waiting: list[str] = []

        def move(name: str, inside: int) -> None:
            moved = f".{secrets.token_hex(8)}"
            try:
                os.rename(name, moved, src_dir_fd=inside, dst_dir_fd=top)
            except PermissionError:
                make_accessible(name, inside)
                os.rename(name, moved, src_dir_fd=inside, dst_dir_fd=top)
            waiting.append(moved)

        def clear(inside: int, shown: str) -> None:
            with os.scandir(inside) as entries:
                listed = list(entries)
            for entry in listed:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        move(entry.name, inside)
                    else:
                        os.unlink(entry.name, dir_fd=inside)
                except OSError as error:
                    failures.append(f"{shown}/{entry.name}: {error.strerror}")

        clear(top, str(folder))
        while waiting:
            name = waiting.pop()
            with noted(failures, f"{folder}/{name}"):
                with kept_open(open_moved(name, top)) as inside:
                    clear(inside, f"{folder}/{name}")
                os.rmdir(name, dir_fd=top)
        os.rmdir(folder.name, dir_fd=parent)
    if failures:
        logger.warning("%s could not be removed: %s", folder, "; ".join(failures[:5]))


def open_moved(name: str, folder: int) -> int:
    """Open a folder to be emptied, on which nothing is mounted because it could be moved."""
    try:
        found = os.open(name, FOLDER, dir_fd=folder)
    except PermissionError:
        make_accessible(name, folder)
        return os.open(name, FOLDER, dir_fd=folder)
    os.fchmod(found, 0o700)
    return found


def make_accessible(name: str, folder: int) -> None:
    """Let this process into a folder in ``folder``, unless something is mounted on it.

    Raises:
        OSError: something is mounted on it (``EBUSY``).
    """
    with kept_open(os.open(name, ENTRY | os.O_DIRECTORY, dir_fd=folder)) as found:
        if mount_of(found) != mount_of(folder):
            raise OSError(errno.EBUSY, "Something is mounted here: unmount it, then remove the folder", name)
        os.chmod(f"/proc/self/fd/{found}" if hasattr(os, "O_PATH") else found, 0o700)


@contextlib.contextmanager
def noted(failures: list[str], place: str) -> Iterator[None]:
    """Note what cannot be removed, and go on."""
    try:
        yield
    except OSError as error:
        failures.append(f"{place}: {error.strerror}")
