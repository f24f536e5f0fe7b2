"""A run speaks to the given server alone, and with the training profile it leaves the user's own Hermes home alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import run_script
from wire import VLLMWire

#: Notes where the process connects, what it looks up, and which files below ``HOME`` it opens, from its first line on.
#: Nothing is found but on this machine, so that the test is the same with a network and without.
NOTES = """
import os, sys
sockets, files = [], []
NAMES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")

def note(event, args):
    if event in NAMES:
        sockets.append([event, str(args[1] if event in ("socket.connect", "socket.sendto") else args[0])])
        if event == "socket.getaddrinfo" and args[0] not in (None, "127.0.0.1", "localhost"):
            raise OSError("no such host")
    elif event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "sqlite3.connect"):
        path = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
        if path.startswith(os.environ["HOME"] + "/.hermes"):
            files.append([event, path])

sys.addaudithook(note)
"""

#: A rollout with all that could reach for another model: an image, a subagent, compression, and the summary at the
#: limit.
RUN = """
import asyncio, json
from support import agent_on, terminal
from hermes_atropos.testing import ScriptedServer, tool_call

def model(messages):
    if "maximum number of tool-calling" in messages[-1]["content"]:  # Hermes 0.21 on leaves it the tools
        kinds.append("summary")
        return "So it was."
    if "<tools>" not in messages[0]["content"]:
        kinds.append("compression")
        return "So it was."
    if any("Write x." in message["content"] for message in messages[:2]):
        kinds.append("child")
        return terminal("echo x > x") if kinds.count("child") == 1 else "Written."
    kinds.append("main")
    number = kinds.count("main")
    return tool_call("delegate_task", goal="Write x.") if number == 2 else terminal(f"seq {number} 1000")

kinds = []

async def main():
    agent = agent_on(
        ScriptedServer(model),
        enabled_toolsets=["terminal", "file", "delegation", "web", "todo"],
        max_iterations=10,
        skip_context_files=False,
        skip_memory=False,
        save_trajectories=True,
    )
    agent.compression_enabled = True
    agent.context_compressor.threshold_tokens = 40_000
    agent.context_compressor.tail_token_budget = 2_000
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    result = await agent.run_conversation_async([{"type": "text", "text": "Count, please."}, image])
    async with agent.task() as task:
        await task.terminal("ls")
    return result["stop_reason"].value

reason = asyncio.run(main())
print(json.dumps({"reason": reason, "kinds": sorted(set(kinds)), "sockets": sockets, "files": files}))
"""

KINDS = ["child", "compression", "main", "summary"]

SECRETS = {
    "OPENROUTER_API_KEY": "sk-or-v1-0123456789abcdef0123456789abcdef",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdef0123456789abcdef",
    "ANTHROPIC_API_KEY": "sk-ant-0123456789abcdef0123456789abcdef",
}


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user with a Hermes home that says to use OpenRouter."""
    home = tmp_path / "user"
    (home / ".hermes" / "memories").mkdir(parents=True)
    (home / ".hermes" / "config.yaml").write_text("model:\n  default: openrouter/auto\n  provider: openrouter\n")
    (home / ".hermes" / ".env").write_text("OPENROUTER_API_KEY=sk-or-v1-from-the-users-home\n")
    (home / ".hermes" / "memories" / "MEMORY.md").write_text("The user's cat is called Ada.\n")
    (home / ".hermes" / "SOUL.md").write_text("You are a cat.\n")
    return home


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def run(script: str, cwd: Path, **environ: str) -> dict[str, Any]:
    done = run_script(script, cwd, **environ)
    noted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return noted


PROFILE = """
from hermes_atropos.hermes.profile import use_training_profile
use_training_profile(compression=True)
"""


