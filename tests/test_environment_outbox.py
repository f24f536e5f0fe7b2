"""The outbox: what is on disk at any moment of its writing, and what a next process makes of it."""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
from support import run_script

from hermes_atropos.environment.outbox import Entry, Event, Journal, Outbox
from hermes_atropos.errors import ConfigurationError, RecordError

GROUP: dict[str, Any] = {"tokens": [[1, 2]], "scores": [1.0], "group_overrides": {"group_id": "a"}}


def states(folder: Path) -> dict[str, Event]:
    """What all files of a folder say, which nobody may hold."""
    found: dict[str, Event] = {}
    for path in sorted(folder.iterdir()):
        journal = Journal(path)
        found |= {entry.id: entry.state for entry in journal.entries().values()}
        journal.close()
    return found


def finished(outbox: Outbox, name: str) -> Entry:
    entry = outbox.began(name, {"item": name})
    outbox.ready(entry, [GROUP])
    return entry


def test_a_group_waits_until_it_is_drawn_and_then_leaves_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "sums")
    entry = finished(outbox, "a")
    assert list(outbox.waiting) == [entry]
    outbox.note(entry, Event.SENDING)
    outbox.note(entry, Event.TAKEN)
    outbox.note(entry, Event.DRAWN)
    outbox.close()
    assert list(tmp_path.iterdir()) == []


def test_the_next_process_goes_on_with_what_one_has_left(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "sums")
    outbox.began("cut", 1)
    finished(outbox, "first")
    finished(outbox, "second")
    outbox.note(finished(outbox, "doubtful"), Event.SENDING)
    outbox.note(finished(outbox, "queued"), Event.TAKEN)
    outbox.note(finished(outbox, "drawn"), Event.DRAWN)
    outbox.close()
    after = Outbox(tmp_path, "sums")
    assert [entry.id for entry in after.waiting] == ["first", "second"]
    assert [entry.groups for entry in after.waiting] == [[GROUP], [GROUP]]
    assert [entry.id for entry in after.doubtful] == ["doubtful"]
    assert [entry.id for entry in after.queued] == ["queued"]
    assert [(entry.id, entry.item) for entry in after.cut] == [("cut", "1")]
    after.close()


def test_a_file_that_a_living_process_holds_is_left_to_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "sums")
    finished(outbox, "a")
    other = Outbox(tmp_path, "sums")
    assert list(other.waiting) == []
    other.close()
    outbox.close()


def test_another_environments_groups_are_left_to_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "sums")
    finished(outbox, "a")
    outbox.close()
    other = Outbox(tmp_path, "products")
    assert list(other.waiting) == []
    other.close()


def test_what_was_refused_is_kept_and_not_taken_over(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "sums")
    outbox.note(finished(outbox, "a"), Event.REFUSED, why="too long")
    outbox.close()
    after = Outbox(tmp_path, "sums")
    assert not after.waiting
    after.close()
    [kept] = tmp_path.iterdir()
    assert kept.suffix == ".kept"
    assert '"why":"too long"' in kept.read_text()


@pytest.mark.parametrize("cut", [1, 10, 28])
def test_a_torn_last_line_never_happened(tmp_path: Path, cut: int) -> None:
    outbox = Outbox(tmp_path, "sums")
    finished(outbox, "a")
    outbox.note(finished(outbox, "b"), Event.SENDING)
    outbox.close()
    [path] = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - cut)
    after = Outbox(tmp_path, "sums")
    assert [entry.id for entry in after.waiting] == ["a", "b"]
    after.note(after.waiting[0], Event.SENDING)
    after.close()
    assert states(tmp_path) == {"a": Event.SENDING, "b": Event.READY}


def test_a_damaged_line_names_itself(tmp_path: Path) -> None:
    (tmp_path / "sums-1-a.jsonl").write_text('{"event":"began","id":"a","item":"1"}\n{"event":"perhaps","id":"a"}\n')
    with pytest.raises(RecordError, match="line 2 is damaged"):
        Outbox(tmp_path, "sums")


def test_a_folder_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="outbox_path"):
        Outbox(tmp_path / "file", "sums")


#: One process of an environment: it sends what an earlier one left, and then four groups. What the API got is in a
#: file. It is killed in the n-th line that the outbox or the delivery runs; it ends by itself if there are fewer.
PROCESS = """
import asyncio, os, signal, sys
from hermes_atropos.environment import delivery, outbox
from hermes_atropos.environment.delivery import Delivery
from hermes_atropos.environment.outbox import Event, Outbox

class Api:
    url = "http://nowhere"

    async def register(self, **environment):
        return {"env_id": 0}

    async def trainer(self):
        return {"batch_size": 4}

    async def status(self, env_id):
        return {"self_queue_size": 0, "current_step": 1}

    async def latest(self):
        lines = open("got").read().splitlines() if os.path.exists("got") else []
        return {"group_overrides": {"group_id": lines[-1]} if lines else None}

    async def send(self, groups, env_id):
        with open("got", "a") as file:
            file.write(groups[0]["group_overrides"]["group_id"] + "\\n")

    async def leave(self, env_id): ...
    async def close(self): ...

async def main():
    box = Outbox("outbox", "sums")
    for entry in box.cut + box.queued:
        with open("named", "a") as file:
            file.write(entry.id + "\\n")
        box.note(entry, Event.FAILED)
    sender = Delivery(Api(), box, {})
    await sender.register()
    sending = asyncio.create_task(sender.run())
    for number in range(4):
        name = f"{os.getpid()}-{number}"
        entry = box.began(name, number)
        with open("finished", "a") as file:
            file.write(name + "\\n")
        box.ready(entry, [{"tokens": [[1]] * 50, "group_overrides": {"group_id": name}}])
    while box.waiting or box.doubtful:
        assert not sending.done(), sending.result()
        await asyncio.sleep(0)
    await sender.status()
    sending.cancel()
    box.close()

delivery.PAUSE = 0
left = AT_LINE

def trace(frame, event, argument):
    if frame.f_code.co_filename not in (outbox.__file__, delivery.__file__):
        return None
    def lines(frame, event, argument):
        global left
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return lines
    return lines

import threading
threading.settrace(trace)
sys.settrace(trace)
asyncio.run(main())
print(AT_LINE - left)
"""


def run_forked(script: str, folder: Path) -> int:
    """The exit code of a script that a fork of this process runs, which has imported what it needs."""
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        try:
            exec(compile(script, "<process>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_line_nothing_is_sent_twice_and_what_is_not_sent_is_known(tmp_path: Path) -> None:
    """From a small process: forks of one that holds a test suite are slow."""
    script = "from pathlib import Path; from test_environment_outbox import go_through; go_through(Path.cwd())"
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr


def go_through(where: Path) -> None:
    """Each seventh line: one process is killed there, and another goes on."""
    got_before_the_end = set()
    for line in itertools.count(1, 7):
        folder = where / str(line)
        folder.mkdir()
        ended = run_forked(PROCESS.replace("AT_LINE", str(line)), folder)
        before = lines_of(folder / "got")
        assert run_forked(PROCESS.replace("AT_LINE", "-1"), folder) == 0
        got = lines_of(folder / "got")
        assert len(got) == len(set(got)), "nothing twice"
        unknown = {name for name, state in states(folder / "outbox").items() if state is Event.UNKNOWN}
        named = unknown | set(lines_of(folder / "named"))
        assert set(lines_of(folder / "finished")) - set(got) <= named
        assert len(unknown) <= 1
        got_before_the_end.add(len(before))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert got_before_the_end == {0, 1, 2, 3, 4}, "it was killed everywhere"


def lines_of(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
