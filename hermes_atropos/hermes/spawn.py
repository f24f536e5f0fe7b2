"""``subprocess.Popen`` that lets the other threads run while a process starts.

CPython starts a process with the interpreter lock held until the new program has been loaded. On a busy machine the
child waits for a processor first, milliseconds at a time, and with it every thread of the parent, the event loop's
included. The C library's ``posix_spawn`` (POSIX.1-2017) does the same work, and a call through `ctypes` gives the lock
up meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
from typing import Any

__all__ = ["Popen"]

# Flags of spawn.h in glibc and musl.
SETSIGDEF, SETSID = 0x04, 0x80

#: Bytes for a posix_spawnattr_t or a posix_spawn_file_actions_t: three times what the larger one takes in glibc.
SCRATCH = 1024


@functools.cache
def library() -> tuple[Any, Any] | None:
    """The C library twice: called without, and with giving the interpreter lock up. None where it lacks a function."""
    if sys.platform != "linux":
        return None
    keeping, releasing = ctypes.PyDLL(None), ctypes.CDLL(None)
    # Both are there from glibc 2.34 on.
    needed = ("posix_spawn_file_actions_addchdir_np", "posix_spawn_file_actions_addclosefrom_np")
    return (keeping, releasing) if all(hasattr(keeping, name) for name in needed) else None


class Popen(subprocess.Popen[Any]):
    """Falls back on CPython's own way for whatever it does not know."""

    def _execute_child(  # of CPython 3.11 to 3.13
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: Any,
        shell: bool,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        restore_signals: bool,
        *rest: Any,
    ) -> None:
        gid, gids, uid, umask, start_new_session, *group = rest
        program = os.fsdecode(executable or args[0])
        targets = [(p2cread, 0), (c2pwrite, 1), (errwrite, 2)]
        known = (
            preexec_fn in (None, os.setsid)
            and not (pass_fds or shell or group not in ([], [-1], [None]))
            and (gid, gids, uid, umask) == (None, None, None, -1)
            and os.path.isabs(program)
            and all(source == -1 or source > 2 for source, _ in targets)
        )
        found = library() if known else None
        if found is None:
            super()._execute_child(  # type: ignore[misc]
                *(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell),
                *(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals),
                *rest,
            )
            return
        keeping, releasing = found
        actions, attributes = ctypes.create_string_buffer(SCRATCH), ctypes.create_string_buffer(SCRATCH)
        keeping.posix_spawn_file_actions_init(actions)
        keeping.posix_spawnattr_init(attributes)
        try:
            for source, target in targets:
                if source != -1:
                    keeping.posix_spawn_file_actions_adddup2(actions, source, target)
            if close_fds:
                keeping.posix_spawn_file_actions_addclosefrom_np(actions, 3)
            if cwd is not None:
                keeping.posix_spawn_file_actions_addchdir_np(actions, os.fsencode(cwd))
            flags = SETSIGDEF if restore_signals else 0
            if start_new_session or preexec_fn is os.setsid:
                flags |= SETSID
            keeping.posix_spawnattr_setflags(attributes, ctypes.c_short(flags))
            # Python ignores these; what it starts should not.
            ignored = sum(1 << (number - 1) for number in (signal.SIGPIPE, signal.SIGXFSZ))
            keeping.posix_spawnattr_setsigdefault(attributes, (ctypes.c_ulong * 16)(ignored))
            variables = os.environ if env is None else env
            pid = ctypes.c_int()
            error = releasing.posix_spawn(
                ctypes.byref(pid),
                os.fsencode(program),
                actions,
                attributes,
                strings(map(os.fsencode, args)),
                strings(os.fsencode(name) + b"=" + os.fsencode(value) for name, value in variables.items()),
            )
        finally:
            keeping.posix_spawn_file_actions_destroy(actions)
            keeping.posix_spawnattr_destroy(attributes)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        if error:
            raise OSError(error, os.strerror(error), program)
        self.pid = pid.value
        self._child_created = True


def strings(values: Any) -> Any:
    """A C array of strings that ends with a null pointer."""
    listed = [*values, None]
    return (ctypes.c_char_p * len(listed))(*listed)
