"""README and docs: every snippet runs, every command exists, every link leads somewhere, and every list is complete."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import run_agent
from atroposlib.envs.base import APIServerConfig
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from support import script_environ
from tiny_llama import write_llama

from hermes_atropos import cli, settings
from hermes_atropos.environment import HermesEnvConfig
from hermes_atropos.exports import EXPORTS
from hermes_atropos.hermes import releases, seams
from hermes_atropos.proxy import Proxy
from hermes_atropos.servers import PROTOCOLS
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.tokens import BreakCause
from hermes_atropos.toolcalls import FORMATS, ParseStatus
from hermes_atropos.trajectory import StopReason

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "compat" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of code, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(block: str) -> list[str]:
    return [line.split("#")[0].strip() for line in block.splitlines()]


def named(page: str) -> set[str]:
    """What a page names in backquotes."""
    return set(re.findall(r"`([A-Za-z_]+)`", (ROOT / page).read_text()))


COMMANDS = sorted(
    {
        (str(page.relative_to(ROOT)), command)
        for page in PAGES
        for language, block in blocks(page)
        if language == "bash"
        for command in commands(block)
    }
)


# ── Following a page from top to bottom ──────────────────────────────────────────────────────────────────────────────


def model(messages: list[dict[str, str]]) -> str:
    """Does what the pages' users ask for."""
    match messages[-1]["content"]:
        case "How many lines of Python are in this folder?":
            return tool_call("terminal", command="cat *.py | wc -l")
        case "Make the tests pass.":
            return tool_call("terminal", command="echo 42 > answer.txt")
        case "What is 2 + 3?":
            return tool_call("add", a=2, b=3)
        case said:
            return f"I heard {said!r}."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of whoever follows a page; in ``repo`` is something to repair."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    (tmp_path / "script.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "Makefile").write_text("test:\n\tgrep -qx 42 answer.txt\n")
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def names(folder: Path) -> dict[str, Any]:
    """What the snippets of a page are given, and what they define."""
    judge = 'grep -qx 42 "$WORKSPACE/answer.txt"'
    given = {"repo": str(folder / "repo"), "judge": judge}
    return {"server": ScriptedServer(model), "tokenizer": chatml_tokenizer(), **given}


@pytest.fixture
def address() -> Iterator[str]:
    """Where a server says hello in the protocol of docs/extending.md."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            ids = chatml_tokenizer().encode("Hello.<|im_end|>")
            self.answer("/sample", {"ids": ids, "logprobs": [-0.5] * len(ids), "finish_reason": "stop"})

        def do_GET(self) -> None:
            self.answer("/v1/models", {"data": [{"id": "local"}]})

        def answer(self, path: str, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(200 if self.path == path else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def listings() -> Iterator[None]:
    """What a page adds to the library's listings is taken out again."""
    lists: list[list[Any]] = [PROTOCOLS, seams.SEAMS]
    lengths = [len(listing) for listing in lists]
    with patch.dict(FORMATS), patch.dict(EXPORTS), patch.dict(releases.RELEASES):
        yield
    for listing, length in zip(lists, lengths, strict=True):
        del listing[length:]


