"""What the library says reaches standard error once, whatever Hermes and the application did to logging."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from support import run_script

from hermes_atropos.logs import ToStandardError

PACKAGE = Path(__file__).parents[1] / "hermes_atropos"

#: The modules that log, by their names.
SPEAKERS = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if "logging.getLogger(__name__)" in path.read_text("utf-8") and path != PACKAGE / "__init__.py"
]

VARIABLES = {
    "HERMES_DEBUG_ATROPOS_REQUEST": "request: ",
    "ATROPOS_DEBUG_AGENT_REQUEST": "request: ",
    "ATROPOS_DEBUG_AGENT_REQUEST_FULL": "request: ",
    "HERMES_DEBUG_ATROPOS_RESPONSE": "response: ",
    "ATROPOS_DEBUG_AGENT_RESPONSE": "response: ",
    "ATROPOS_DEBUG_AGENT_WAIT_EVERY_S": "waiting for the model for ",
}

#: How an application sets logging up, and what it then makes of a line.
APPLICATIONS = {
    "nothing": "",
    "basicConfig": "logging.basicConfig()",
    "another level": "logging.basicConfig(level=logging.ERROR)",
    "everything": "logging.basicConfig(level=logging.DEBUG, format='%(name)s: %(message)s')",
    "a file": "logging.basicConfig(filename='application.log')",
    "after Hermes": "AFTER",
}

SCRIPT = """
import json, logging
{application}
records = []
for name in {speakers}:
    logging.getLogger(name).addFilter(lambda record: records.append(record.getMessage()) or True)
if {profile}:
    import hermes_atropos
    hermes_atropos.use_training_profile()
import importlib
from hermes_atropos.errors import BackendConnectionError
from hermes_atropos.testing import Reply
from support import agent_saying
failing = Reply(error=BackendConnectionError("nobody there"))
agent = agent_saying(failing, Reply("Hi.", latency=0.03), quiet_mode=True)
if {after}:
    logging.basicConfig()
assert agent.chat("Hello?") == "Hi."
for name in {speakers}:
    importlib.import_module(name).logger.{method}("said by %s.", name)
print(json.dumps(records))
"""


def said(tmp_path: Path, application: str, *, profile: bool, **environ: str) -> tuple[list[str], str]:
    """What the library's loggers were given, by their own record, and what standard error got."""
    done = run_script(
        SCRIPT.format(
            application="" if application == "AFTER" else application,
            after=application == "AFTER",
            profile=profile,
            speakers=SPEAKERS,
            # Whoever asks for errors alone gets those.
            method="error" if "ERROR" in application else "warning",
        ),
        tmp_path,
        **environ,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("profile", [True, False], ids=["profile", "own home"])
@pytest.mark.parametrize("application", APPLICATIONS)
def test_each_warning_and_each_debug_variable_shows_once(application: str, profile: bool, tmp_path: Path) -> None:
    environ = dict.fromkeys(VARIABLES, "1") | {"ATROPOS_DEBUG_AGENT_WAIT_EVERY_S": "0.02"}
    records, shown = said(tmp_path, APPLICATIONS[application], profile=profile, **environ)
    expected = {*VARIABLES.values(), "said by "} | ({"model call failed"} if application != "another level" else set())
    assert {start for start in expected if not any(record.startswith(start) for record in records)} == set()
    assert len([record for record in records if record.startswith("said by ")]) == len(SPEAKERS) > 8
    assert {record: shown.count(record) for record in records} == Counter(records)
    if application == "a file":
        assert (tmp_path / "application.log").read_text().count("said by hermes_atropos.backends.pool.") == 1


def test_each_debug_variable_shows_what_it_promises(tmp_path: Path) -> None:
    script = f"""
import hermes_atropos, json, logging, os, sys
hermes_atropos.use_training_profile()
from hermes_atropos.testing import Reply
from support import agent_saying
records = []
for name in {SPEAKERS}:
    logging.getLogger(name).addFilter(lambda record: records.append(record.getMessage()) or True)
for variable in {list(VARIABLES)}:
    os.environ[variable] = "0.02" if variable.endswith("_S") else "1"
    assert agent_saying(Reply("Hi.", latency=0.03), quiet_mode=False).chat("Hello?") == "Hi."
    del os.environ[variable]
    print(json.dumps(records))
    print("that was one", file=sys.stderr)
    records.clear()
"""
    done = run_script(script, tmp_path)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for begin, records, shown in zip(VARIABLES.values(), told, done.stderr.split("that was one\n"), strict=False):
        promised = [record for record in records if record.startswith(begin)]
        assert promised
        assert [record for record in records if record.startswith(tuple(VARIABLES.values()))] == promised
        assert {record: shown.count(record) for record in promised} == Counter(promised)
    assert len(told) == len(VARIABLES)


def test_a_handler_that_prints_there_is_enough_and_one_that_does_not_is_no_reason_for_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from rich.console import Console
    from rich.logging import RichHandler

    logger = logging.getLogger("test_logs.application")
    monkeypatch.setattr(logger, "propagate", False)
    ours = ToStandardError()
    for other, lines in [
        (logging.StreamHandler(sys.stderr), 1),
        (RichHandler(console=Console(file=sys.stderr, width=200)), 1),
        (logging.StreamHandler(sys.stdout), 1),
        (logging.NullHandler(), 1),
    ]:
        monkeypatch.setattr(logger, "handlers", [ours, other])
        logger.warning("a word")
        assert capsys.readouterr().err.count("a word") == lines, other


def test_a_traceback_shows_and_a_muted_standard_error_does_not_mute_us(tmp_path: Path) -> None:
    script = """
import contextlib, logging, os, hermes_atropos
logger = logging.getLogger("hermes_atropos.tools")
with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    try:
        1 / 0
    except ZeroDivisionError:
        logger.warning("raised", exc_info=True)
"""
    shown = run_script(script, tmp_path).stderr
    assert "WARNING hermes_atropos.tools: raised\nTraceback" in shown
    assert "ZeroDivisionError" in shown


def test_hermes_log_files_are_off_in_a_training_run_or_where_its_author_wants_them(tmp_path: Path) -> None:
    script = """
import hermes_atropos, logging
home = hermes_atropos.use_training_profile(log_folder={folder})
from support import agent_saying
agent_saying("Hi.").chat("Hello?")
logging.getLogger("tools.something").error("it went wrong")
print(sorted(str(path.relative_to(home)) for path in home.rglob("*.log")))
"""
    assert run_script(script.format(folder=None), tmp_path).stdout.splitlines()[-1] == "[]"
    kept = tmp_path / "kept"
    assert run_script(script.format(folder="'kept'"), tmp_path).stdout.splitlines()[-1] == "[]"
    assert "it went wrong" in (kept / "logs" / "errors.log").read_text()


def test_without_the_profile_hermes_log_files_are_as_in_hermes(tmp_path: Path) -> None:
    script = """
import logging
from support import agent_saying
agent_saying("Hi.").chat("Hello?")
logging.getLogger("hermes_atropos.backends.pool").warning("for the files too")
"""
    run_script(script, tmp_path, HERMES_HOME=str(tmp_path / "home"))
    assert "for the files too" in (tmp_path / "home" / "logs" / "errors.log").read_text()
