"""Hermes is held by names: each is looked for, and what is changed in place shows in our rollouts alone."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import run_agent
from agent import coding_context
from hermes_cli.config import DEFAULT_CONFIG
from packaging.version import Version
from run_agent import AIAgent
from support import agent_saying, run_script, server_of, terminal
from tools import delegate_tool
from tools.environments.local import LocalEnvironment

from hermes_atropos.errors import ConfigurationError, UnsupportedVersionError
from hermes_atropos.hermes import hooks, seams, versions
from hermes_atropos.hermes.acting import acting_agent, acting_for
from hermes_atropos.hermes.agent import AtroposAIAgent
from hermes_atropos.hermes.profile import AUXILIARY
from hermes_atropos.hermes.seams import ATTRIBUTES, SEAMS, Seam
from hermes_atropos.hermes.wrappers import LISTED, REPLACED, WRAPPED


def owner_of(seam: Seam) -> tuple[Any, str]:
    """What holds the name, and the name there."""
    *parts, last = seam.name.split(".")
    return functools.reduce(getattr, parts, importlib.import_module(seam.module)), last


def holders(seam: Seam) -> list[tuple[Any, str]]:
    """All that must lose the name for it to be gone: for a method, each class that defines it."""
    owner, name = owner_of(seam)
    if not inspect.isclass(owner):
        return [(owner, name)]
    return [(cls, name) for cls in owner.__mro__ if name in vars(cls) and cls is not object]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has constructed no agent yet."""
    agent_saying()  # Hermes' modules are imported, and the wrappers in place
    monkeypatch.setattr(seams, "check", seams.check.__wrapped__)  # type: ignore[attr-defined]
    return monkeypatch


#: Those of the installed release.
HERE = [seam for seam in SEAMS if seam.is_in(versions.hermes_version())]


@pytest.mark.parametrize("seam", HERE, ids=lambda seam: f"{seam.module}.{seam.name}")
def test_what_is_gone_is_named_at_the_first_construction(seam: Seam, unchecked: pytest.MonkeyPatch) -> None:
    for owner, name in holders(seam):
        if name in vars(owner):
            unchecked.delattr(owner, name)
        else:
            unchecked.delattr(type(owner), name)
    with pytest.raises(UnsupportedVersionError) as caught:
        agent_saying("Hi.")
    message = str(caught.value)
    assert f"{seam.module}.{seam.name} is missing" in message
    assert str(versions.hermes_version()) in message
    assert "hermes/seams.py" in message
    assert isinstance(caught.value, ConfigurationError)


@pytest.mark.parametrize(
    "seam", [seam for seam in HERE if seam.parameters], ids=lambda seam: f"{seam.module}.{seam.name}"
)
def test_a_parameter_that_is_gone_is_named(seam: Seam, unchecked: pytest.MonkeyPatch) -> None:
    owner, name = holders(seam)[0]
    unchecked.setattr(
        owner if isinstance(owner, type) or inspect.ismodule(owner) else type(owner), name, lambda self: None
    )
    with pytest.raises(UnsupportedVersionError, match="does not accept") as caught:
        agent_saying("Hi.")
    assert all(parameter in str(caught.value) for parameter in seam.parameters or ())


@pytest.mark.parametrize("name", ATTRIBUTES["AIAgent"])
def test_an_attribute_that_is_gone_is_named_at_construction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    construct = AIAgent.__init__

    def without(agent: Any, *args: Any, **options: Any) -> None:
        construct(agent, *args, **options)
        del vars(agent)[name]

    monkeypatch.setattr(AIAgent, "__init__", without)
    with pytest.raises(UnsupportedVersionError, match=f"AIAgent objects no longer have {name}"):
        agent_saying("Hi.")


