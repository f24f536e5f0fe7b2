"""An environment whose rollouts run on a Ray cluster of this machine: as without one; an actor may die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fleet import COMMAND, Fleet, Trainer
from test_environment_serving import asked, asking, check, running

from hermes_atropos.trajectory import read_records

#: Seconds for which a cluster may take to start an actor on a busy machine.
STARTS = 150

#: Groups that two actors may be at when they are ended: any of them may not have asked by then, the latest or not.
UNDER_WAY = 16

SERVE = ("-c", COMMAND, "serve", "sums.py:Sums", "--ray", "local")


def test_actors_roll_out_and_one_that_dies_is_started_again(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.api()
        trainer = Trainer(fleet.url)
        driver = fleet.start(*SERVE, "--processes", "2", "--cores", "0.5", "--env.records_path", "records.jsonl")
        fleet.wait_until(lambda: len(asking(fleet)) == 2, "two actors", STARTS)
        assert driver.pid not in asking(fleet)
        victim = asking(fleet).pop()
        os.kill(victim, signal.SIGKILL)
        fleet.wait_until(lambda: len(asking(fleet) - {victim}) == 2, "a third actor", STARTS)
        fleet.wait_for(trainer, 4)
        fleet.kill(driver, signal.SIGTERM)
        assert driver.returncode == 0, fleet.log
        fleet.wait_until(lambda: not any(map(running, asking(fleet))), "the actors' end")
        trainer.stop()
        check(fleet, trainer)
        assert "came to nothing" not in fleet.log, "what the dead actor rolled out was rolled out again"
        items = {number for _, number in asked(fleet)}
        assert len(set(range(max(items))) - items) <= UNDER_WAY, "each item is handed out"
        groups = {record.metadata["group"] for record in read_records(tmp_path / "records.jsonl")}
        assert set(trainer.ids) <= groups


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "1000"], "1000 actors of 1 cores are asked for, and the Ray cluster has cores for"),
        (["--processes", "0"], "--processes 0: give 1 or more"),
        (["--cores", "0"], "--cores 0: give more than 0"),
    ],
)
def test_a_cluster_that_is_too_small_is_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        driver = fleet.start(*SERVE, *arguments)
        assert driver.wait(120) == 2
        assert words in fleet.log
