"""A process that has imported what nearly every test process needs, Hermes and this library aside, and forks for each.

It reads one job a line: the script, the folder, the environment, where to write, and after how many seconds to give up.
For each it writes a line with the exit code. Its own imports must call nobody and write nothing.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback

PACKAGES = [
    "anyio",
    "atroposlib.envs.base",
    "atroposlib.envs.server_handling.managed_server",
    "atroposlib.envs.server_handling.openai_server",
    "atroposlib.envs.server_handling.trl_vllm_server",
    "docstring_parser",
    "fastapi",
    "httpx",
    "hypothesis",
    "jsonschema",
    "openai.types.chat.completion_create_params",
    "prompt_toolkit",
    "pydantic",
    "pytest",
    "renderers",
    "rich.console",
    "tenacity",
    "tokenizers",
    "transformers.models.auto.tokenization_auto",
    "uvicorn",
]


def next_script() -> str:
    """Serve jobs until the input ends; returns in the child that is to run one."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            become(job)
            return str(job["script"])
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(job: dict[str, object]) -> None:
    """Be as a process that was started with this job."""
    signal.alarm(int(str(job["limit"])))
    os.chdir(str(job["cwd"]))
    os.environ.clear()
    os.environ.update(dict(job["environ"]))  # type: ignore[call-overload]
    sys.path[:1] = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = ["-c"]
    tempfile.tempdir = None  # it remembers the folder of another environment
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (str(job["stdout"]), os.O_WRONLY), (str(job["stderr"]), os.O_WRONLY)]
    ):
        os.dup2(os.open(path, flags), number)


def run(script: str) -> int:
    """The script's exit code, once its threads have ended and its exit functions have run."""
    code = 0
    try:
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    calls: list[str] = []
    sys.addaudithook(
        lambda event, _: calls.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None
    )
    for package in PACKAGES:
        importlib.import_module(package)
    if calls or os.listdir(os.environ["HOME"]):
        sys.exit(f"importing third parties called {calls} and wrote {os.listdir(os.environ['HOME'])}")
    # Freeing all that was imported would take half a second.
    os._exit(run(next_script()))