@pytest.mark.parametrize("name", ATTRIBUTES["LocalEnvironment"])
async def test_an_attribute_of_the_terminal_that_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    construct = LocalEnvironment.__init__

    def without(environment: Any, *args: Any, **options: Any) -> None:
        construct(environment, *args, **options)
        del vars(environment)[name]

    monkeypatch.setattr(LocalEnvironment, "__init__", without)
    with pytest.raises(UnsupportedVersionError, match=f"LocalEnvironment objects no longer have {name}"):
        async with agent_saying("Hi.").task():
            pass


def test_a_name_of_newer_releases_is_not_missed_in_older_ones(unchecked: pytest.MonkeyPatch) -> None:
    unchecked.setattr(seams, "SEAMS", [Seam("model_tools", "no_such_thing", since="0.16")])
    with pytest.raises(UnsupportedVersionError, match="no_such_thing is missing"):
        agent_saying("Hi.")
    unchecked.setattr(seams, "hermes_version", lambda: Version("0.15.2"))
    assert agent_saying("Hi.").chat("Hello!") == "Hi."


def test_a_name_that_newer_releases_moved_is_looked_for_where_it_is() -> None:
    moved = [seam for seam in SEAMS if seam.name == "cleanup_vm"]
    for release, module in [("0.20.1", "tools.terminal_tool"), ("0.21", "tools.terminal_tool_lifecycle")]:
        assert [seam.module for seam in moved if seam.is_in(Version(release))] == [module]
    assert [seam.module for seam in moved if seam.is_in(None)] == ["tools.terminal_tool_lifecycle"]


def test_every_method_that_is_overridden_is_in_the_table() -> None:
    names = {seam.name for seam in SEAMS if seam.module == "run_agent"}
    overridden = {
        name
        for cls in (hooks.Hooks, AtroposAIAgent)
        for name in vars(cls)
        if callable(getattr(AIAgent, name, None)) and not hasattr(object, name)
    }
    assert {f"AIAgent.{name}" for name in overridden - {"chat"}} <= names
    assert overridden


def test_everything_that_is_wrapped_is_in_the_table() -> None:
    assert WRAPPED.keys() | REPLACED.keys() <= {(seam.module, seam.name) for seam in SEAMS}


def test_outside_of_a_rollout_hermes_is_as_it_was() -> None:
    """Its own agent asks its own provider; so does one that is made while another thread runs a rollout."""
    agent_saying("Hi.").chat("Hello!")
    stock = AIAgent(base_url="inproc://elsewhere.invalid/v1", api_key="key", provider="custom", model="m", max_tokens=9)
    assert type(stock) is AIAgent
    assert type(stock._create_openai_client({"api_key": "k"}, reason="test", shared=False)).__module__ == "openai"
    assert acting_agent() is None


def test_an_agent_that_hermes_makes_in_a_rollout_is_ours() -> None:
    parent = agent_saying("Hi.", terminal("echo"))
    with acting_for(parent):
        child: Any = run_agent.AIAgent(model="another", provider="openrouter", api_key="sk", quiet_mode=True)
    assert isinstance(child, hooks.Subagent)
    assert child.chat("Hello!") == "Hi."
    assert server_of(parent).requests[0].prompt.count("Hello!") == 1


def test_a_subagent_past_the_library_raises_and_ends_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_saying(
        '<tool_call>\n{"name": "delegate_task", "arguments": {"goal": "Count the files."}}\n</tool_call>',
        "Never asked for.",
        enabled_toolsets=["delegation"],
    )

    def foreign(task_index: int, *args: Any, parent_agent: Any = None, **options: Any) -> Any:
        child = object()
        parent_agent._active_children.append(child)
        return child

    monkeypatch.setattr(delegate_tool, "_build_child_agent", foreign)
    result = agent.run_conversation("Delegate.")
    assert isinstance(result["cause"], UnsupportedVersionError)
    assert "made a subagent of the class object past this library" in result["error"]
    assert len(server_of(agent).requests) == 1


def looked_up(function: str, *args: Any) -> tuple[Any, Any]:
    """What one of Hermes' functions says to a rollout, and what it says otherwise."""
    module, _, name = function.rpartition(".")
    agent = agent_saying("Hi.")
    with acting_for(agent):
        ours = getattr(importlib.import_module(module), name)(*args)
    return ours, getattr(importlib.import_module(module), name)(*args)


