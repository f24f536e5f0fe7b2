"""A training run's folder: what was asked for, the checkpoints, and a line for each step.

settings.json       what was asked for when the run began
checkpoints/000012  the policy after 12 steps, the optimizer, and which groups were trained
drawn.json          the groups that the trainer has drawn and may not have trained yet
steps.jsonl         a line for each step
evaluations/        of held-out items, before and after
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["FAULT", "KEPT", "Run", "Settings", "write"]

#: The exit code with which the trainer says that what was recorded isn't what was sampled.
FAULT = 3

#: How many checkpoints stay.
KEPT = 3


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        engine: ``embedded`` or ``vllm``.
        checkpoint: the folder of the policy to begin with.
        steps: of the optimizer.
        rollouts: of a step.
        group_size: rollouts of an item.
        learning_rate: of the optimizer, Adam.
        clip: how far the importance ratio may be from 1.
        seed: says which items are trained on.
        evaluated: how many held-out items are rolled out before and after.
    """

    engine: str
    checkpoint: str
    steps: int
    rollouts: int
    group_size: int
    learning_rate: float
    clip: float
    seed: int
    evaluated: int


class Run:
    """A run in a folder that :meth:`begin` has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(**json.loads((folder / "settings.json").read_text()))

    @classmethod
    def begin(cls, folder: Path, settings: Settings) -> Run:
        """A new run, or the one that was begun there.

        Raises:
            SystemExit: it was begun with other settings.
        """
        asked = asdict(settings)
        if (folder / "settings.json").exists():
            run = cls(folder)
            others = [f"{name}={value}" for name, value in asdict(run.settings).items() if asked[name] != value]
            if others:
                raise SystemExit(
                    f"{folder} holds a run with {', '.join(others)}: ask for the same, or name another folder"
                )
            return run
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "settings.json", asked)
        run = cls(folder)
        run.keep(0, lambda new: shutil.copytree(settings.checkpoint, new, dirs_exist_ok=True), {"groups": []})
        return run

    @property
    def latest(self) -> Path:
        """The newest checkpoint."""
        return max(path for path in (self.folder / "checkpoints").iterdir() if path.name.isdecimal())

    @property
    def step(self) -> int:
        """How many steps were made."""
        return int(self.latest.name)

    @property
    def state(self) -> dict[str, Any]:
        """Of the newest checkpoint: ``groups``, the keys of those that were trained, and ``line``, that of its step."""
        state: dict[str, Any] = json.loads((self.latest / "state.json").read_text())
        return state

    def keep(self, step: int, save: Callable[[Path], Any], state: dict[str, Any]) -> None:
        """Write a checkpoint. It is there as a whole or not at all, and older ones than ``KEPT`` go."""
        folder = self.folder / "checkpoints"
        new = folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save(new)
        write(new / "state.json", state)
        new.rename(folder / f"{step:06}")
        for old in sorted(path for path in folder.iterdir() if path.name.isdecimal())[:-KEPT]:
            shutil.rmtree(old)

    def lines(self) -> list[dict[str, Any]]:
        """Those of the steps, in order."""
        path = self.folder / "steps.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, line: dict[str, Any]) -> None:
        """Add the line of a step, if it is not there."""
        if not any(known["step"] == line["step"] for known in self.lines()[-1:]):
            with (self.folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def write(path: Path, value: Any) -> None:
    """A JSON file that is there as a whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
