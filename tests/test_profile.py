"""The training profile: a private Hermes home, and no provider's credentials. Each case in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import run_script


def run(script: str, cwd: Path, **environ: str) -> list[str]:
    return run_script(script, cwd, **environ).stdout.splitlines()


def test_hermes_finds_a_home_that_goes_with_the_process(tmp_path: Path) -> None:
    script = """
import os
from hermes_atropos.hermes.profile import active_profile, use_training_profile
assert active_profile() is None
home = use_training_profile()
assert active_profile() == home == use_training_profile()
assert os.environ["HERMES_HOME"] == str(home)
from hermes_constants import get_hermes_home
assert get_hermes_home() == home
print(home)
"""
    [home] = run(script, tmp_path, TMPDIR=str(tmp_path))
    assert Path(home).parent == tmp_path
    assert not Path(home).exists()


@pytest.mark.parametrize("compression", [False, True])
def test_what_it_says_is_what_hermes_reads(compression: bool, tmp_path: Path) -> None:
    script = f"""
from hermes_atropos import use_training_profile
use_training_profile(context_length=70_000, compression={compression})
import json
from support import agent_saying
agent = agent_saying("Hi.", skip_memory=False)
print(json.dumps([agent.compression_enabled, agent.context_compressor.context_length, agent._memory_enabled]))
"""
    assert json.loads(run(script, tmp_path)[-1]) == [compression, 70_000, False]


def test_credentials_of_providers_are_taken_away_and_others_left(tmp_path: Path) -> None:
    gone = ["OPENROUTER_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "DEEPSEEK_API_KEY"]
    kept = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_BASE_URL", "MY_SERVICE_API_KEY"]
    script = f"""
import os
from hermes_atropos.hermes.profile import use_training_profile
use_training_profile()
print(*[name for name in {gone + kept} if name in os.environ])
"""
    [left] = run(script, tmp_path, **dict.fromkeys(gone + kept, "sk-0123456789abcdef"))
    assert left.split() == kept


def test_what_is_kept_for_a_judge_is_not_for_the_model(tmp_path: Path) -> None:
    kept = {"OPENAI_API_KEY": "sk-0123456789abcdef", "OPENROUTER_BASE_URL": "http://judge", "HF_TOKEN": "hf_0123"}
    script = f"""
import os
from hermes_atropos import use_training_profile
use_training_profile(keep_env={list(kept)})
from support import agent_saying
with agent_saying().task() as task:
    seen = task.sandbox.run("env").output + task.terminal("env").output
print([name for name, value in {kept}.items() if os.environ.get(name) != value or value in seen])
"""
    assert run(script, tmp_path, **kept)[-1] == "[]"


def test_after_hermes_it_is_too_late(tmp_path: Path) -> None:
    script = """
import hermes_atropos.hermes.agent
from hermes_atropos import use_training_profile
from hermes_atropos.errors import ConfigurationError
try:
    use_training_profile()
except ConfigurationError as error:
    print(error)
"""
    [message] = run(script, tmp_path)
    assert "before the first import" in message


def test_importing_the_library_imports_no_hermes(tmp_path: Path) -> None:
    """Hermes reads its home when it is imported: one has to get to the profile before it. It is cheap as well."""
    script = """
import sys
import hermes_atropos, hermes_atropos.hermes.profile, hermes_atropos.trajectory, hermes_atropos.settings
print(*{"run_agent", "hermes_constants", "transformers", "renderers", "torch"} & sys.modules.keys())
"""
    assert run_script(script, tmp_path, fresh=True).stdout.splitlines() == [""]


def test_a_forked_process_leaves_the_home_to_its_parent(tmp_path: Path) -> None:
    script = """
import os, sys
from hermes_atropos.hermes.profile import use_training_profile
home = use_training_profile()
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
print((home / "config.yaml").exists())
"""
    assert run(script, tmp_path) == ["True"]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_worker_processes_can_use_it_too(method: str, tmp_path: Path) -> None:
    """As a data loader's or a pool's workers; a spawned one makes a home of its own, or uses its parent's."""
    (tmp_path / "workers.py").write_text(f"""
import multiprocessing
from hermes_atropos.hermes.profile import use_training_profile

def work(number):
    home = use_training_profile()
    from support import agent_saying
    return agent_saying(f"n{{number}}").chat("Go."), (home / "config.yaml").exists()

if __name__ == "__main__":
    home = use_training_profile()
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        for said, there in pool.map(work, range(3)):
            print(said, there)
    print((home / "config.yaml").exists())
""")
    lines = run(f"import runpy; runpy.run_path({str(tmp_path / 'workers.py')!r}, run_name='__main__')", tmp_path)
    assert lines == ["n0 True", "n1 True", "n2 True", "True"]


def test_a_hermes_home_that_was_asked_for_is_kept_out(tmp_path: Path) -> None:
    """The profile's is used in spite of an inherited one; without the profile that one is."""
    script = """
import sys
if sys.argv[1:] == ["profile"]:
    from hermes_atropos.hermes.profile import use_training_profile
    use_training_profile()
from hermes_constants import get_hermes_home
print(get_hermes_home())
"""
    inherited = str(tmp_path / "inherited")
    [without] = run(script, tmp_path, HERMES_HOME=inherited)
    [with_it] = run(f"import sys; sys.argv = ['', 'profile']\n{script}", tmp_path, HERMES_HOME=inherited)
    assert without == inherited != with_it


@pytest.mark.parametrize("profile", [True, False])
def test_background_processes_are_noted_for_later_only_outside_of_it(profile: bool, tmp_path: Path) -> None:
    """Hermes lists them in its home; where many end at once, that takes seconds. What they left is there to be read.

    The command takes a while, because Hermes lists one twice that ends while it is being listed.
    """
    script = f"""
import hermes_atropos, json
{"hermes_atropos.use_training_profile()" if profile else ""}
from hermes_constants import get_hermes_home
from support import agent_saying, until
from hermes_atropos.testing import tool_call
agent = agent_saying(tool_call("terminal", command="sleep 0.5; echo left", background=True), "Started.")
with agent.task(keep_processes=True) as task:
    task.run("Go.")
    from tools.process_registry import process_registry
    [process] = process_registry.list_sessions()
    until(lambda: process_registry.poll(process["session_id"])["status"] == "exited")
    print(process_registry.read_log(process["session_id"])["output"])
    until(lambda: {profile} or any(get_hermes_home().glob("processes*.json")))
    print([path.name for path in get_hermes_home().rglob("proc*.json")] == [])
"""
    assert run(script, tmp_path, HERMES_HOME=str(tmp_path / "home"))[-2:] == ["left", str(profile)]
