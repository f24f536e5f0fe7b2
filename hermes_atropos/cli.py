"""The ``hermes-atropos`` command; ``hermes-atropos --help`` says what it does."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hermes_atropos.errors import ConfigurationError, HermesAtroposError, RecordError, SandboxUnavailableError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 where something is wrong, which one sentence on stderr names."""
    options = _parsed(arguments)
    try:
        options.run(options)
    except HermesAtroposError as error:
        print(f"hermes-atropos: {error}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if "arguments" in options:
        options.arguments = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hermes-atropos", description="Look at rollouts and at inference servers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    view = commands.add_parser("view", help="show a recorded rollout")
    view.add_argument("record", metavar="RECORD", type=Path, help="a file that write_record wrote")
    view.add_argument("--html", metavar="OUT.html", type=Path, help="write one self-contained HTML page instead")
    view.add_argument("--groups", metavar="FOLDER", type=Path, help="write pages of all rollouts, by group")
    view.add_argument("--index", metavar="N", type=int, default=0, help="which record of the file, from 0")
    view.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", help="the model's, for a record that lacks the texts of its tokens"
    )
    view.set_defaults(run=_view)

    probe = commands.add_parser("probe", help="say what answers at a URL")
    probe.add_argument("url", metavar="URL", help="an inference server's address, with or without /v1")
    probe.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="compare it with the server's own")
    probe.set_defaults(run=_probe)

    proxy = commands.add_parser("proxy", help="serve an OpenAI-compatible endpoint for each rollout")
    proxy.add_argument("--server", metavar="URL", required=True, help="an inference server that returns token ids")
    proxy.add_argument("--records", metavar="FOLDER", type=Path, default=Path("rollouts"), help="default: %(default)s")
    proxy.add_argument("--host", default="127.0.0.1", help="where to listen; default: %(default)s")
    proxy.add_argument("--port", type=int, default=9100, help="default: %(default)s")
    proxy.add_argument("--socket", metavar="PATH", help="listen on a Unix socket instead")
    proxy.add_argument("--key", default="", help="what clients must send to open and list sessions; by default nothing")
    proxy.add_argument(
        "--idle", metavar="SECONDS", type=float, default=3600, help="an idle session ends; default: an hour"
    )
    for limit in ("max-tokens", "max-requests", "max-seconds"):
        kind = float if limit == "max-seconds" else int
        proxy.add_argument(f"--{limit}", metavar="N", type=kind, help="limit of a session; by default none")
    proxy.set_defaults(run=_proxy)

    run = commands.add_parser("run", help="run a program of Hermes on an inference server, and record its sessions")
    run.add_argument("--server", metavar="URL", help="an inference server; by default each agent's own base_url")
    run.add_argument("--records", metavar="FILE", type=Path, help="record each conversation in this file")
    run.add_argument("command", metavar="PROGRAM ARGS", nargs=argparse.REMAINDER, help="after --, as: hermes -z Hello")
    run.set_defaults(run=_run)
    for command in (probe, proxy, run):
        command.add_argument("--model", metavar="NAME", help="the model to ask for; by default the one listed first")
        command.add_argument("--api-key", metavar="KEY", help="where the server asks for one")
    for command in (proxy, run):
        command.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="the model's; by default the server's own")

    serve = commands.add_parser("serve", help="serve a trainer with an environment", allow_abbrev=False)
    serve.add_argument("--processes", metavar="N", type=int, help="default: 1; on a cluster, as many as have room")
    serve.add_argument("--ray", metavar="ADDRESS", help="roll out on a Ray cluster: auto, local or its address")
    serve.add_argument("--cores", metavar="N", type=float, default=1, help="of each on a cluster; default: %(default)s")
    serve.set_defaults(run=_serve, arguments=[])
    evaluate = commands.add_parser("evaluate", help="roll out each item of an environment once", allow_abbrev=False)
    evaluate.set_defaults(run=_evaluate, arguments=[])
    validate = commands.add_parser("validate", help="ask an environment's verifier of solutions, and of doing nothing")
    validate.set_defaults(run=_validate)
    for command in (serve, evaluate, validate):
        command.add_argument("environment", metavar="MODULE:CLASS", help="or FILE.py:CLASS")
    for command in (serve, evaluate):
        command.epilog = "All other arguments are atroposlib's, as --env.group_size 8."

    versions = commands.add_parser("versions", help="say what is installed, and whether it is supported")
    versions.set_defaults(run=_versions)

    doctor = commands.add_parser("doctor", help="say what this machine can do")
    doctor.set_defaults(run=_doctor)
    return parser


