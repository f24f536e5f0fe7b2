"""The examples, run as a user runs them: in a process of their own, in a folder of their own."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pseudoterminal import PseudoTerminal
from support import forked

from hermes_atropos.trajectory import read_records

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


#: Run by the interpreter before an example: whoever looks for a host, or calls one that is not this machine, is noted.
WATCH = """
import os, sys

def watch(event, about):
    if event == "socket.getaddrinfo" or event in ("socket.connect", "socket.sendto") and isinstance(about[1], tuple):
        host = about[0] if event == "socket.getaddrinfo" else about[1][0]
        if host not in ("127.0.0.1", "localhost"):
            with open(os.environ["CALLED"], "a") as called:
                print(event, about, file=called)

sys.addaudithook(watch)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a user who has just installed the library: a home of their own, nothing set."""
    (tmp_path / "home").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")]),
        "CALLED": str(tmp_path / "called"),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def run(example: str | Path, *arguments: str, cwd: Path, env: dict[str, str]) -> str:
    """What the example prints, if it ends well."""
    path = str(EXAMPLES / example)
    watch = Path(env["PYTHONPATH"].split(os.pathsep)[1], "sitecustomize.py")
    script = f"import runpy, sys; runpy.run_path({str(watch)!r}); sys.argv = {[path, *arguments]!r}; "
    script += f"sys.path[0] = {str(EXAMPLES)!r}; runpy.run_path({path!r}, run_name='__main__')"
    done = forked(script, cwd, 100, env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_nobody_called(env: dict[str, str]) -> None:
    assert not Path(env["CALLED"]).exists(), Path(env["CALLED"]).read_text()


def assert_private(env: dict[str, str]) -> None:
    """The training profile was used: nobody was called, and the user's home was not touched."""
    assert_nobody_called(env)
    assert os.listdir(env["HOME"]) == []


def test_the_watch_notes_calls(folder: Path, environment: dict[str, str]) -> None:
    script = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, timeout=100)
    with pytest.raises(AssertionError, match=r"192\.0\.2\.1"):
        assert_nobody_called(environment)


# ── The drop-in ──────────────────────────────────────────────────────────────────────────────────────────────────────

COMMAND = "cat *.py | wc -l | tee lines.txt"


@pytest.fixture
def endpoint() -> Iterator[str]:
    """An OpenAI-compatible endpoint on loopback, whose model says what that of ``script_atropos.py`` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            message: dict[str, Any] = {"role": "assistant", "content": "It is in lines.txt."}
            if request["messages"][-1]["role"] == "user":
                function = {"name": "terminal", "arguments": json.dumps({"command": COMMAND})}
                call = {"index": 0, "id": "call_1", "type": "function", "function": function}
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
            finish_reason = "tool_calls" if message["content"] is None else "stop"
            answer = {"id": "1", "created": 0, "model": "local", "object": "chat.completion"}
            if request.get("stream"):
                choice = {"index": 0, "delta": message, "finish_reason": finish_reason}
                chunk = answer | {"object": "chat.completion.chunk", "choices": [choice]}
                self.answer("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
            else:
                choice = {"index": 0, "message": message, "finish_reason": finish_reason}
                self.answer("application/json", json.dumps(answer | {"choices": [choice]}))

        def do_GET(self) -> None:
            models = {"object": "list", "data": [{"id": "local", "object": "model"}]}
            self.answer("application/json", json.dumps(models)) if self.path == "/v1/models" else self.send_error(404)

        def answer(self, kind: str, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_the_import_and_the_server_change() -> None:
    stock, ours = (
        (EXAMPLES / name).read_text().split('"""', 2)[2].splitlines()
        for name in ("script_stock.py", "script_atropos.py")
    )
    differing = [line for line in difflib.ndiff(stock, ours) if line[0] in "-+" and line[2:].strip()]
    assert [
        line for line in differing if not any(word in line for word in ("import ", "server", "base_url", "api_key"))
    ] == []
    assert sum("AIAgent" in line for line in differing) == 2, "the import of the agent, before and after"


@pytest.mark.parametrize("script", ["script_stock.py", "script_atropos.py"])
def test_the_scripts_do_the_same(script: str, folder: Path, environment: dict[str, str], endpoint: str) -> None:
    (folder / "a.py").write_text("x = 1\ny = 2\n")
    printed = run(script, cwd=folder, env=environment | {"OPENAI_BASE_URL": endpoint, "OPENAI_API_KEY": "none"})
    assert printed.strip().splitlines()[-1] == "It is in lines.txt."
    assert (folder / "lines.txt").read_text().strip() == "2"
    if script == "script_atropos.py":
        assert_nobody_called(environment)
    assert (folder.parent / "home" / ".hermes").is_dir(), (
        "a script without the training profile uses the user's Hermes home"
    )