#: Configurations of a user that give Hermes reasons to speak to somebody else.
CONFIGURATIONS = {
    "model": "model: {default: openrouter/auto, provider: openrouter}",
    "local model": "model: {default: llama3, provider: custom, base_url: 'http://127.0.0.1:9/v1'}",
    "subagents": "delegation: {model: claude-haiku-4-5, base_url: 'https://api.anthropic.com/v1', api_key: k}",
    "provider of subagents": "delegation: {model: gpt-5, provider: openai}",
    "fallback": "fallback_providers: [{provider: openrouter, model: openai/gpt-5}]",
    "images": "auxiliary: {vision: {provider: openrouter, model: google/gemini-3-flash-preview}}",
    "approvals": "approvals: {mode: smart}",
    "summaries": "auxiliary: {compression: {provider: openrouter, model: google/gemini-3-flash-preview}}",
}


class TestTrainingProfile:
    @pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
    def test_no_socket_and_not_the_user_s_home(self, keys: bool, user: Path, tmp_path: Path) -> None:
        before = contents(user)
        noted = run(NOTES + PROFILE + RUN, tmp_path, HOME=str(user), **(SECRETS if keys else {}))
        assert noted["sockets"] == []
        assert noted["files"] == []
        assert noted["kinds"] == KINDS
        assert noted["reason"] == "iteration_limit"
        assert contents(user) == before

    def test_an_inherited_hermes_home_is_left_alone_too(self, user: Path, tmp_path: Path) -> None:
        before = contents(user)
        noted = run(NOTES + PROFILE + RUN, tmp_path, HOME=str(user), HERMES_HOME=str(user / ".hermes"))
        assert (noted["sockets"], noted["files"]) == ([], [])
        assert contents(user) == before


class TestWithoutProfile:
    @pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
    def test_no_socket(self, keys: bool, user: Path, tmp_path: Path) -> None:
        home = tmp_path / "hermes"
        home.mkdir()
        noted = run(NOTES + RUN, tmp_path, HOME=str(user), HERMES_HOME=str(home), **(SECRETS if keys else {}))
        assert noted["sockets"] == []
        assert noted["kinds"] == KINDS
        assert noted["reason"] == "iteration_limit"

    @pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
    def test_the_user_s_own_home_is_used_as_always(self, configuration: str, user: Path, tmp_path: Path) -> None:
        (user / ".hermes" / "config.yaml").write_text(f"{configuration}\nagent: {{environment_probe: false}}\n")
        noted = run(NOTES + RUN, tmp_path, HOME=str(user), **SECRETS)
        assert noted["sockets"] == []
        assert any(path.endswith("/config.yaml") for _, path in noted["files"])
        assert noted["kinds"] == KINDS
        assert noted["reason"] == "iteration_limit"


OVER_HTTP = """
import json
from support import QUIET
from hermes_atropos import AtroposAIAgent
from hermes_atropos.testing import chatml_tokenizer

agent = AtroposAIAgent(
    base_url=sys.argv[1], model="tests/chatml", tokenizer=chatml_tokenizer(), enabled_toolsets=["terminal"], **QUIET
)
result = agent.run_conversation("Hello")
tokens = sum(map(len, result["trajectory"].sequences))
print(json.dumps({"said": result["final_response"], "sockets": sockets, "files": files, "tokens": tokens}))
"""


@pytest.mark.parametrize("profile", [False, True])
def test_over_http_only_the_server_is_spoken_to(profile: bool, user: Path, tmp_path: Path) -> None:
    with VLLMWire(reply="Hello there.", context_length=100_000) as server:
        script = NOTES + (PROFILE if profile else "") + f"sys.argv[1:] = [{server.url!r}]\n" + OVER_HTTP
        noted = run(script, tmp_path, HOME=str(user), **SECRETS)
    assert noted["said"] == "Hello there."
    assert noted["tokens"] > 0
    host, port = server.url.split("//")[1].split("/")[0].split(":")
    assert {address for event, address in noted["sockets"] if event == "socket.connect"} == {str((host, int(port)))}
    assert {name for event, name in noted["sockets"] if event != "socket.connect"} <= {host}
    assert profile is not bool(noted["files"])
