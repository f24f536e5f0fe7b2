"""What Hermes looks up again for each rollout or command, with the same answer and less work.

Each function stands in place of one of Hermes' (see ``seams.WRAPPED``), and is called with the acting agent and the
original.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["approvals", "configuration", "path", "project"]

#: A folder with more entries than this is not listed to the end.
SHORT = 1000


def configuration(agent: Hooks, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The user's configuration, for the caller to change; Hermes' own copy of it takes four times as long."""
    from hermes_cli.config import load_config_readonly

    copied: dict[str, Any] = _copied(load_config_readonly())
    return copied


def _copied(value: Any) -> Any:
    """What YAML says, anew: of its kinds of values only these two can be changed in place."""
    if type(value) is dict:
        return {name: _copied(part) for name, part in value.items()}
    return [_copied(part) for part in value] if type(value) is list else value


def approvals(agent: Hooks, original: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the configuration says of approvals: before 0.20, Hermes copied all of it twice a command to read this."""
    from hermes_cli.config import load_config_readonly

    with contextlib.suppress(Exception):  # Hermes' own says what is wrong
        return load_config_readonly().get("approvals") or {}
    return original()


def path(agent: Hooks, original: Callable[[str], str], existing_path: str) -> str:
    """A PATH with Hermes' own folders. From 0.22 it looks them all up for each command, most of a turn's time."""
    return _completed(original, existing_path)


@functools.lru_cache(maxsize=64)
def _completed(original: Callable[[str], str], existing_path: str) -> str:
    return original(existing_path)


def project(agent: Hooks, original: Callable[[Path], Path | None], cwd: Path) -> Path | None:
    """The project that a folder is in: after each command Hermes looks for 22 files in each of up to 7 folders.

    Where none of the folders lists one there is nothing to look for. The folder of temporary files, which may be long,
    is never a project.
    """
    folder, temporary = cwd.resolve(), Path(tempfile.gettempdir()).resolve()
    with contextlib.suppress(OSError):
        if not any(_may_be_a_project(above) for above in (folder, *folder.parents)[:7] if above != temporary):
            return None
    return original(cwd)


def _may_be_a_project(folder: Path) -> bool:
    from agent.coding_context import _PROJECT_MARKERS

    with os.scandir(folder) as entries:
        names = {entry.name for entry in itertools.islice(entries, SHORT)}
    return len(names) == SHORT or not names.isdisjoint(_PROJECT_MARKERS)
