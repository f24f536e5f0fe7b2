"""Hermes' own tests of its agent, with Hermes' class and with ours in its place.

    python compat/hermes_tests.py CHECKOUT                a clone of hermes-agent at the tag of the installed release
    python compat/hermes_tests.py CHECKOUT --only steer   the files whose names have that

What Hermes' class passes, ours must pass, but for what ``hermes_tests.toml`` names, test by test, with the mechanism
that makes it fail. A test that is named there and passes is an error too. The table is written to ``hermes_tests.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from hermes_atropos.hermes.versions import hermes_version

HERE = Path(__file__).resolve().parent
NAMED = HERE / "hermes_tests.toml"
TABLE = HERE / "hermes_tests.md"

TESTS = "tests/run_agent"
LIMIT = 60  # seconds, of one test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="", help="the files whose names have this text; writes no table")
    parser.add_argument("-n", default="2", help="processes")
    given = parser.parse_args()
    named = tomllib.loads(NAMED.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because a clone's own modules would be imported in place of the installed ones.
        shutil.copytree(given.checkout / "tests", Path(folder, "tests"))
        shutil.copy(given.checkout / "pyproject.toml", folder)
        files = sorted(path.name for path in Path(folder, TESTS).glob("test_*.py") if given.only in path.name)
        files = [file for file in files if file not in named["replaced"]]
        theirs = passed(folder, files, given.n)
        ours = passed(folder, files, given.n, "-p", "exchanged")
    may_fail = {test: entry["mechanism"] for entry in named["may_fail"] for test in entry["tests"]}
    wrong = faults(theirs, ours, {test: why for test, why in may_fail.items() if test.partition("::")[0] in files})
    print(f"{len(theirs)} tests pass with Hermes' class, {len(theirs & ours)} of them with ours")
    if not given.only:
        TABLE.write_text(table(theirs, ours, may_fail), encoding="utf-8")
    sys.exit("\n".join(wrong) or 0)


def passed(folder: str, files: list[str], processes: str, *plugin: str) -> set[str]:
    """The tests that pass, as ``file::class::name``, without what xdist and parameters add."""
    report = Path(folder, "report.xml")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "-n", processes),
        *("--dist", "loadfile", "--timeout", str(LIMIT), "--junitxml", str(report)),
        *(f"{TESTS}/{file}" for file in files),
    ]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False, stdout=sys.stderr)
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    return {name_of(case) for case in cases if not {child.tag for child in case} & {"failure", "error", "skipped"}}


def name_of(case: Any) -> str:
    module, *inside = case.get("classname").removeprefix(TESTS.replace("/", ".") + ".").split(".")
    return "::".join([f"{module}.py", *inside, case.get("name")])


def faults(theirs: set[str], ours: set[str], may_fail: dict[str, str]) -> list[str]:
    """What is wrong, one line each."""
    failing = theirs - ours
    return [
        *(f"fails, and is not named in {NAMED.name}: {test}" for test in sorted(failing - may_fail.keys())),
        *(f"passes, and is named in {NAMED.name}: {test}" for test in sorted(may_fail.keys() & ours)),
    ]


def table(theirs: set[str], ours: set[str], may_fail: dict[str, str]) -> str:
    files = sorted({test.partition("::")[0] for test in theirs})
    rows = []
    for file in files:
        all_, left = ({test for test in tests if test.startswith(f"{file}::")} for tests in (theirs, theirs - ours))
        reasons = Counter(may_fail.get(test, "not named") for test in left)
        why = "; ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
        rows.append(f"| {file} | {len(all_)} | {len(all_ - left)} | {why} |")
    return f"""\
# Hermes' own tests

`make hermes-tests CHECKOUT=PATH` runs `{TESTS}` of a clone of hermes-agent twice: with Hermes' class, and with ours in
its place (`exchanged.py`). Left out are the files whose subject is what our class replaces. Three of the tests need the
package `anthropic`, and fail with both classes without it.

hermes-agent {hermes_version()}: {len(theirs)} tests pass with Hermes' class, {len(theirs & ours)} of them with ours.
Each of the others is named in `hermes_tests.toml`, with the mechanism that makes it fail.

| file | passed by theirs | by ours | what fails with ours |
|---|---|---|---|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    main()
