"""A training run in which something is killed every few seconds, at random: what becomes of the groups.

The API (the real ``run-api``), two environment processes under ``hermes-atropos serve``, a trainer and a model server:
each time one of them is killed and started again, or the model server fails a stretch of requests. In the end every
group that an environment finished must have arrived once, wait on disk, or be named in the log. The last line printed
is one JSON object; the exit code is 1 where a group is lost or came twice, or a process is left.

    python benchmarks/serving.py [--kills 20] [--seed 0] [--short]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fleet import COMMAND, Fleet, Trainer
from wire import status

from hermes_atropos.environment.outbox import Event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="3 kills")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), 3 if options.short else options.kills, random.Random(options.seed))
    print(json.dumps(figures))
    sys.exit(bool(figures["twice"] or figures["lost"] or figures["processes_left"] or not figures["arrived"]))


def run(folder: Path, kills: int, rng: random.Random) -> dict[str, object]:
    happened: Counter[str] = Counter()
    drawn: list[dict[str, object]] = []
    with Fleet(folder) as fleet:
        serve = ["-c", COMMAND, "serve", "sums.py:Sums", "--processes", "2"]
        api, trainer, supervisor = fleet.api(), Trainer(fleet.url), fleet.start(*serve)
        fleet.wait_for(trainer, 2)
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 6))
            what = rng.choice(["api", "process", "environment", "trainer", "model"])
            happened[what] += 1
            if what == "api":
                fleet.kill(api)
                time.sleep(rng.uniform(0, 3))
                api = fleet.api()
            elif what == "process":
                running = children(supervisor.pid)
                if running:
                    os.kill(rng.choice(running), signal.SIGKILL)
            elif what == "environment":
                fleet.kill(supervisor, rng.choice([signal.SIGTERM, signal.SIGKILL]))
                supervisor = fleet.start(*serve)
            elif what == "trainer":
                trainer.stop()
                drawn += trainer.groups
                trainer = Trainer(fleet.url)
            else:
                fleet.model.faults += [status(500)] * rng.randint(1, 30)
            print(f"{sum(happened.values())}: {what}; {len(drawn) + len(trainer.groups)} groups arrived", flush=True)
        fleet.model.faults.clear()
        fleet.wait_for(trainer, 4)
        fleet.kill(supervisor, signal.SIGTERM)
        # Those of a supervisor that was killed send what they have.
        fleet.wait_until(lambda: working_in(folder) == [api.pid], "the end of all processes")
        trainer.stop()
        times = Counter(group["group_overrides"]["group_id"] for group in [*drawn, *trainer.groups])
        left = fleet.in_outbox()
        kept = {entry.id for entry in left if entry.state in {Event.READY, Event.SENDING}}
        queued = {entry.id for entry in left if entry.state is Event.TAKEN}
        named = set(re.findall("group ([0-9a-f]{32})", fleet.log))
        finished = set(fleet.finished)
    return {
        "finished": len(finished),
        "arrived": len(times),
        "twice": sum(count > 1 for count in times.values()),
        "lost": len(finished - set(times) - kept - queued - named),
        "kept": len(kept - set(times)),
        "queued": len(queued - set(times)),
        "named": len(named & finished - set(times)),
        "processes_left": len(working_in(folder)),
        **{f"killed_{what}": count for what, count in sorted(happened.items())},
    }


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def working_in(folder: Path) -> list[int]:
    """The processes whose current folder it is."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main()
