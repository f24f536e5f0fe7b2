"""The ``hermes-atropos`` command.

hermes-atropos view RECORD [--html OUT.html]    show a recorded rollout, in the terminal or as an HTML page
hermes-atropos probe URL [--model NAME]         say in one sentence what answers at a URL
hermes-atropos versions                         say what is installed, and whether it is supported
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hermes_atropos.errors import ConfigurationError, HermesAtroposError, RecordError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 where something is wrong, which one sentence on stderr names."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except HermesAtroposError as error:
        print(f"hermes-atropos: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hermes-atropos", description="Look at rollouts and at inference servers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    view = commands.add_parser("view", help="show a recorded rollout")
    view.add_argument("record", metavar="RECORD", type=Path, help="a file that write_record wrote")
    view.add_argument("--html", metavar="OUT.html", type=Path, help="write one self-contained HTML page instead")
    view.add_argument("--index", metavar="N", type=int, default=0, help="which record of the file, from 0")
    view.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="the model's, to show each token's text")
    view.set_defaults(run=_view)

    probe = commands.add_parser("probe", help="say what answers at a URL")
    probe.add_argument("url", metavar="URL", help="an inference server's address, with or without /v1")
    probe.add_argument("--model", metavar="NAME", help="the model to ask for; by default the one listed first")
    probe.add_argument("--api-key", metavar="KEY", help="where the server asks for one")
    probe.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="compare it with the server's own")
    probe.set_defaults(run=_probe)

    versions = commands.add_parser("versions", help="say what is installed, and whether it is supported")
    versions.set_defaults(run=_versions)
    return parser


def _view(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hermes_atropos import viewer
    from hermes_atropos.rendering.tokenizers import load_tokenizer
    from hermes_atropos.trajectory import read_records

    result = next(islice(read_records(options.record), max(options.index, 0), None), None)
    if result is None or options.index < 0:
        count = sum(1 for _ in read_records(options.record))
        if not count:
            raise RecordError(f"{options.record} is empty: the rollout was never written; run it again")
        raise RecordError(f"{options.record} has no record {options.index}: pass --index 0 to {count - 1}")
    shown = viewer.view(
        result,
        load_tokenizer(options.tokenizer) if options.tokenizer else None,
        title=f"{options.record.name}, record {options.index}",
    )
    if options.html is None:
        Console(highlight=False, soft_wrap=True).print(viewer.to_terminal(shown))
        return
    try:
        options.html.write_text(viewer.to_html(shown), "utf-8")
    except OSError as error:
        raise ConfigurationError(f"{options.html} cannot be written: {error}") from error
    print(f"{options.html}: open it in a browser")


def _probe(options: argparse.Namespace) -> None:
    from hermes_atropos.rendering.tokenizers import load_tokenizer
    from hermes_atropos.servers.probe import probe

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    found = asyncio.run(probe(options.url, options.model, tokenizer, options.api_key))
    if found.problem is not None:
        raise found.problem
    print(found)


def _versions(options: argparse.Namespace) -> None:
    from hermes_atropos.hermes.versions import SUPPORTED, check_versions
    from hermes_atropos.trajectory.records import package_versions

    for name, version in package_versions().items():
        supported = f"  (supported: {SUPPORTED[name]})" if name in SUPPORTED else ""
        print(f"{name} {version}{supported}")
    check_versions()
