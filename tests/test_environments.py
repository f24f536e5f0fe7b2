"""The environments in ``examples/environments``: doing the work scores 1, doing nothing scores 0, in every item."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig
from tokenizers import Tokenizer

from hermes_atropos.embedded import MODEL
from hermes_atropos.environment import HermesEnv
from hermes_atropos.environment.launch import named
from hermes_atropos.environment.validation import Verdict, validate
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples" / "embedded"))

from errands import HELD_OUT, name

FOLDER = Path(__file__).parents[1] / "examples" / "environments"


def made(kind: type[HermesEnv], folder: Path, **config: Any) -> Any:
    """An environment of this kind on a scripted model."""

    class Server(ScriptedServer):
        def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
            super().__init__(["I would rather not."])

    chatml_tokenizer().save_pretrained(folder / "tokenizer")
    as_it_is = kind.config_init()[0].model_dump() if "config_init" in vars(kind) else {}
    given = kind.env_config_cls(**as_it_is | config | {"tokenizer_name": str(folder / "tokenizer")})
    return type(kind.__name__, (kind,), {"server_cls": Server})(given, [APIServerConfig()])


@pytest.mark.parametrize("name", ["terminal_tasks.py:TerminalTasks", "repairs.py:Repairs", "shop.py:Shop"])
async def test_every_item_can_be_solved_and_is_not_solved_already(name: str, tmp_path: Path) -> None:
    env = made(named(f"{FOLDER}/{name}"), tmp_path)
    items = list(map(repr, env.items()))
    assert len(set(items)) == len(items) >= 20
    assert list(map(repr, env.items())) == items, "the same seed makes the same items"
    verdicts = await validate(env, times=1)
    assert len(verdicts) == len(items)
    assert [verdict for verdict in verdicts if verdict.faults] == []
    assert {(verdict.oracle, verdict.null) for verdict in verdicts} == {(1.0, 0.0)}


async def test_every_errand_can_be_done_and_is_not_done_already(tmp_path: Path) -> None:
    errands = FOLDER.parent / "embedded" / "errands.py"
    env = made(named(f"{errands}:Errands"), tmp_path)
    verdicts = await validate(env, times=1)
    assert len({verdict.item for verdict in verdicts}) == env.config.eval_size
    assert {(verdict.oracle, verdict.null, verdict.faults) for verdict in verdicts} == {(1.0, 0.0, ())}


def test_names_that_are_not_taught_consist_of_tokens_that_are() -> None:
    """A name with a token that teaching hardly had can't be copied, and where nothing succeeds nothing is learned."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def tokens(word: str) -> list[int]:
        ids: list[int] = tokenizer.encode(f"`{word}`").ids
        return ids

    rng = random.Random(0)
    taught = Counter(token for _ in range(10_000) for token in tokens(name(rng, taught=True)))
    rare = {held for held in HELD_OUT if min(taught[token] for token in tokens(held)) < 10}
    assert rare == set()


class Wrong(HermesEnv):
    """Each item has a verifier with a fault of its own."""

    name = "wrong"

    def items(self) -> list[str]:
        return ["generous", "raises", "hangs", "moody", "right"]

    def prompt(self, item: str) -> str:
        return item

    async def verify(self, item: str, task: Any, result: Any) -> float:
        self.asked = getattr(self, "asked", 0) + 1
        match item:
            case "raises":
                raise ZeroDivisionError
            case "hangs":
                await task.terminal("sleep 60")
            case "generous":
                return 1.0
            case "moody":
                return float(self.asked)
        return float(result["final_response"] == "solved")

    async def solve(self, item: str, task: Any) -> str:
        return "solved"


async def test_a_verifier_that_is_wrong_is_named_with_its_item(tmp_path: Path) -> None:
    found = {verdict.item: verdict for verdict in await validate(made(Wrong, tmp_path, verify_timeout=2))}
    assert found["'right'"] == Verdict("'right'", 1.0, 0.0, ())
    for item, words in {
        "generous": "doing nothing 1",
        "raises": "ZeroDivisionError",
        "hangs": "verify_timeout=2",
        "moody": "and then",
    }.items():
        assert words in " ".join(found[repr(item)].faults)


async def test_an_item_without_a_solution_is_named(tmp_path: Path) -> None:
    class Unsolved(Wrong):
        solve = HermesEnv.solve

        def items(self) -> list[str]:
            return ["right"]

    [verdict] = await validate(made(Unsolved, tmp_path))
    assert verdict.faults == ("it has no solution: write solve()",)


@pytest.mark.parametrize("name", ["nowhere:Env", "shop", "json:Env", f"{FOLDER}/shop.py:Market"])
def test_a_name_that_names_no_environment_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="does not name an environment"):
        named(name)
