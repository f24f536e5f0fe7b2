"""The agent against the stock agent: 64 rollouts of 6 model calls and 5 terminal commands each, the same replies.

Stock is Hermes' ``AIAgent`` over HTTP to an OpenAI-compatible stub in a process of its own, as many threads at once as
suit it best of those tried. Ours is ``AtroposAIAgent`` on a server that costs next to nothing, each rollout in a
sandbox of its own. Each side runs in a fresh process, ours after each run of stock: the ratio is the median of those of
neighbouring runs, because a shared machine is slower in one minute than in the next. The last line printed is one JSON
object of the figures.

    python benchmarks/harness.py [--rollouts 64] [--rounds 3] [--sandbox folder|none] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from small_agent import COMMANDS, command, quick_server, terminal_replies

STOCK_THREADS = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="8 rollouts, one round")
    parser.add_argument("--sandbox", choices=["folder", "walled", "none"], default="walled", help="of our side")
    parser.add_argument("--side", choices=["stock", "ours", "stub"], help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rollouts, options.rounds = 8, 1
    if options.side == "stub":
        serve_stub()
    elif options.side:
        figures = run_stock(options) if options.side == "stock" else asyncio.run(run_ours(options))
        figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(figures))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    runs: dict[str, list[dict[str, Any]]] = {"ours": []} | {f"stock_{threads}": [] for threads in STOCK_THREADS}
    for _ in range(options.rounds):
        for threads in STOCK_THREADS:
            stock, ours = (
                run_side("stock", options.rollouts, threads),
                run_side("ours", options.rollouts, sandbox=options.sandbox),
            )
            runs[f"stock_{threads}"].append(stock | {"ratio": ours["calls_per_s"] / stock["calls_per_s"]})
            runs["ours"].append(ours)
    medians = {
        side: {key: statistics.median(run[key] for run in figures) for key in figures[0]}
        for side, figures in runs.items()
    }
    best = max((side for side in runs if side != "ours"), key=lambda side: medians[side]["calls_per_s"])
    for side, figures in medians.items():
        print(
            f"{side:>9}: {figures['calls_per_s']:6.1f} calls/s  {figures['ms_per_call']:6.1f} ms/call  "
            f"{figures['construct_ms']:6.1f} ms to construct  {figures['sandbox_ms']:6.1f} ms to open a sandbox  "
            f"{figures['peak_rss_mb']:5.0f} MB"
        )
    ratio = medians[best].pop("ratio")
    print(f"ours does {ratio:.1f} times the calls a second of the best stock run")
    print(
        json.dumps(
            {"rollouts": options.rollouts, "ratio_calls_per_s": round(ratio, 2)}
            | {f"ours_{key}": round(value, 2) for key, value in medians["ours"].items()}
            | {f"stock_{key}": round(value, 2) for key, value in medians[best].items()}
        )
    )


def run_side(side: str, rollouts: int, threads: int = 0, sandbox: str = "folder") -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HERMES_HOME": f"{home}/.hermes", "TERMINAL_CWD": home}
        arguments = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--side",
            side,
            "--rollouts",
            str(rollouts),
            "--threads",
            str(threads),
        ]
        arguments += ["--sandbox", sandbox]
        done = subprocess.run(
            arguments, env=environment, cwd=home, stdout=subprocess.PIPE, text=True, check=True, timeout=900
        )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def figures_of(rollouts: int, seconds: float, construct: list[float], sandbox: list[float]) -> dict[str, float]:
    calls = rollouts * (COMMANDS + 1)
    return {
        "calls_per_s": calls / seconds,
        "ms_per_call": seconds / calls * 1e3,
        "construct_ms": statistics.median(construct) * 1e3,
        "sandbox_ms": statistics.median(sandbox) * 1e3,
    }


def timed(function: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


async def run_ours(options: argparse.Namespace) -> dict[str, float]:
    from hermes_atropos import use_training_profile

    use_training_profile()
    from hermes_atropos import AtroposAIAgent
    from hermes_atropos.hermes.terminal import HermesSandbox
    from hermes_atropos.hermes.walled import WalledSandbox

    server = quick_server(terminal_replies())

    def construct() -> AtroposAIAgent:
        return AtroposAIAgent(server=server, enabled_toolsets=["terminal", "file"], quiet_mode=True)

    agent = construct()

    async def rollout() -> None:
        if options.sandbox == "none":
            assert (await agent.run_conversation_async("Do the steps."))["api_calls"] == COMMANDS + 1
            return
        async with agent.task(sandbox=options.sandbox) as task:
            result = await task.run("Do the steps.")
            assert result["api_calls"] == COMMANDS + 1, result["error"]
            assert (await task.read_file(f"step{COMMANDS - 1}.txt")).startswith("step")

    await asyncio.gather(rollout(), rollout())
    start = time.perf_counter()
    await asyncio.gather(*[rollout() for _ in range(options.rollouts)])
    seconds = time.perf_counter() - start
    sandboxes = [timed(WalledSandbox if options.sandbox == "walled" else HermesSandbox) for _ in range(20)]
    for _, sandbox in sandboxes:
        sandbox.release()
    constructed = [timed(construct)[0] for _ in range(20)]
    return figures_of(options.rollouts, seconds, constructed, [seconds for seconds, _ in sandboxes])


def run_stock(options: argparse.Namespace) -> dict[str, float]:
    home = Path(os.environ["HERMES_HOME"])
    home.mkdir(parents=True)
    home.joinpath("config.yaml").write_text("model:\n  context_length: 131072\n")
    stub = subprocess.Popen([sys.executable, __file__, "--side", "stub"], stdout=subprocess.PIPE, text=True)
    assert stub.stdout is not None
    base_url = stub.stdout.readline().strip()
    try:
        from run_agent import AIAgent
        from tools import terminal_tool

        from hermes_atropos.hermes.releases import release

        def construct() -> AIAgent:
            return AIAgent(
                base_url=base_url,
                api_key="none",
                provider="custom",
                model="stub",
                max_tokens=1024,
                tool_delay=0,
                enabled_toolsets=["terminal", "file"],
                quiet_mode=True,
                skip_context_files=True,
                skip_memory=True,
            )

        def rollout(number: int) -> None:
            task_id = f"stock-{number}"
            workspace = tempfile.mkdtemp(dir=home)
            terminal_tool.register_task_env_overrides(task_id, {"env_type": "local", "cwd": workspace})
            result = construct().run_conversation("Do the steps.", task_id=task_id)
            release().lifecycle().cleanup_vm(task_id)
            terminal_tool.clear_task_env_overrides(task_id)
            assert result["api_calls"] == COMMANDS + 1, result.get("error")

        rollout(-1)
        with ThreadPoolExecutor(options.threads) as pool:
            seconds, _ = timed(lambda: list(pool.map(rollout, range(options.rollouts))))
        opened = [timed(open_stock_environment) for _ in range(5)]
        return figures_of(
            options.rollouts, seconds, [timed(construct)[0] for _ in range(20)], [seconds for seconds, _ in opened]
        )
    finally:
        stub.terminate()
        stub.wait()


def open_stock_environment() -> None:
    from tools.environments.local import LocalEnvironment

    LocalEnvironment(cwd=tempfile.gettempdir(), timeout=60).cleanup()


def serve_stub() -> None:
    """An OpenAI-compatible chat endpoint with the replies of the script, streamed if asked for."""
    import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def chat(request: Request) -> Response:
        body = await request.json()
        turns = sum(message["role"] == "assistant" for message in body["messages"])
        message: dict[str, Any] = {"role": "assistant", "content": "All steps are done."}
        if turns < COMMANDS:
            function = {"name": "terminal", "arguments": json.dumps({"command": command(turns)})}
            message = {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"index": 0, "id": f"call_{os.urandom(8).hex()}", "type": "function", "function": function}
                ],
            }
        finish = "tool_calls" if turns < COMMANDS else "stop"
        head = {"id": "stub", "created": 0, "model": "stub"}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return JSONResponse(head | {"object": "chat.completion", "choices": [choice]})
        chunks = [{"index": 0, "delta": message}, {"index": 0, "delta": {}, "finish_reason": finish}]
        lines = [json.dumps(head | {"object": "chat.completion.chunk", "choices": [chunk]}) for chunk in chunks]
        events = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
        return StreamingResponse(iter([events]), media_type="text/event-stream")

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


if __name__ == "__main__":
    main()
