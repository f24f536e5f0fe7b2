"""The processes of many sandboxes, ended at the same time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from support import LIMIT, until

from hermes_atropos.sandbox import processes
from hermes_atropos.sandbox.processes import MARKER, kill_processes


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test has started, which ends with it."""
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for process in begun:
        process.kill()
        process.wait()


def marked(mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"], env={**os.environ, MARKER: mark})


def is_killed(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(LIMIT) == -signal.SIGKILL
    return False


class TestOneLookForMany:
    def test_who_waits_is_served_by_the_same_look(
        self, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marks = [uuid.uuid4().hex for _ in range(20)]
        started += map(marked, marks)
        listed, looks = processes.running, []

        def counted() -> set[str]:
            looks.append(None)
            until(
                lambda: len(looks) > 1 or len(processes._searches) == len(marks)
            )  # the first waits for all the others
            return listed()

        monkeypatch.setattr(processes, "running", counted)
        threads = [threading.Thread(target=kill_processes, args=(mark, None)) for mark in marks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert all(map(is_killed, started))
        assert len(looks) == 4, "one look for the first, one for all the others, of two listings each"

    def test_who_comes_soon_after_a_look_shares_the_next(
        self, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marks = [uuid.uuid4().hex for _ in range(5)]
        started += map(marked, marks)
        listed, looks = processes.running, []

        def counted() -> set[str]:
            looks.append(None)
            return listed()

        monkeypatch.setattr(processes, "running", counted)
        monkeypatch.setattr(processes, "_next_look", time.monotonic() + 1.0)
        threads = [threading.Thread(target=kill_processes, args=(mark, None)) for mark in marks]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda number=number: len(processes._searches) == number)
        for thread in threads:
            thread.join(LIMIT)
        assert all(map(is_killed, started))
        assert len(looks) == 2, "one look, of two listings"

    def test_who_has_nothing_left_does_not_wait_for_another_s(
        self, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        restless, quiet = (processes.Search(uuid.uuid4().hex.encode(), None) for _ in range(2))
        processes._searches.extend([restless, quiet])
        started.append(marked(quiet.mark.decode()))
        listed = processes.running

        def with_another() -> set[str]:
            """Each listing has a process of the restless one that the last has not."""
            started.append(marked(restless.mark.decode()))
            return listed()

        monkeypatch.setattr(processes, "running", with_another)
        assert not processes.look([restless, quiet])
        assert (restless.done, quiet.done) == (False, True)
        monkeypatch.undo()
        assert processes.look([restless])
        assert restless.done
        assert all(map(is_killed, started))

    def test_what_begins_during_a_look_is_looked_for_at_once(
        self, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What spawns faster than it is looked for would never be gone."""
        mark = uuid.uuid4().hex
        listed, sleep, looks, waits, here = processes.running, time.sleep, [], [], threading.get_ident()

        def with_another() -> set[str]:
            looks.append(None)
            if len(started) < 5:
                started.append(marked(mark))
            return listed()

        def slept(seconds: float) -> None:
            if threading.get_ident() == here:
                waits.append(seconds)
            sleep(seconds)

        monkeypatch.setattr(processes, "running", with_another)
        monkeypatch.setattr(processes, "_next_look", 0.0)
        monkeypatch.setattr(time, "sleep", slept)
        kill_processes(mark, None)
        monkeypatch.undo()
        assert all(map(is_killed, started))
        assert len(looks) == 6, "two looks found one that had begun, the third none; of two listings each"
        assert max(waits) <= 0.001, "but for those that end"

    def test_a_part_of_a_sandbox_and_the_whole(self, started: list[subprocess.Popen[bytes]]) -> None:
        mark = uuid.uuid4().hex
        started += [marked(mark), marked(f"{mark}.check"), marked(f"{mark}.other"), marked(f"{mark}0")]
        itself, part, other, stranger = started
        kill_processes(f"{mark}.check", None)
        assert is_killed(part)
        assert [process.poll() for process in (itself, other, stranger)] == [None, None, None]
        kill_processes(mark, None)
        assert is_killed(itself)
        assert is_killed(other)
        assert stranger.poll() is None
