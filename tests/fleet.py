"""Everything that a training run is made of, each in a process of its own: the API, the environment, trainer and model.

The trainer and the model server run here, on threads, and keep records. The API is Atropos' own ``run-api``.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
from aiohttp import web
from support import LIMIT, script_environ
from wire import VLLMWire

from hermes_atropos.environment.outbox import Entry, Journal
from hermes_atropos.testing import chatml_tokenizer

#: Runs the command line as ``hermes-atropos`` does.
COMMAND = "from hermes_atropos.cli import main; raise SystemExit(main())"

#: An environment of sums for the small agent. Each group that it finishes is noted before it goes to the outbox.
ENVIRONMENT = '''
import itertools, os, sys
from atroposlib.envs.base import APIServerConfig
from hermes_atropos import AgentConfig, AtroposAgent, HermesEnv, HermesEnvConfig, StockVLLMServer

class Sums(HermesEnv):
    name = "sums"
    server_cls = StockVLLMServer

    @classmethod
    def config_init(cls):
        config = HermesEnvConfig(
            tokenizer_name="tokenizer", group_size=2, rollout_server_url=os.environ["API"], total_steps=10**6,
            max_batches_offpolicy=50, ensure_scores_are_not_same=False, max_num_workers=8,
            sandbox="folder",
        )
        return config, [APIServerConfig(base_url=os.environ["MODEL"] + "/v1", model_name="tests/chatml")]

    def items(self):
        return itertools.count()

    def make_agent(self):
        return AtroposAgent(self.server, tools=[add], tokenizer=self.tokenizer, config=AgentConfig(temperature=1.0))

    def prompt(self, item):
        return f"What is {item} + 1? ({os.getpid()})"

    async def verify(self, item, task, result):
        return float(str(item + 1) in result.final_response)

    async def _send_scored_data_to_api(self, groups):
        with open("finished", "a") as file:
            file.write(groups["group_overrides"]["group_id"] + "\\n")
        await super()._send_scored_data_to_api(groups)

def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

if __name__ == "__main__":
    Sums.cli()
'''


class Model(VLLMWire):
    """A model server whose answers differ from prompt to prompt; it can be away for a while."""

    async def sample(self, request: web.Request, prompt_ids: list[int], *how: Any) -> None:
        self.reply = f"It is {sum(prompt_ids) % 1000}."
        await super().sample(request, prompt_ids, *how)

    def spans(self) -> set[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
        """(prompt, answer, logprobs) of all that was sampled."""
        return {
            (tuple(record.body["prompt"]), tuple(ids), tuple(logprobs))
            for record in list(self.requests)
            for ids, logprobs, _ in record.sampled
        }


class Trainer(threading.Thread):
    """Registers with the API, again whenever that has forgotten it, and takes batches."""

    def __init__(self, url: str, batch_size: int = 4) -> None:
        super().__init__(name="trainer", daemon=True)
        self._url, self._batch_size = url, batch_size
        self.groups: list[dict[str, Any]] = []
        self.stopping = threading.Event()
        self.start()

    @property
    def ids(self) -> list[str]:
        """Of the groups that it got, in order."""
        return [group["group_overrides"]["group_id"] for group in self.groups]

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10, trust_env=False) as client:
            batch: Any = None
            while batch or not self.stopping.wait(0.02):
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/info").json()["batch_size"] == -1:
                        client.post("/register", json=self._registration()).raise_for_status()
                    batch = client.get("/batch").json().get("batch")
                    self.groups += batch or []

    def stop(self) -> None:
        """Draw what the API has, and end."""
        self.stopping.set()
        self.join(LIMIT)

    def _registration(self) -> dict[str, Any]:
        numbers = {"batch_size": self._batch_size, "max_token_len": 100_000, "save_checkpoint_interval": 0}
        names = {"wandb_group": "group", "wandb_project": "project", "checkpoint_dir": ""}
        return {**names, **numbers, "starting_step": 0, "num_steps": 1}


class Fleet:
    """The API, the environment and whoever else, in a folder; ``with`` ends all of them."""

    def __init__(self, folder: Path, code: str = ENVIRONMENT) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.running: list[subprocess.Popen[bytes]] = []
        self.model = Model()
        (folder / "sums.py").write_text(code)
        chatml_tokenizer().save_pretrained(folder / "tokenizer")

    def __enter__(self) -> Self:
        self.model.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            self.kill(process)
        self.model.__exit__()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments; what it says goes to ``log``."""
        environ = script_environ(self.folder, API=self.url, MODEL=self.model.url)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=self.folder, env=environ, stdout=log, stderr=log
            )
        self.running.append(process)
        return process

    def api(self) -> subprocess.Popen[bytes]:
        return self.start("-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(self.port))

    def environment(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start("sums.py", "serve", *arguments)

    def kill(self, process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
        """End a process; it is gone when this returns."""
        process.send_signal(how)
        process.wait(LIMIT)

    @property
    def finished(self) -> list[str]:
        """The ids of the groups that environments have finished."""
        path = self.folder / "finished"
        return path.read_text().split() if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def in_outbox(self) -> list[Entry]:
        """What the files that processes have left say; their processes must have ended."""
        found = []
        for path in sorted((self.folder / "outbox").iterdir()):
            journal = Journal(path)
            found += journal.entries().values()
            journal.close()
        return found

    def wait_until(self, condition: Callable[[], bool], what: str = "it", within: float = 60) -> None:
        """Until a condition holds, for so many seconds at most."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.log[-5000:]}"
            time.sleep(0.02)

    def wait_for(self, trainer: Trainer, count: int) -> None:
        """Until the trainer has so many more groups than now."""
        goal = len(trainer.groups) + count
        self.wait_until(lambda: len(trainer.groups) >= goal, f"a trainer with {goal} groups")

    def wait_until_finished(self, count: int) -> None:
        """Until environments have finished so many more groups than now."""
        goal = len(self.finished) + count
        self.wait_until(lambda: len(self.finished) >= goal, f"{goal} finished groups")
