"""A command of yours as the agent: it runs in a task's sandbox, on an endpoint of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from hermes_atropos import harness
from hermes_atropos.errors import ConfigurationError, SandboxError
from hermes_atropos.proxy.listen import Proxy
from hermes_atropos.runtime import run_in_rollout_thread, run_to_end
from hermes_atropos.sandbox import CommandResult, Sandbox
from hermes_atropos.sandbox.wall import WallArguments
from hermes_atropos.trajectory import AgentResult, StopReason

__all__ = ["CommandAgent", "CommandTask"]

#: Where the endpoint is behind a wall: there is no network, and so no other on this port.
PORT = 8000

#: Hands what comes to the port on to the proxy's socket, and back. Most agents know only addresses.
RELAY = f"""
import asyncio, sys

async def carry(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def connected(reader, writer):
    there, back = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)

async def main():
    server = await asyncio.start_server(connected, "127.0.0.1", {PORT})
    await server.serve_forever()

asyncio.run(main())
"""
START = f"""
python3 -c "$RELAY" "$SOCKET" </dev/null >/dev/null 2>&1 &
for _ in {{1..200}}; do (exec 3<>/dev/tcp/127.0.0.1/{PORT}) 2>/dev/null && exit 0; sleep 0.05; done; exit 1
"""


class CommandAgent:
    """Runs a command as the agent of each task.

    The command finds ``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and, in ``PROMPT``, the user's message in its environment.
    It works in the task's workspace. When it ends, the rollout is over.

    Args:
        server, tokenizer: as in ``Proxy``.
        command: for a shell.
        open_sandbox: gives a task's sandbox; ``hermes_atropos.hermes.walled`` has one.
        env: further variables of the command.
        time_limit_s: seconds that it may take.
        session: of ``Sessions.open``: ``limits``, ``chat_template_kwargs``, ``tool_parser``.

    Raises:
        ConfigurationError: the command is empty.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        *,
        command: str,
        open_sandbox: Callable[..., Sandbox],
        env: Mapping[str, str] | None = None,
        time_limit_s: float = 3600.0,
        session: Mapping[str, Any] | None = None,
    ) -> None:
        if not command.strip():
            raise ConfigurationError("the command is empty: give one that runs your agent")
        self.server = server
        self.tokenizer = tokenizer
        self.command = command
        self.env = dict(env or {})
        self.time_limit_s = time_limit_s
        self._open_sandbox = open_sandbox
        self.session = dict(session or {})

    def task(
        self,
        task_id: str | None = None,
        *,
        workspace: str | os.PathLike[str] | None = None,
        copy: bool = False,
        keep_processes: bool = False,
        sandbox: str = "folder",
        **wall: Unpack[WallArguments],
    ) -> harness.OpenedTask[CommandTask]:
        """What a rollout and its verifier share: see ``AtroposAIAgent.task``.

        Behind a wall, the command reaches the endpoint through a socket in a folder that is mounted; the wall needs
        ``python3`` for that.
        """

        @contextlib.asynccontextmanager
        async def task() -> AsyncIterator[CommandTask]:
            with tempfile.TemporaryDirectory(prefix="hermes-atropos-proxy-") as folder:
                socket = None
                if sandbox == "walled":
                    socket = str(Path(folder, "model.sock"))
                    wall["mounts"] = {**wall.get("mounts", {}), folder: "ro"}
                async with Proxy(self.server, self.tokenizer, socket=socket) as proxy:
                    opened = await run_in_rollout_thread(
                        lambda: self._open_sandbox(task_id, workspace, copy=copy, tools=(), sandbox=sandbox, **wall)
                    )
                    try:
                        yield CommandTask(self, opened, proxy, socket, keep_processes=keep_processes)
                    finally:
                        await run_to_end(opened.release)

        return harness.OpenedTask(task())


class CommandTask(harness.Task):
    """A rollout of a ``CommandAgent``, for the length of ``async with agent.task(…)``."""

    trajectory: AgentResult | None = None

    def __init__(
        self, agent: CommandAgent, sandbox: Sandbox, proxy: Proxy, socket: str | None, *, keep_processes: bool
    ) -> None:
        super().__init__(keep_processes=keep_processes)
        self._agent = agent
        self._sandbox = sandbox
        self._proxy = proxy
        self._socket = socket

    @property
    def sandbox(self) -> Sandbox:
        return self._sandbox

    async def run(
        self, user_message: Any, system_message: str | None = None, *, conversation_history: Any = None
    ) -> AgentResult:
        """Run the command until it ends.

        Returns:
            What it left. A command that fails or takes too long ends as ``ERROR`` or ``TIMEOUT``; ``metadata`` has its
            ``exit_code``, and the end of its ``output``.

        Raises:
            ConfigurationError: a system message or a history, which a command can't be given.
            SandboxError: the endpoint can't be reached from within the wall.
        """
        if system_message is not None or conversation_history is not None:
            raise ConfigurationError("a command is given a user's message alone: write the rest into it")
        agent = self._agent
        ended: CommandResult | None = None
        session = self._proxy.sessions.open(**agent.session)
        try:
            variables = {
                "OPENAI_BASE_URL": f"{await self._reachable()}/{session.facts.id}/v1",
                "OPENAI_API_KEY": str(session.facts.key),
                "PROMPT": str(user_message),
            }
            command = f"{assignments(variables | agent.env)}\n{agent.command}"
            ended = await self._sandbox.call(lambda: self._sandbox.run(command, timeout=agent.time_limit_s))
        finally:
            reason = None if ended else StopReason.CANCELLED
            result = self.trajectory = await self._proxy.sessions.end(session.facts.id, reason)
        result.metadata |= {"exit_code": ended.exit_code, "output": ended.output[-10_000:]}
        if ended.exit_code:
            result.success = False
            result.stop_reason = StopReason.TIMEOUT if ended.exit_code == 124 else StopReason.ERROR
            result.error = f"the command ended with exit code {ended.exit_code}: {ended.output[-1000:]}"
        return result

    async def _reachable(self) -> str:
        """Where the command reaches the proxy: behind a wall, at a relay that is started; again is harmless."""
        if self._socket is None:
            return self._proxy.url
        command = f"({assignments({'RELAY': RELAY, 'SOCKET': self._socket})}\n{START})"
        started = await self._sandbox.call(lambda: self._sandbox.run(command, timeout=30))
        if started.exit_code:
            raise SandboxError(f"the endpoint cannot be reached from within the wall: {started.output[-500:]}")
        return f"http://127.0.0.1:{PORT}"


def assignments(variables: Mapping[str, str]) -> str:
    """What gives a shell these variables."""
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