def test_a_rollouts_configuration_is_the_users_and_the_callers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERMES_HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("agent: {max_turns: 7, since: 2026-01-01}\nlist: [[1], {a: ~}]\n")
    ours, theirs = looked_up("hermes_cli.config.load_config")
    assert ours == theirs
    assert ours["agent"]["max_turns"] == 7
    ours["agent"]["max_turns"] = 8
    ours["list"][0].append(2)
    assert looked_up("hermes_cli.config.load_config")[0] == theirs


@pytest.mark.parametrize("where", ["", "deep", "deep/er", "many", "gone"])
@pytest.mark.parametrize(
    "marker", ["", "Makefile", "deep/pyproject.toml", "deep/er/AGENTS.md", "many/go.mod", "other.txt"]
)
def test_a_rollouts_project_is_what_hermes_finds(tmp_path: Path, where: str, marker: str) -> None:
    for name in ("deep/er", "many"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(1100):
        (tmp_path / "many" / str(number)).touch()
    if marker:
        (tmp_path / marker).touch()
    ours, theirs = looked_up("agent.coding_context._marker_root", tmp_path / where)
    assert ours == theirs


@pytest.mark.parametrize("function", ["_marker_root", "_git_root"])
def test_a_tasks_own_folders_are_in_nobodys_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("tmp", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "Makefile").touch()
    find = getattr(coding_context, function)
    with agent_saying("Hi.").task() as task:
        folder = Path(task.sandbox.workspace)
        (folder / "deep").mkdir()
        for number in range(1100):  # more than are listed, so that Hermes itself looks
            (folder / "deep" / str(number)).touch()
        monkeypatch.setattr(task._agent, "_rollout", task._rollout)  # as during a run
        with acting_for(task._agent):
            assert find(tmp_path) == find(tmp_path / "tmp") == tmp_path
            assert find(folder / "deep") is None
            (folder / ".git").mkdir()
            (folder / "Makefile").touch()
            assert find(folder / "deep") == folder
    assert find(tmp_path) == tmp_path


def test_in_training_no_kind_of_auxiliary_call_has_a_provider() -> None:
    given = DEFAULT_CONFIG["auxiliary"].items()
    assert {kind for kind, told in given if isinstance(told, dict) and "provider" in told} <= set(AUXILIARY)


def test_in_training_the_configuration_is_that_of_the_file_and_there_is_no_account(tmp_path: Path) -> None:
    script = """
from hermes_atropos import use_training_profile
home = use_training_profile()
from hermes_atropos.hermes.acting import acting_for
from support import agent_saying
from hermes_cli.config import load_config_readonly
from tools import tool_backend_helpers

def in_a_rollout(function):
    with acting_for(agent):
        return function()

agent = agent_saying("Hi.")
file = home / "config.yaml"
before = file.read_text()
for own in (7, 70):
    file.write_text(before + f"own: {own}\\n")
    print([in_a_rollout(load_config_readonly)["own"] for _ in range(2)])
print(in_a_rollout(load_config_readonly) is in_a_rollout(load_config_readonly))
file.unlink()
print(in_a_rollout(load_config_readonly) == load_config_readonly())
print(in_a_rollout(tool_backend_helpers.managed_nous_tools_enabled))
"""
    assert run_script(script, tmp_path).stdout.splitlines() == ["[7, 7]", "[70, 70]", "True", "True", "False"]


def test_the_page_on_releases_names_all_that_is_wrapped() -> None:
    page = (Path(__file__).parent.parent / "docs" / "hermes-versions.md").read_text()
    table = page.partition("## What is wrapped in place")[2].partition("\n## ")[0]
    assert {f"{module}.{name}" for module, name in WRAPPED.keys() | LISTED.keys()} == set(
        re.findall(r"`([a-z_]+\.[\w.]+)`", table)
    )
