"""A tiny model learns its errands in Hermes' own loop: the whole of reinforcement learning, with real parts, on a CPU.

An engine serves the policy, the environment rolls it out, Atropos' API hands the groups to the trainer, and that brings
new weights to the engine after each step. Each is a process. One that dies is started again. Ctrl-C ends all, and the
same command goes on with what is in the folder.

    python examples/learn/learn.py build/learn/run
    python examples/learn/learn.py build/learn/short --short     # less than ten minutes

Held-out items are rolled out before and after; the exit code is 0 if the reward has risen significantly.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import page
from engines import ENGINES, MODEL, Engine, command, environ, free_port
from processes import Gone, Process
from run import FAULT, Run, Settings

from hermes_atropos.embedded import MODEL as CHECKPOINT
from hermes_atropos.errors import SandboxUnavailableError
from hermes_atropos.sandbox.wall import try_wall

HERE = Path(__file__).resolve().parent

#: Seconds between two looks at the processes.
LOOK = 0.3

LONG = {"steps": 120, "evaluated": 192}
SHORT = {"steps": 24, "evaluated": 64}


def main() -> None:
    options = arguments()
    settings = Settings(
        engine=options.engine,
        checkpoint=str(Path(options.checkpoint).resolve()),
        steps=options.steps or (SHORT if options.short else LONG)["steps"],
        rollouts=options.rollouts,
        group_size=options.group_size,
        learning_rate=options.learning_rate,
        clip=0.2,
        seed=options.seed,
        evaluated=options.evaluated or (SHORT if options.short else LONG)["evaluated"],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with alone(options.folder), contextlib.suppress(KeyboardInterrupt):
        run = Run.begin(options.folder, settings)
        with tempfile.TemporaryDirectory(prefix="learn-", ignore_cleanup_errors=True) as scratch:
            sys.exit(Learning(run, Path(scratch)).through())
    sys.exit(f"stopped: the same command goes on with {options.folder}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the run is kept")
    parser.add_argument("--short", action="store_true", help="fewer steps and items")
    parser.add_argument("--engine", choices=ENGINES, default="embedded")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="the policy to begin with")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rollouts", type=int, default=32, help="of a step")
    parser.add_argument("--group-size", type=int, default=8, help="rollouts of an item")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=1, help="says which items are trained on")
    parser.add_argument("--evaluated", type=int, help="held-out items before and after")
    return parser.parse_args()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """
    Raises:
        SystemExit: another process works on the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process works on {folder}") from None
        yield


class Learning:
    """The processes of a run, phase by phase.

    Args:
        run: what was asked for, and how far it is.
        scratch: a folder for what the processes leave behind when they are killed.
    """

    def __init__(self, run: Run, scratch: Path) -> None:
        self._run, settings = run, run.settings
        self._ports = {name: free_port() for name in ("engine", "api")}
        self._engine_url, self._api_url = (f"http://127.0.0.1:{port}" for port in self._ports.values())
        self._scratch = {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        self._shown = len(run.lines())
        self._sandbox = "walled"
        try:
            try_wall()
        except SandboxUnavailableError as error:
            self._sandbox = "folder"
            print(f"rollouts can't be walled here, and run in folders: {error}", flush=True)
        self._engine = self._process(
            "engine", lambda: command(settings.engine, run.latest, self._ports["engine"]), environ(settings.engine)
        )

    def through(self) -> int:
        """Evaluate, train, evaluate again; 0 if the reward has risen significantly.

        Raises:
            KeyboardInterrupt: the user has had enough.
        """
        try:
            self._evaluate("before")
            if self._run.step < self._run.settings.steps:
                self._train()
            self._evaluate("after")
        except Gone as gone:
            print(gone, file=sys.stderr)
            return 1
        finally:
            self._engine.end()
        verdict = page.verdict(self._run)
        print(f"{verdict}\n{page.write(self._run)} has the curves", flush=True)
        return 0 if verdict.significant else 1

    def _evaluate(self, when: str) -> None:
        """Roll out held-out items, once each."""
        folder = self._run.folder / "evaluations" / when
        if (folder / "metrics.json").exists():
            return
        print(f"{self._run.settings.evaluated} held-out items {when} training", flush=True)
        self._await_engine()
        evaluation = self._environment("evaluate", "--env.data_dir_to_save_evals", str(folder), last=(0,))
        self._work(evaluation, [self._engine])

    def _train(self) -> None:
        run, python = self._run, sys.executable
        api = self._process(
            "api",
            lambda: [python, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(self._ports["api"])],
        )
        environment = self._environment("serve")
        trainer = self._process(
            "trainer",
            lambda: [python, str(HERE / "trainer.py"), str(run.folder), "--api", self._api_url,
                     "--engine", self._engine_url],
            last=(0, FAULT),
        )  # fmt: skip
        self._await_engine()
        self._work(trainer, [environment, api, self._engine])

    def _work(self, worker: Process, others: list[Process]) -> None:
        """See that all run until the worker is through; all but the engine are ended then.

        Raises:
            Gone: one can't be kept running, or the trainer has found a fault.
        """
        try:
            while (code := worker.watch()) is None:
                for process in others:
                    process.watch()
                self._show()
                time.sleep(LOOK)
        finally:
            for process in [worker, *others]:
                if process is not self._engine:
                    process.end()
        self._show()
        if code:
            raise Gone(worker.log.read_text(errors="replace").strip().rpartition("\n")[2])

    def _await_engine(self) -> None:
        self._engine.watch()
        Engine(self._run.settings.engine, self._engine_url).wait()

    def _process(
        self,
        name: str,
        command: Callable[[], list[str]],
        environ: dict[str, str] | None = None,
        last: tuple[int, ...] = (),
    ) -> Process:
        return Process(name, command, self._run.folder / f"{name}.log", {**self._scratch, **(environ or {})}, last)

    def _environment(self, what: str, *more: str, last: tuple[int, ...] = ()) -> Process:
        settings = self._run.settings
        asked = {
            "env.rollout_server_url": self._api_url,
            "env.outbox_path": str(self._run.folder / "outbox"),
            "env.tokenizer_name": settings.checkpoint,
            "env.group_size": str(settings.group_size),
            "env.batch_size": str(settings.rollouts),
            "env.total_steps": str(settings.steps),
            "env.seed": str(settings.seed),
            "env.eval_size": str(settings.evaluated),
            "env.sandbox": self._sandbox,
            "openai.base_url": f"{self._engine_url}/v1",
            "openai.model_name": MODEL,
        }
        given = [part for name, value in asked.items() for part in (f"--{name}", value)]
        start = [sys.executable, str(HERE / "environment.py"), what, *given, *more]
        return self._process("environment" if what == "serve" else "evaluation", lambda: start, last=last)

    def _show(self) -> None:
        """A line on the terminal for each step that is new, and the page."""
        lines = self._run.lines()
        for line in lines[self._shown :]:
            print(page.in_words(line), flush=True)
        if lines[self._shown :]:
            page.write(self._run)
        self._shown = len(lines)


if __name__ == "__main__":
    main()
