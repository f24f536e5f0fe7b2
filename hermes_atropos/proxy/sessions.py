"""All sessions of a proxy: opened, found, ended; kept on disk while they live, and as records afterwards."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hermes_atropos.backends import servers_of
from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.proxy.journal import Journal, read
from hermes_atropos.proxy.session import Facts, Limits, Session
from hermes_atropos.proxy.wire import Refused
from hermes_atropos.rendering.tokenizers import own_tokenizer
from hermes_atropos.trajectory import AgentResult, StopReason, write_record

__all__ = ["Sessions"]

logger = logging.getLogger(__name__)

#: Seconds between looks for idle sessions.
SWEEP_S = 1.0


class Sessions:
    """The sessions on one model.

    Args:
        server: what ``ExactManagedServer`` takes.
        tokenizer: the served model's; by default the server's.
        records: a folder for the records of sessions that ended, and the journals of those that have not. Without,
            nothing is written, and no session ends on its own.
        limits: of a session that is opened without limits of its own.
        idle_s: seconds without a request after which a session ends.
        context_length: as in ``ExactManagedServer``.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        *,
        records: str | Path | None = None,
        limits: Limits | None = None,
        idle_s: float = 3600.0,
        context_length: int | None = None,
    ) -> None:
        self.server = server
        self.records = None if records is None else Path(records)
        self.limits = limits or Limits()
        self.idle_s = idle_s
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._open: dict[str, Session] = {}

    @property
    def servers(self) -> list[Any]:
        return servers_of(self.server)

    @property
    def tokenizer(self) -> Any:
        """The served model's.

        Raises:
            NoTokenizerError: none was given, and the server's can't be had.
        """
        if self._tokenizer is None:
            self._tokenizer = own_tokenizer(self.servers[0])
        return self._tokenizer

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return str(getattr(getattr(self.servers[0], "config", None), "model_name", "unknown"))

    def __iter__(self) -> Any:
        return iter(list(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)

    def open(self, *, keyed: bool = True, limits: Mapping[str, Any] | None = None, **options: Any) -> Session:
        """A new session.

        Args:
            keyed: give it an API key; without, its id is what opens it.
            limits: fields of ``Limits``.
            options: ``base_url``, the address of one of the servers; ``tool_parser``, ``track_tree`` and
                ``chat_template_kwargs``, as in ``ExactManagedServer``.

        Raises:
            Refused: no server has that ``base_url``.
            ConfigurationError: a limit isn't a positive number, or as ``ExactManagedServer``.
        """
        facts = Facts(
            id=str(uuid.uuid4()),
            key=f"sk-session-{secrets.token_urlsafe(24)}" if keyed else None,
            limits=Limits(**limits) if limits else self.limits,
            options={name: value for name, value in options.items() if value is not None},
        )
        session = Session(facts, self._managed(facts), Journal(self._path(facts.id, "journal"), asdict(facts)))
        self._open[facts.id] = session
        return session

    def get(self, session_id: str) -> Session:
        """The session of that id.

        Raises:
            Refused: there is none, or it has ended.
        """
        if session := self._open.get(session_id):
            return session
        raise Refused(404, f"there is no session {session_id[:80]}, or it has ended", "session_not_found")

    async def end(self, session_id: str, stop_reason: StopReason | None = None) -> AgentResult:
        """End a session; its record takes the place of its journal.

        Raises:
            Refused: there is none.
        """
        session = self.get(session_id)
        del self._open[session_id]
        await session.end()
        result = session.trajectory(stop_reason)
        if path := self._path(session_id, "jsonl"):
            await asyncio.to_thread(write_record, result, path)
            session.journal.close()
        return result

    def restore(self) -> None:
        """Take up the sessions whose journals a killed process left."""
        for path in sorted(self.records.glob("*.journal")) if self.records else ():
            known, entries = read(path)
            facts = Facts(**known | {"limits": Limits(**known["limits"])})
            session = Session(facts, self._managed(facts), Journal(path))
            session.restore(entries)
            self._open[facts.id] = session
            logger.warning("session %s goes on: %d turns of its journal were read", facts.id, len(entries))

    async def sweep(self) -> None:
        """End idle sessions, for as long as this runs."""
        while self.records is not None:
            await asyncio.sleep(min(SWEEP_S, self.idle_s))
            for session in self:
                if time.time() - session.last_used > self.idle_s and not session.busy:
                    logger.warning("session %s ends: no request for %g s", session.facts.id, self.idle_s)
                    try:
                        await self.end(session.facts.id, StopReason.TIMEOUT)
                    except OSError:  # its journal stays, and is read when the proxy starts again
                        logger.exception("the record of session %s could not be written", session.facts.id)

    def _managed(self, facts: Facts) -> ExactManagedServer:
        options = dict(facts.options)
        server = self._named(options.pop("base_url", None))
        return ExactManagedServer(server, self.tokenizer, context_length=self.context_length, **options)

    def _named(self, base_url: str | None) -> Any:
        """The server at an address; all of them where none is named."""
        if base_url is None:
            return self.server
        urls = {str(getattr(getattr(one, "config", None), "base_url", "")).rstrip("/"): one for one in self.servers}
        if base_url.rstrip("/") not in urls:
            raise Refused(404, f"no server has the address {base_url!r}; these are known: {sorted(urls)}", "no_server")
        return urls[base_url.rstrip("/")]

    def _path(self, session_id: str, ending: str) -> Path | None:
        return self.records and self.records / f"{session_id}.{ending}"