@pytest.fixture
def typed() -> Iterator[Any]:
    """The keyboard of the README's application."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def follow(page: str, names: dict[str, Any]) -> None:
    """Do what a page says.

    A snippet runs in ``names``, or is written to the file that its first line names. Of the commands, those are run
    that start such a file or look at a record.
    """
    with asyncio.Runner() as runner:
        for language, block in blocks(ROOT / page):
            file = re.match(r"# (\w+\.py)\n", block)
            if language == "bash":
                for command in commands(block):
                    run(command)
            elif file:
                Path(file[1]).write_text(block)
            elif language == "python":
                code = compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                running = eval(code, names)
                if inspect.isawaitable(running):
                    runner.run(awaited(running))


async def awaited(running: Any) -> None:
    await running


def run(command: str) -> None:
    match shlex.split(command):
        case ["python", file, *arguments] if Path(file).exists():
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sys, "argv", [file, *arguments])
                code: Any = 0
                try:
                    runpy.run_path(file, run_name="__main__")
                except SystemExit as ended:
                    code = ended.code
            assert not code, command
        case ["hermes-atropos", "view", *arguments]:
            assert cli.main(["view", *arguments]) == 0


def test_the_readme_runs(names: dict[str, Any], typed: Any, capsys: Any) -> None:
    typed.send_text("Good morning.\n\n")
    follow("README.md", names)
    printed = capsys.readouterr().out
    assert '"output": "2"' in printed, "the script counted the lines"
    assert "I heard 'Good morning.'." in printed
    assert names["check"].exit_code == 0
    assert names["data"]["inference_logprobs"]
    assert names["answer"].success


def test_getting_started_leads_to_an_environment(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    follow("docs/getting-started.md", names)
    printed = capsys.readouterr().out
    assert printed.startswith("It is done. 4 completed\n")
    assert "inference_logprobs" in printed
    groups = [json.loads(line) for line in (folder / "data" / "sums.jsonl").read_text().splitlines()]
    assert [sorted(group["scores"]) for group in groups] == [[0.0, 0.0, 1.0, 1.0]] * 2
    assert all(group["inference_logprobs"] for group in groups)
    assert (folder / "rollout.html").stat().st_size


def test_results_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    follow("docs/results.md", names)
    assert "I heard" in capsys.readouterr().out
    assert names["data"]["inference_logprobs"]
    assert names["data"]["advantages"], "a step had a reward"
    assert (folder / "rollout.html").stat().st_size


def test_sandboxes_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    follow("docs/sandboxes.md", names)
    assert "notes.txt" in capsys.readouterr().out
    assert names["exit_codes"] == [0, 0, 0]
    assert not (folder / "repo" / "answer.txt").exists(), "they acted in copies"


def test_verifiers_runs(names: dict[str, Any], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    follow("docs/verifiers.md", names)
    assert capsys.readouterr().out == "score 1.0\n0 None \n1.0\n"
    assert names["tested"].exit_code == 0


def test_programs_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    follow("docs/programs.md", names)
    assert capsys.readouterr().out.startswith("completed 2 model calls, ")
    assert run_agent.AIAgent is not type(names["assistant"])


def test_servers_runs(names: dict[str, Any], capsys: Any) -> None:
    follow("docs/servers.md", names)
    assert "I heard 'Hello!'." in capsys.readouterr().out


def test_training_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    follow("docs/training.md", names)
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"atropos", "trl", "verl", "jsonl"}
    assert len(names["rows"]) == 1
    assert len((folder / "train.jsonl").read_text().splitlines()) == 1


def test_embedded_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    folders = {"folder": write_llama(folder / "A"), "other_folder": write_llama(folder / "B", seed=1)}
    follow("docs/embedded.md", names | folders)
    told = capsys.readouterr().out.splitlines()
    assert int(told[0].split()[0]) > 0
    assert [line.split(" ", 1)[-1] for line in told] == ["['default']", "['step-1']"]


async def test_environments_runs(names: dict[str, Any], folder: Path) -> None:
    await asyncio.to_thread(follow, "docs/environments.md", names)

    class Server(ScriptedServer):
        def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
            super().__init__(model)

    names["tokenizer"].save_pretrained(folder / "tokenizer")
    saved = str(folder / "tokenizer")
    config = HermesEnvConfig(tokenizer_name=saved, group_size=2, use_wandb=False, sandbox="folder")
    environment = type("Env", (names["Repairs"],), {"server_cls": Server})(config, [APIServerConfig()])
    group, _ = await environment.collect_trajectories(await environment.get_next_item())
    assert group["scores"] == [1.0, 1.0]


def test_models_runs(names: dict[str, Any]) -> None:
    follow("docs/models.md", names)
    backend = names["agent"]._backend
    assert backend.chat_template_kwargs == {"enable_thinking": False}


def test_extending_runs(names: dict[str, Any], address: str, listings: None, capsys: Any) -> None:
    follow("docs/extending.md", names | {"address": address})
    printed = capsys.readouterr().out
    assert "I look. terminal {'command': 'ls'}" in printed
    assert '"output": "hello"' in printed, "the registered format's call was run"
    assert "Hello. 6" in printed, "the server's tokens are trained"
    assert "serves local and returns token ids (SampleServer)\nHello.\n" in printed, "probe knows the new protocol"
    assert f"1 {[-0.5] * 6}" in printed, "the export has what was sampled"
    assert "\n[]\n" in printed, "the installed release has all that the seams name"
    assert "AIAgent.no_such_method" not in printed
    assert "is missing" in printed
    assert "'terminal'" in printed.splitlines()[-1]


async def test_harnesses_runs(names: dict[str, Any], folder: Path, capsys: Any) -> None:
    await asyncio.to_thread(follow, "docs/harnesses.md", names)
    printed = capsys.readouterr().out
    assert "I heard 'Hello!'. 1" in printed
    assert "I heard '<tool_response>" in printed, "Hermes ran a command behind the wall"
    async with Proxy(names["server"], records=folder / "rollouts", key="") as proxy:
        scripts = [block for language, block in blocks(ROOT / "docs/harnesses.md") if language == "sh"]
        script = "set -eu\n" + "".join(scripts).replace("http://127.0.0.1:9100", proxy.url)
        environ = {**script_environ(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = await asyncio.create_subprocess_exec("bash", "-c", script, stdout=PIPE, env=environ)
        output, _ = await done.communicate()
        assert done.returncode == 0
        assert len(proxy.sessions) == 1, "Hermes' was not ended"
    assert "I heard 'Hello!'." in output.decode()
    assert json.loads((folder / "trajectory.json").read_text())["trajectory"]["rollout"]["success"]
    assert output.decode().rstrip().endswith("'.")


def test_every_page_is_followed() -> None:
    followed = set(re.findall(r'"((?:docs/)?[\w-]+\.md)", names', Path(__file__).read_text()))
    with_snippets = {str(page.relative_to(ROOT)) for page in PAGES if "python" in dict(blocks(page))}
    assert followed == with_snippets


# ── What the pages say ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_exists(page: str, command: str) -> None:
    words = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", command))
    match words:
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(f"{module}.__main__")
        case ["python", file, *_]:
            written = re.findall(r"^```python\n# (\w+\.py)\n", (ROOT / page).read_text(), re.M)
            assert file in written or (ROOT / file).is_file()
        case ["hermes-atropos", *arguments]:
            cli._parsed(arguments)
        case [program] if program in importlib.metadata.entry_points(group="console_scripts").names:
            pass
        case _:
            assert command in (
                "python3 -m venv .venv",
                "source .venv/bin/activate",
                "pip install .",
                "pip install '.[hermes]'",
            )


def test_the_demo_is_the_example() -> None:
    assert "examples/demo.py" in (ROOT / "Makefile").read_text().split("demo:")[1].split("\n\n")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\((.*?)\)", prose) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in [re.sub(r"[^\w-]", "", text.lower().replace(" ", "-")) for text in headings], link


def test_lists_are_complete() -> None:
    assert {str(reason) for reason in StopReason} - named("docs/results.md") == set()
    assert {str(status) for status in ParseStatus} - named("docs/results.md") == set()
    assert {str(cause) for cause in BreakCause} - named("docs/results.md") == set()
    variables = set(re.findall(r"^``([A-Z_]+)``", settings.__doc__ or "", re.M))
    assert variables
    assert variables == {name for name in named("docs/settings.md") if re.match("(HERMES|ATROPOS)_", name)}
    assert {protocol.__name__ for protocol in PROTOCOLS} - named("docs/servers.md") == set()
    assert set(HermesEnvConfig.__annotations__) - named("docs/environments.md") == set()


def test_every_room_has_its_place_in_the_architecture() -> None:
    package = ROOT / "hermes_atropos"
    rooms = {path.stem for path in package.glob("[a-z]*") if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {"cli", "exports"} <= rooms
    assert rooms - named("docs/architecture.md") == set()