def test_for_a_local_model_the_import_alone_changes(
    folder: Path, environment: dict[str, str], endpoint: str, tmp_path: Path
) -> None:
    script = (EXAMPLES / "script_stock.py").read_text()
    ours = "from hermes_atropos import AtroposAIAgent as AIAgent"
    (tmp_path / "script.py").write_text(script.replace("from run_agent import AIAgent", ours))
    (folder / "a.py").write_text("x = 1\n")
    env = environment | {"OPENAI_BASE_URL": endpoint, "OPENAI_API_KEY": "none"}
    assert run(tmp_path / "script.py", cwd=folder, env=env).strip().splitlines()[-1] == "It is in lines.txt."
    assert (folder / "lines.txt").read_text().strip() == "1"


# ── The chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_chat_stays_responsive_and_ctrl_c_interrupts_the_agent(folder: Path, environment: dict[str, str]) -> None:
    with PseudoTerminal([sys.executable, str(EXAMPLES / "chat_app.py")], cwd=folder, env=environment) as terminal:
        terminal.wait_for("you:")
        terminal.type("hello\r")
        terminal.wait_for("agent: You said 'hello'.")

        terminal.wait_for("Ctrl-D leaves")
        terminal.type("think\r")
        terminal.wait_for("Ctrl-C interrupts: ")
        terminal.type("I can still type")
        terminal.wait_for("you: I can still type")
        assert "Ctrl-C interrupts" in terminal.screen.text, "the model still thinks"
        terminal.type("\x03")
        terminal.wait_for("(interrupted)")

        terminal.wait_for("Ctrl-D leaves")
        terminal.type("sleep\r")
        terminal.wait_for("Ctrl-C interrupts: terminal {'command': 'sleep 600'}")
        terminal.type("\x03")
        terminal.wait_for("(interrupted)", times=2)

        terminal.wait_for("Ctrl-D leaves")
        terminal.type("and on it goes\r")
        terminal.wait_for("agent: You said 'and on it goes'.")
        terminal.wait_for("Ctrl-D leaves")
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    assert_private(environment)


# ── The asyncio program, the environment, the demo ───────────────────────────────────────────────────────────────────


def test_the_asyncio_program_scores_its_rollouts(folder: Path, environment: dict[str, str]) -> None:
    lines = run("asyncio_program.py", cwd=folder, env=environment).splitlines()
    assert [re.sub(r"\d+ tokens, \d+", "N tokens, M", line) for line in lines] == [
        "score 1.0: N tokens, M of them sampled"
    ] * 3
    assert os.listdir(folder) == [], "each rollout acted in a sandbox of its own"
    assert_private(environment)


def test_the_environments_groups_carry_logprobs(folder: Path, environment: dict[str, str]) -> None:
    run("environment.py", "process", "--env.total_steps", "2", "--env.use_wandb", "false", cwd=folder, env=environment)
    groups = [json.loads(line) for line in (folder / "data" / "sums.jsonl").read_text().splitlines()]
    assert len(groups) == 2
    for group in groups:
        assert sorted(group["scores"]) == [0.0, 0.0, 1.0, 1.0]
        assert len(group["tokens"]) == len(group["masks"]) == len(group["inference_logprobs"]) == 4
        for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
            assert len(tokens) == len(masks) == len(logprobs)
            sampled = [place for place, mask in enumerate(masks) if mask != -100]
            assert sampled
            assert [masks[place] for place in sampled] == [tokens[place] for place in sampled]
            assert all(logprobs[place] < 0 for place in sampled)
    assert_private(environment)


def test_the_demo_shows_a_group_of_rollouts(folder: Path, environment: dict[str, str]) -> None:
    printed = run("demo.py", cwd=folder, env=environment)
    records = list(read_records(folder / "build" / "demo.jsonl"))
    assert len(records) == 8
    sampled = [sum(sequence.trainable for sequence in record.sequences) for record in records]
    for number, record in enumerate(records):
        malformed = sum(call.error is not None for step in record.steps for call in step.tool_calls)
        row = [number, record.metadata["score"], record.num_steps, malformed, record.total_tokens, sampled[number]]
        assert re.search("^ *" + " +".join(map(str, row)) + f" +{len(record.sequences)} ", printed, re.M)
    mean = sum(record.metadata["score"] for record in records) / 8
    [chosen] = re.findall(r"Rollout (\d), read aloud", printed)
    calls = [call for step in records[int(chosen)].steps for call in step.tool_calls]
    for expected in [
        f"Mean score {mean:.2f}",
        *[f"calls {call.name} {{" if call.error is None else f"calls, malformed: {call.raw!r}" for call in calls],
        "the tokens of all 8 rollouts are those in the model's own books",
        f"{sum(sampled)} tokens were sampled: each is trainable exactly once",
        "The records are in build/demo.jsonl; build/demo/index.html shows them",
    ]:
        assert expected in printed
    assert all(f'href="{number}.html"' in (folder / "build/demo/index.html").read_text() for number in range(8))
    assert_private(environment)
