"""Processes start as those of ``subprocess`` do."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hermes_atropos.hermes import spawn

BASH = "/bin/bash"


def run(popen: Any, script: str, **options: Any) -> tuple[str, int]:
    process = popen(
        [BASH, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **{"stdin": subprocess.DEVNULL, "text": True, **options},
    )
    output, _ = process.communicate(timeout=30)
    return output, process.returncode


@pytest.mark.parametrize(
    ("script", "options"),
    [
        pytest.param("echo out; echo err >&2; exit 7", {}, id="streams and exit code"),
        pytest.param("pwd", {"cwd": "/usr"}, id="folder"),
        pytest.param('echo "$NAME|$HOME"', {"env": {"NAME": "ä = b"}}, id="environment"),
        pytest.param("kill -9 $$", {}, id="killed"),
        pytest.param("trap; ( kill -PIPE $BASHPID; echo ignored ); ls /proc/self/fd", {}, id="signals and files"),
        pytest.param("[ $$ = $(ps -o sid= -p $$) ] && echo leads", {"start_new_session": True}, id="session"),
        pytest.param("[ $$ = $(ps -o sid= -p $$) ] && echo leads", {"preexec_fn": os.setsid}, id="old releases"),
        pytest.param("umask", {"umask": 0o27}, id="what it leaves to CPython"),
    ],
)
def test_the_same_as_subprocess(script: str, options: dict[str, Any]) -> None:
    assert run(spawn.Popen, script, **options) == run(subprocess.Popen, script, **options)


def test_input() -> None:
    process = spawn.Popen([BASH, "-c", "wc -c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.communicate("x" * 100_000)[0].strip() == "100000"


@pytest.mark.parametrize("options", [{"args": ["/no/such/program"]}, {"args": [BASH], "cwd": "/no/such/folder"}])
def test_what_cannot_start_raises_and_leaves_no_file_open(options: dict[str, Any]) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        spawn.Popen(stdout=subprocess.PIPE, **options)
    assert os.listdir("/proc/self/fd") == before


def test_a_session_can_be_ended(tmp_path: Path) -> None:
    process = spawn.Popen([BASH, "-c", "sleep 1000 & sleep 1000"], start_new_session=True, cwd=tmp_path)
    assert os.getpgid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL


def test_many_threads_at_once() -> None:
    with ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(lambda number: run(spawn.Popen, f"echo {number}"), range(100)))
    assert outputs == [(f"{number}\n", 0) for number in range(100)]
