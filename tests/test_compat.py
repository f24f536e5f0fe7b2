from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from hermes_atropos.hermes.versions import SUPPORTED

COMPAT = Path(__file__).parent.parent / "compat"


@pytest.fixture
def check():
    return SimpleNamespace(**runpy.run_path(str(COMPAT / "check.py")))


def test_what_is_checked_is_what_the_library_accepts(check):
    for distribution, releases in {
        "hermes-agent": [*check.HERMES, *check.FORKS],
        "atroposlib": check.ATROPOSLIB,
    }.items():
        assert list(SpecifierSet(SUPPORTED[distribution]).filter(releases)) == list(releases)


def test_the_table_says_that_every_pair_works(check):
    rows = list(check.ROW.finditer((COMPAT / "README.md").read_text()))
    assert [row.groups() for row in rows] == sorted(check.ALL, key=check.release_numbers)
    assert all("| works |" in row.group() for row in rows)


def test_a_result_replaces_the_row_of_its_pair_and_keeps_the_order_of_releases(check):
    table = "# Releases\n\n| hermes | atropos | python |\n|---|---|---|\n"
    for hermes, works in [("0.19.0", True), ("0.9.1", True), ("0.19.0", False)]:
        outcome = check.Outcome(works, "a | b")
        table = check.updated(table, check.Pair(hermes, "0.4.0", "3.11"), outcome, "2026-01-01")
    assert table.splitlines()[3:] == [
        "|---|---|---|",
        "| 0.9.1 | 0.4.0 | 3.11 | works | a \\| b | 2026-01-01 |",
        "| 0.19.0 | 0.4.0 | 3.11 | **fails** | a \\| b | 2026-01-01 |",
    ]


def test_the_smoke_test_passes_on_the_locked_releases(tmp_path):
    smoke = subprocess.run([sys.executable, str(COMPAT / "smoke.py")], capture_output=True, text=True, cwd=tmp_path)
    assert smoke.returncode == 0, smoke.stderr
    assert smoke.stdout.endswith("each as the server sampled it\n")


@pytest.fixture
def hermes_tests():
    return SimpleNamespace(**runpy.run_path(str(COMPAT / "hermes_tests.py")))


def test_of_hermes_own_tests_each_that_fails_is_named_and_each_that_is_named_fails(hermes_tests):
    theirs = {"test_a.py::one", "test_a.py::two", "test_a.py::three"}
    ours = {"test_a.py::one", "test_a.py::two"}
    assert hermes_tests.faults(theirs, ours, {"test_a.py::three": "a reason"}) == []
    assert hermes_tests.faults(theirs, ours, {}) == ["fails, and is not named in hermes_tests.toml: test_a.py::three"]
    assert hermes_tests.faults(theirs, ours, {"test_a.py::two": "one", "test_a.py::three": "another"}) == [
        "passes, and is named in hermes_tests.toml: test_a.py::two"
    ]
    row = "| test_a.py | 3 | 2 | 1 × a reason |"
    assert row in hermes_tests.table(theirs, ours, {"test_a.py::three": "a reason"}).splitlines()
