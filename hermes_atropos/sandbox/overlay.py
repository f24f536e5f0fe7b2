"""A folder that a task may change while the folder itself stays as it is, without a copy of it.

An overlay shows a folder, and puts what is changed into another (docs.kernel.org/filesystems/overlayfs.html). It is
mounted in a mount namespace of its own, which a small process holds; the walls of the task are started there, so that
its own and its verifier's see the same files. Where that can't be done, a copy is what was asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hermes_atropos.errors import SandboxError
from hermes_atropos.sandbox.wall import await_ready, begin

__all__ = ["Overlay"]

#: Mounts an overlay, says so, and holds the namespace until its input ends.
HOLD = 'mount -t overlay overlay -o "$1" "$2" && echo ready && exec cat > /dev/null'


class Overlay:
    """An overlay of a folder, from its construction to :meth:`close`.

    Args:
        folder: what it shows. Nobody may change it meanwhile.
        root: a folder of the task's own, for what is changed.

    Attributes:
        path: where it is in its namespace.
        seen: where it is from outside, for as long as it is there.
        enter: how a command is started in its namespace.

    Raises:
        SandboxError: it can't be mounted, or the changes would not be like those in a copy.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        unshare, nsenter = shutil.which("unshare"), shutil.which("nsenter")
        if unshare is None or nsenter is None:
            raise SandboxError("An overlay needs unshare and nsenter (util-linux).")
        if os.stat(folder).st_uid != os.geteuid():
            raise SandboxError("Who does not own the files of a folder cannot change them in an overlay.")
        if any(character in str(path) for path in (folder, root) for character in ',:\\"'):
            raise SandboxError("An overlay's paths have characters of their own: a comma, a colon, a backslash.")
        self.path = root / "workspace"
        for path in (root / "changed", root / "work", self.path):
            path.mkdir(parents=True)
        namespaces = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
        options = f"lowerdir={folder},upperdir={root}/changed,workdir={root}/work,userxattr"
        self._holder = begin(
            [unshare, *namespaces, "--propagation", "private", "sh", "-c", HOLD, "sh", options, str(self.path)]
        )
        said = await_ready(self._holder)
        if said is not None:
            self.close()
            raise SandboxError(f"The overlay cannot be mounted: {said}")
        self.seen = Path(f"/proc/{self._holder.pid}/root{self.path}")
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.enter: Sequence[str] = (nsenter, f"--target={self._holder.pid}", *user, "--mount", "--")

    def close(self) -> None:
        """Let go of it; the walls in it must have ended."""
        with self._holder:  # which closes its pipes and waits for its end
            self._holder.kill()
