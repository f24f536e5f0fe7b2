"""Many sessions at once, whose clients do everything wrong: none has anything of another, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import re
import weakref
from collections import Counter
from typing import Any

from support import LIMIT

from hermes_atropos.proxy import Proxy
from hermes_atropos.testing import Reply, ScriptedServer
from hermes_atropos.trajectory import AgentResult

SESSIONS = 64
BIG = 10 * 2**20  # bytes


class Client:
    """One session's, over a socket of its own for each request, so that it can misbehave.

    Attributes:
        had: the answers that it had, in order.
    """

    def __init__(self, proxy: Proxy, number: int) -> None:
        self.session = proxy.sessions.open()
        self.address = proxy.url.removeprefix("http://").split(":")
        self.number = number
        self.random = random.Random(number)
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": f"I am number <{number}>."}]
        self.had: list[str] = []

    async def send(self, body: bytes, key: str | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address, limit=2**16)
        head = [
            f"POST /{self.session.facts.id}/v1/chat/completions HTTP/1.1",
            "Host: proxy",
            "Connection: close",
            f"Authorization: Bearer {key or self.session.facts.key}",
            f"Content-Length: {len(body)}",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        return reader, writer

    async def ask(self, body: Any, key: str | None = None, *, slowly: bool = False) -> tuple[int, bytes]:
        """Status and body of an answer."""
        reader, writer = await self.send(body if isinstance(body, bytes) else json.dumps(body).encode(), key)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        said = b""
        while part := await reader.read(7 if slowly else -1):
            said += part
            if slowly:
                await asyncio.sleep(0)
        writer.close()
        head, _, answer = said.partition(b"\r\n\r\n")
        return int(head.split()[1]), answer

    async def hang_up(self, body: Any) -> None:
        """Ask, and go away before the answer is there."""
        _, writer = await self.send(json.dumps(body).encode())
        await writer.drain()
        await asyncio.sleep(self.random.random() / 20)
        writer.transport.abort()

    async def go_on(self, *, stream: bool) -> None:
        """One turn as it should be."""
        status, said = await self.ask({"messages": self.messages, "stream": stream}, slowly=stream)
        assert status == 200, said
        content = "".join(re.findall(r'"content": ?"([^"]*)"', said.decode()))
        self.had.append(content)
        self.messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "And now?"}]

    async def misbehave(self) -> None:
        """Something that must change nothing."""
        body = {"messages": self.messages}
        match self.random.randrange(6):
            case 0:
                await self.hang_up(body)
            case 1:
                assert (await self.ask(body, key="sk-session-of-another"))[0] == 401
            case 2:
                assert (await self.ask(b'{"messages": [' + b"x" * 50))[0] == 400
            case 3:
                assert (await self.ask({"messages": [{"role": "user", "content": [{"type": "x"}]}]}))[0] == 400
            case 4:
                _, writer = await self.send(b"")  # says nothing more, and is never closed by the client
                await writer.drain()
            case 5 if self.number % 8 == 0:
                padding = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * BIG}}]}
                assert (await self.ask({"messages": [padding]}))[0] == 400

    async def run(self) -> None:
        for turn in range(3):
            await self.misbehave()
            await self.go_on(stream=(self.number + turn) % 2 == 0)


async def model(messages: list[dict[str, str]]) -> str | Reply:
    said = f"I answer {messages[0]['content']}, {sum(message['role'] == 'assistant' for message in messages)}."
    return Reply(said, latency=random.random() / 50)


async def test_nothing_leaks_and_nothing_is_left() -> None:
    server = ScriptedServer(model)
    async with Proxy(server) as proxy:
        clients = [Client(proxy, number) for number in range(SESSIONS)]
        async with asyncio.timeout(2 * LIMIT):
            await asyncio.gather(*[client.run() for client in clients])
        results: list[AgentResult] = [await proxy.sessions.end(client.session.facts.id) for client in clients]
        sessions = [weakref.ref(client.session) for client in clients]
        for client, result in zip(clients, results, strict=True):
            assert client.had == [f"I answer I am number <{client.number}>., {turn}." for turn in range(3)]
            told = {number for sequence in result.sequences for number in re.findall(r"<(\d+)>", sequence.full_text)}
            assert told == {str(client.number)}
            assert result.fidelity is not None
            assert result.fidelity.tokens_trained + result.fidelity.tokens_discarded == result.fidelity.tokens_sampled
        trained = Counter(
            tuple(sequence.tokens[: span.end])
            for result in results
            for sequence in result.sequences
            for span in sequence.spans
            if span.trained
        )
        sampled = Counter((*request.prompt_ids, *ids) for request in server.requests for ids in request.output_ids)
        assert trained <= sampled
        assert len(trained) >= 3 * SESSIONS
        del clients, client
        gc.collect()
        assert [session for session in sessions if session() is not None] == []
