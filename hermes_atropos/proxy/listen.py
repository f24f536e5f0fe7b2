"""The proxy on an address, within an event loop that runs or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

import uvicorn

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.proxy.app import proxy_app
from hermes_atropos.proxy.sessions import Sessions
from hermes_atropos.trajectory import AgentResult

__all__ = ["Proxy", "ProxySession"]


#: Seconds for which requests that are being answered may go on when the proxy ends.
SHUTDOWN_S = 5


@dataclass
class ProxySession:
    """An endpoint for one rollout.

    Attributes:
        base_url, api_key: what a harness takes as those of OpenAI.
        trajectory: what the rollout left; there once the block has ended.
    """

    id: str
    base_url: str
    api_key: str
    trajectory: AgentResult | None = None


class Proxy:
    """``proxy_app`` on an address, for ``async with``; every session in it is an endpoint for one rollout.

    ::

        async with Proxy(server) as proxy, proxy.session() as session:
            await run_some_agent(session.base_url, session.api_key)
        session.trajectory.sequences

    Args:
        server, tokenizer, options: as in ``proxy_app``.
        host, port: where it listens; port 0 takes a free one.
        socket: the path of a Unix socket to listen on instead, for a sandbox that has no network.
        key: what a client must send to open sessions over HTTP. By default nobody has it: whoever runs in a session
            can't open another one.

    Attributes:
        sessions: those that are open.
        where: the address that was asked for.

    Raises:
        ConfigurationError: it can't listen there.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        socket: str | None = None,
        key: str | None = None,
        **options: Any,
    ) -> None:
        self.app = proxy_app(server, tokenizer, key=secrets.token_urlsafe() if key is None else key, **options)
        self.sessions: Sessions = self.app.state.sessions
        config = uvicorn.Config(
            self.app,
            host=host,
            port=port,
            uds=socket,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self.where = socket or f"http://{host}:{port}"
        self._server = _Server(config)

    @property
    def url(self) -> str:
        """Where it listens; ``http://localhost`` on a Unix socket."""
        if self._server.config.uds:
            return "http://localhost"
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def __aenter__(self) -> Self:
        self._serving = asyncio.create_task(self._serve(self._server))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise ConfigurationError(f"the proxy ended before it could listen on {self.where}")
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self.sessions:
            await session.end()
        self._server.should_exit = True
        await self._serving

    @contextlib.asynccontextmanager
    async def session(self, **options: Any) -> AsyncIterator[ProxySession]:
        """An endpoint for one rollout; it is closed, and has its trajectory, when the block ends.

        Args:
            options: as in ``Sessions.open``.
        """
        opened = self.sessions.open(**options)
        session = ProxySession(opened.facts.id, f"{self.url}/{opened.facts.id}/v1", opened.facts.key or "none")
        try:
            yield session
        finally:
            session.trajectory = await self.sessions.end(opened.facts.id)

    async def run(self) -> None:
        """Listen until a signal ends the process."""
        await self._serve(uvicorn.Server(self._server.config))

    async def _serve(self, server: uvicorn.Server) -> None:
        try:
            await server.serve()
        except SystemExit as error:  # uvicorn's word for an address that it can't have
            raise ConfigurationError(f"the proxy cannot listen on {self.where}: is the address in use?") from error


class _Server(uvicorn.Server):
    """One that leaves the process's signals to whoever runs the loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
