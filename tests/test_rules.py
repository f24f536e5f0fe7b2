"""The rules of the house that no import contract can express (pyproject.toml has those)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import run_script

PACKAGE = Path(__file__).parents[1] / "hermes_atropos"

#: The rooms that know what a trainer wants.
TRAINERS = ("exports", "environment")

#: Words of Atropos' group dictionaries. A model's messages and logprobs are everybody's.
TRAINERS_WORDS = {"inference_logprobs", "group_overrides", "generation_params", "ref_logprobs"}


def rooms(*but: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package, except those of some rooms."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(but):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def masks_and_words(module: ast.Module) -> list[str]:
    """Where a module writes Atropos' mask, −100, or a word of its group dictionaries; docstrings don't count."""
    texts = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(module):
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=100)):
                found.append(f"line {node.lineno}: -100")
            case ast.Constant(value=str() as word) if word in TRAINERS_WORDS and id(node) not in texts:
                found.append(f"line {node.lineno}: {word}")
    return found


def test_rule_3_only_exports_and_environment_know_a_trainers_format() -> None:
    assert {name: found for name, module in rooms(*TRAINERS) if (found := masks_and_words(module))} == {}
    assert any(masks_and_words(module) for name, module in rooms() if name.startswith(TRAINERS))


def test_rule_2_of_openai_only_types_are_used_outside_of_servers_and_backends() -> None:
    def imported(module: ast.Module) -> list[str]:
        return [
            name
            for node in ast.walk(module)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if name.split(".")[0] == "openai" and not name.startswith("openai.types")
        ]

    assert {name: found for name, module in rooms("servers", "backends") if (found := imported(module))} == {}


#: What an import could change: told as text, so that the script below can print it twice.
STATE = """
import gc, os, sys, threading
def state():
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names)
    return [dict(os.environ), gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(),
            sorted(thread.name for thread in threading.enumerate()), files, sys.getswitchinterval()]
"""


def test_rule_4_importing_the_environment_changes_nothing(tmp_path: Path) -> None:
    script = f"{STATE}\nbefore = state()\nimport hermes_atropos.environment\nprint(state() == before)"
    assert run_script(script, tmp_path, fresh=True, OPENAI_API_KEY="sk-0123456789abcdef").stdout.split() == ["True"]


def test_rule_4_importing_any_room_changes_nothing(tmp_path: Path) -> None:
    """What Hermes itself does when it is imported is Hermes'; it is imported first."""
    script = f"""{STATE}
import importlib, pkgutil, run_agent, atroposlib.envs.base, transformers, renderers, hermes_atropos
before = state()
names = [found.name for found in pkgutil.walk_packages(hermes_atropos.__path__, "hermes_atropos.")]
for name in names:
    importlib.import_module(name)
print(len(names) > 40, [then for then, now in zip(before, state()) if then != now])
"""
    assert (
        run_script(script, tmp_path, fresh=True, HERMES_HOME=str(tmp_path / "home")).stdout.splitlines()[-1]
        == "True []"
    )


@pytest.mark.parametrize("name", [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))])
def test_no_room_is_over_500_lines(name: str) -> None:
    assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) <= 500