def _view(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hermes_atropos import viewer
    from hermes_atropos.overview import write_overview
    from hermes_atropos.rendering.tokenizers import load_tokenizer
    from hermes_atropos.trajectory import read_records

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if options.groups is not None:
        print(f"{write_overview(options.record, options.groups, tokenizer)}: open it in a browser")
        return
    result = next(islice(read_records(options.record), max(options.index, 0), None), None)
    if result is None or options.index < 0:
        count = sum(1 for _ in read_records(options.record))
        if not count:
            raise RecordError(f"{options.record} is empty: the rollout was never written; run it again")
        raise RecordError(f"{options.record} has no record {options.index}: pass --index 0 to {count - 1}")
    shown = viewer.view(result, tokenizer, title=f"{options.record.name}, record {options.index}")
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


def _proxy(options: argparse.Namespace) -> None:
    from hermes_atropos.proxy import Limits, Proxy
    from hermes_atropos.rendering.tokenizers import load_tokenizer
    from hermes_atropos.servers.probe import probe

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    found = asyncio.run(probe(options.server, options.model, tokenizer, options.api_key))
    if found.problem is not None:
        raise found.problem
    proxy = Proxy(
        found.server,
        tokenizer,
        host=options.host,
        port=options.port,
        socket=options.socket,
        key=options.key,
        records=options.records,
        idle_s=options.idle,
        limits=Limits(options.max_tokens, options.max_requests, options.max_seconds),
    )
    print(f"{found}; POST {proxy.where}/sessions opens an endpoint", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(proxy.run())


def _run(options: argparse.Namespace) -> None:
    from hermes_atropos.hermes.programs import run_program

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise ConfigurationError("no program: give one behind --, as in hermes-atropos run -- hermes -z Hello")
    given = {"base_url": options.server, "model": options.model, "api_key": options.api_key, "records": options.records}
    if options.tokenizer:
        given["tokenizer"] = options.tokenizer
    run_program(command[0], command[1:], **given)


def _serve(options: argparse.Namespace) -> None:
    from hermes_atropos.environment import launch

    if options.processes is not None and options.processes < 1:
        raise ConfigurationError(f"--processes {options.processes}: give 1 or more")
    if options.ray is not None:
        from hermes_atropos.environment import cluster

        cluster.serve(options.environment, options.ray, options.processes, options.cores, options.arguments)
    elif options.processes in (None, 1):
        launch.run(launch.named(options.environment), "serve", options.environment, options.arguments)
    else:
        launch.named(options.environment)  # found wrong here once, and not by each process
        launch.supervise(options.environment, options.processes, options.arguments)


def _evaluate(options: argparse.Namespace) -> None:
    from hermes_atropos.environment.launch import named, run

    run(named(options.environment), "evaluate", options.environment, options.arguments)


def _validate(options: argparse.Namespace) -> None:
    from hermes_atropos.environment.launch import named
    from hermes_atropos.environment.validation import validate

    environment = named(options.environment)
    verdicts = asyncio.run(validate(environment(*environment.config_init())))
    wrong = [verdict for verdict in verdicts if verdict.faults]
    for verdict in wrong:
        print(f"{verdict.item}: {'; '.join(verdict.faults)}")
    print(f"{len(verdicts) - len(wrong)} of {len(verdicts)} items: solved scores above not done, and twice the same")
    if wrong:
        raise ConfigurationError(f"the verifier of {options.environment} is wrong of {len(wrong)} items")


def _versions(options: argparse.Namespace) -> None:
    from hermes_atropos.hermes.versions import SUPPORTED, check_versions
    from hermes_atropos.trajectory.records import package_versions

    for name, version in package_versions().items():
        supported = f"  (supported: {SUPPORTED[name]})" if name in SUPPORTED else ""
        print(f"{name} {version}{supported}")
    check_versions()


def _doctor(options: argparse.Namespace) -> None:
    from hermes_atropos.sandbox.limits import mechanisms
    from hermes_atropos.sandbox.wall import bubblewrap, try_wall
    from hermes_atropos.trajectory.records import package_versions

    for name, version in package_versions().items():
        print(f"{name}: {version}")
    try:
        path, release = bubblewrap()
        print(f"bubblewrap: {'.'.join(map(str, release))} ({path})")
        print(f"wall: it stands, within {try_wall() * 1000:.0f} ms")
    except SandboxUnavailableError as error:
        print(f"wall: none. {error}")
    for limit, mechanism in mechanisms().items():
        print(f"limit of {limit}: {mechanism}")
    docker = shutil.which("docker")
    answers = docker and subprocess.run([docker, "info"], capture_output=True, timeout=60, check=False).returncode == 0
    print(f"docker: {'its daemon answers' if answers else 'its daemon does not answer' if docker else 'not installed'}")
