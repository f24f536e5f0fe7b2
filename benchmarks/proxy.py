"""What a proxy adds to a request: ours beside atroposlib's, a bare reverse proxy, and no proxy at all, in one run.

    python benchmarks/proxy.py            to 100,000 tokens of history, then 64 sessions at once
    python benchmarks/proxy.py --short    to 10,000 tokens, then 8 sessions

Each side is a process of its own, whose model answers at once. A client holds conversations, 500 tokens more with each
request. Printed per side, for the requests around each length: the median milliseconds that the client waits, and the
mean milliseconds of processor time in the side's process, which a busy machine does not change. Then the same for many
sessions at once. ``direct`` is an endpoint with a canned answer; ``bare`` hands each request on to it. The last line is
one JSON object of the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx

SENTENCE = (
    "the files in this folder are listed below, and each line of Python was counted before the command finished. "
)
QUESTION = SENTENCE * 24
ANSWER = SENTENCE * 2
TURN_TOKENS = 500
WINDOW = 4  # requests around each length
ROUNDS = 9
SIDES = ("direct", "bare", "ours", "atroposlib")


def app_of(side: str, upstream: str) -> Any:
    """A side's application, and how it opens a session: the URL of the endpoint is ``/{id}/v1``."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    if side in ("ours", "atroposlib"):
        from atroposlib.envs.server_handling.managed_server_proxy import create_app

        from hermes_atropos.proxy import proxy_app
        from hermes_atropos.testing import ScriptedServer

        class InstantModel(ScriptedServer):
            async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> tuple[Any, ...]:
                ids = kwargs.get("input_ids") or self.tokenizer.encode(kwargs["prompt"], add_special_tokens=False)
                return ids, [list(output)], [[-0.5] * len(output)], ["stop"]

        model = InstantModel([])
        model.server_healthy = True
        output = [*model.tokenizer.encode(ANSWER, add_special_tokens=False), model.tokenizer.eos_token_id]
        if side == "ours":
            return proxy_app(model, context_length=1_000_000)
        manager: Any = SimpleNamespace(servers=[model], max_n_completions=8)
        return create_app(manager, model.tokenizer, "instant")

    client = httpx.AsyncClient(timeout=None)

    async def chat(request: Request) -> Response:
        body = await request.body()
        if side == "bare":
            answer = await client.post(f"{upstream}{request.url.path}", content=body)
            return Response(answer.content, media_type="application/json")
        json.loads(body)
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice]})

    async def create(request: Request) -> Response:
        return JSONResponse({"uuid": "x"})

    return Starlette(
        routes=[
            Route("/sessions/create", create, methods=["POST"]),
            Route("/{id}/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


def serve(side: str, upstream: str) -> None:
    import socket

    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    app = app_of(side, upstream)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


class Side:
    """A process with an application, and a client of it."""

    def __init__(self, name: str, upstream: str) -> None:
        command = [sys.executable, __file__, "--side", name, "--upstream", upstream]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def cpu_s(self) -> float:
        """Seconds of processor time that the process has used (Linux' clock of another process)."""
        return time.clock_gettime(~self.process.pid << 3 | 2)

    async def conversation(self, client: httpx.AsyncClient, tokens: int) -> tuple[list[float], float]:
        """Seconds of the last requests of a conversation that grows to so many tokens, and their processor time."""
        session = (await client.post("/sessions/create", json={})).json()["uuid"]
        messages: list[dict[str, str]] = [{"role": "system", "content": "You count."}]
        seconds: list[float] = []
        turns = tokens // TURN_TOKENS + WINDOW // 2
        for turn in range(turns):
            if turn == turns - WINDOW:
                cpu = self.cpu_s()
            messages.append({"role": "user", "content": QUESTION})
            body = {"messages": messages, "model": "x", "max_tokens": 1000}
            start = time.perf_counter()
            answer = await client.post(f"/{session}/v1/chat/completions", json=body)
            seconds.append(time.perf_counter() - start)
            answer.raise_for_status()
            messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        cpu = self.cpu_s() - cpu
        await client.delete(f"/{session}")
        return seconds[-WINDOW:], cpu / WINDOW

    async def measure(self, lengths: list[int], sessions: int) -> dict[str, float]:
        figures = {}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            await self.conversation(client, 10_000)
            for length in lengths:
                times, cpu = zip(*[await self.conversation(client, length) for _ in range(ROUNDS)], strict=True)
                figures[f"ms_at_{length}"] = statistics.median(second for one in times for second in one) * 1000
                figures[f"cpu_ms_at_{length}"] = statistics.median(cpu) * 1000
            start, cpu_start = time.perf_counter(), self.cpu_s()
            await asyncio.gather(*[self.conversation(client, 10_000) for _ in range(sessions)])
            requests = sessions * (10_000 // TURN_TOKENS + WINDOW // 2)
            figures[f"requests_per_s_of_{sessions}"] = requests / (time.perf_counter() - start)
            figures[f"cpu_ms_of_{sessions}"] = (self.cpu_s() - cpu_start) / requests * 1000
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="10,000 tokens and 8 sessions")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.upstream)
        return
    lengths, sessions = ([1_000, 10_000], 8) if options.short else ([1_000, 10_000, 100_000], 64)
    sides: dict[str, Side] = {}
    figures: dict[str, Any] = {}
    try:
        for name in SIDES:
            sides[name] = Side(name, sides["direct"].url if sides else "")
            figures[name] = asyncio.run(sides[name].measure(lengths, sessions))
            print(name, *(f"{figure} {value:.2f}" for figure, value in figures[name].items()), sep="\n  ", flush=True)
    finally:
        for side in sides.values():
            side.process.terminate()
            side.process.wait()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
