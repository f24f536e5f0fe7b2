"""Hermes' programs, run in this process: its commands, and the Python files beside its modules."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermes_atropos.errors import ConfigurationError

__all__ = ["run_program"]


def run_program(program: str, arguments: Sequence[str] = (), **exchange: Any) -> None:
    """Run a program of Hermes with our class in place of Hermes', to its end or to the end of the process.

    Args:
        program: a command (``hermes``, ``hermes-acp``), a Python file, or the name of one of Hermes'
            (``batch_runner.py``, ``cli.py``).
        arguments: of the program.
        exchange: arguments of :func:`hermes_atropos.exchanged`.

    Raises:
        ConfigurationError: there is no such program; or as ``exchanged`` says.
        SystemExit: the program ended so.
    """
    commands = importlib.metadata.entry_points(group="console_scripts", name=program)
    file = Path(program)
    module = file.stem if file.suffix == ".py" and file.name == program else None
    if not commands and not file.is_file() and not (module and importlib.util.find_spec(module)):
        known = sorted({found.name for found in importlib.metadata.entry_points(group="console_scripts")})
        hermes = ", ".join(name for name in known if name.startswith("hermes") and name != "hermes-atropos")
        raise ConfigurationError(
            f"{program} is not a program that can be run here: give a command of Hermes ({hermes}), a Python file, or "
            "batch_runner.py or cli.py"
        )
    # From 0.22, Hermes may go on in a Python of its own, where nothing is exchanged, when it is imported.
    os.environ.setdefault("HERMES_DISABLE_LAZY_INSTALLS", "1")
    from hermes_atropos.hermes import seams
    from hermes_atropos.hermes.exchange import exchanged

    sys.argv = [program, *arguments]
    with contextlib.ExitStack() as entered:
        entered.enter_context(exchanged(**exchange))
        for command in commands:
            main = command.load()
            if "hermes_cli.main" in sys.modules and (exchange.get("server") or exchange.get("base_url")):
                # It asks a newcomer to choose a provider.
                entered.enter_context(
                    seams.in_place_of("hermes_cli.main", "_has_any_provider_configured", lambda **_: True)
                )
            sys.exit(main())
        if file.is_file():
            sys.path.insert(0, str(file.parent.absolute()))
            runpy.run_path(str(file), run_name="__main__")
        else:
            runpy.run_module(str(module), run_name="__main__", alter_sys=True)
