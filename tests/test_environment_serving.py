"""A serving environment beside the real ``run-api``, a trainer and a model server: a group arrives once or is named."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from fleet import COMMAND, ENVIRONMENT, Fleet, Trainer
from support import processes

from hermes_atropos.environment.outbox import Event
from hermes_atropos.exports.atropos import MASK


def check(fleet: Fleet, trainer: Trainer) -> None:
    """Nothing twice, everything as the server sampled it; what the trainer has not got is queued, kept or named.

    The environments must have ended.
    """
    waiting = httpx.get(f"{fleet.url}/status", trust_env=False).json()["queue_size"]
    times = Counter(trainer.ids)
    assert [name for name, count in times.items() if count > 1] == []
    assert [len(group["tokens"]) for group in trainer.groups] == [2] * len(trainer.groups)
    assert spans(trainer.groups) <= fleet.model.spans()
    kept = {entry.id for entry in fleet.in_outbox() if entry.state in {Event.READY, Event.SENDING}}
    missing = set(fleet.finished) - set(times) - kept - set(re.findall("group ([0-9a-f]{32}) of", fleet.log))
    assert len(missing) <= waiting, [(entry.state, entry.id) for entry in fleet.in_outbox() if entry.id in missing]


def spans(groups: list[dict[str, Any]]) -> set[Any]:
    found = set()
    for group in groups:
        for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
            start = sum(1 for _ in itertools.takewhile(lambda mask: mask == MASK, masks))
            assert MASK not in masks[start:], "the agent answers once"
            found.add((tuple(tokens[:start]), tuple(tokens[start:]), tuple(logprobs[start:])))
    return found


def test_groups_go_on_after_the_api_was_away(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        api, trainer = fleet.api(), Trainer(fleet.url)
        environment = fleet.environment()
        fleet.wait_for(trainer, 6)
        fleet.kill(api)
        fleet.wait_until_finished(3)  # rollouts go on
        api = fleet.api()
        fleet.wait_for(trainer, 6)
        fleet.kill(environment, signal.SIGTERM)
        assert environment.returncode == 0, fleet.log
        trainer.stop()
        check(fleet, trainer)
    assert processes() == {}


def test_a_killed_environment_is_followed_by_one_that_sends_what_it_had(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        api, trainer = fleet.api(), Trainer(fleet.url)
        environment = fleet.environment()
        fleet.wait_for(trainer, 4)
        fleet.kill(api)
        fleet.wait_until_finished(3)
        fleet.kill(environment)
        waiting = {entry.id for entry in fleet.in_outbox() if entry.state is Event.READY}
        assert len(waiting) >= 2
        fleet.api()
        environment = fleet.environment()
        fleet.wait_for(trainer, len(waiting) + 2)
        fleet.kill(environment, signal.SIGTERM)
        trainer.stop()
        check(fleet, trainer)
        assert waiting <= set(trainer.ids)


def test_an_environment_waits_for_api_and_trainer_to_start(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        environment = fleet.environment()
        fleet.api()
        fleet.wait_until(lambda: "waits for a trainer" in fleet.log)
        trainer = Trainer(fleet.url)
        fleet.wait_for(trainer, 4)
        fleet.kill(environment, signal.SIGTERM)
        trainer.stop()
        check(fleet, trainer)


def test_several_processes_share_the_items_and_one_that_dies_is_started_again(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.api()
        trainer = Trainer(fleet.url)
        supervisor = fleet.start(
            "-c", COMMAND, "serve", "sums.py:Sums", "--processes", "2", "--env.max_num_workers", "4"
        )
        fleet.wait_until(lambda: len(asking(fleet)) == 2, "two processes")
        victim = asking(fleet).pop()
        os.kill(victim, signal.SIGKILL)
        fleet.wait_until(lambda: len(asking(fleet) - {victim}) == 2, "a third process")
        fleet.wait_for(trainer, 4)
        fleet.kill(supervisor, signal.SIGTERM)
        assert supervisor.returncode == 0, fleet.log
        trainer.stop()
        check(fleet, trainer)
        assert "ended with exit code -9: it is started again in 1 s" in fleet.log
        parities = {(pid, number % 2) for pid, number in asked(fleet)}
        assert len(parities) == len(asking(fleet)), "each process has every second item"


def test_the_processes_of_a_killed_supervisor_end_as_with_a_sigterm(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.api()
        trainer = Trainer(fleet.url)
        supervisor = fleet.start("-c", COMMAND, "serve", "sums.py:Sums", "--processes", "2")
        fleet.wait_until(lambda: len(asking(fleet)) == 2, "two processes")
        fleet.kill(supervisor)
        fleet.wait_until(lambda: not any(map(running, asking(fleet))), "their end")
        assert fleet.log.count("POST /disconnect-env") == 2
        trainer.stop()
        check(fleet, trainer)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def asked(fleet: Fleet) -> set[tuple[int, int]]:
    """Which process asked the model for which item."""
    found = [question(fleet, tuple(request.body["prompt"])) for request in fleet.model.to("/v1/completions")]
    return {(int(match[2]), int(match[1])) for match in found if match}


@functools.cache
def question(fleet: Fleet, prompt: tuple[int, ...]) -> re.Match[str] | None:
    return re.search(r"What is (\d+) \+ 1\? \((\d+)\)", fleet.model.tokenizer.decode(prompt))


def asking(fleet: Fleet) -> set[int]:
    return {pid for pid, _ in asked(fleet)}


def test_a_process_that_cannot_start_is_given_up(tmp_path: Path) -> None:
    broken = ENVIRONMENT.replace("return AtroposAgent(", "raise ValueError('no agent today')\n        AtroposAgent(")
    with Fleet(tmp_path, broken) as fleet:
        script = f"import hermes_atropos.environment.launch as launch\nlaunch.TRIES = 2\n{COMMAND}"
        supervisor = fleet.start("-c", script, "serve", "sums.py:Sums", "--processes", "2")
        assert supervisor.wait(110) == 2
        assert "ended 2 times right after its start, at last with exit code 1" in fleet.log
        assert "no agent today" in fleet.log
