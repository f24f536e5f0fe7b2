"""Hermes' own programs on a server of an RL run: for a while, our class stands wherever Hermes' modules hold theirs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hermes_atropos.backends import Backend
from hermes_atropos.backends.context import ask_context_length
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.acting import acting_agent
from hermes_atropos.hermes.agent import AtroposAIAgent, model_name
from hermes_atropos.hermes.auxiliary import answered_by
from hermes_atropos.hermes.hooks import HERMES_PARAMETERS, HERMES_ROUTES
from hermes_atropos.hermes.requests import IN_PROCESS
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.trajectory import AgentResult, Recording, StopReason

__all__ = ["exchanged"]

#: Sessions whose tokens are kept, so that their next message continues them.
SESSIONS = 256


@contextlib.contextmanager
def exchanged(
    server: Any = None,
    *,
    base_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    records: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[type[AtroposAIAgent]]:
    """For the length of the block, what makes an ``AIAgent`` in this process gets an ``AtroposAIAgent``.

    ::

        with hermes_atropos.exchanged(server=server, records="sessions.jsonl"):
            import batch_runner
            batch_runner.main(dataset_file="prompts.jsonl", batch_size=4, run_name="mine")

    That goes for Hermes' programs: its command line, ``batch_runner``, the gateway, the ACP adapter, cron; and for what
    imports ``AIAgent`` in the block. Where a server is given, they need no provider and no key of one.

    Args:
        server: as of ``AtroposAIAgent``. Without, each agent looks at the ``base_url`` that its program gives it.
        base_url, model, api_key: where to find a server, instead of ``server``.
        records: record each conversation in this file, as :class:`Recording` does: after each model call, all that was
            sampled by then. The messages of one session are one conversation, and its tokens go on from message to
            message. What a program asks the model beside it, for a title say, is a record of its own.
        options: further arguments of ``AtroposAIAgent``; they win over what the programs give.

    Yields:
        The class that stands in place of Hermes'.

    Raises:
        NoServerError, UnsupportedServerError, NoTokenizerError, ChatTemplateError: the model cannot be reached so.
        UnsupportedVersionError: this release of Hermes lacks something that the library leans on.
    """
    seams.check()
    if server is not None or base_url is not None:
        tokenizer, tool_format = options.get("tokenizer"), options.get("tool_format", "auto")
        backend = resolve(
            server, tokenizer=tokenizer, base_url=base_url, model=model, api_key=api_key, tool_format=tool_format
        )
        # Looked for once: a worker of a program may be a process of its own.
        options |= {"server": backend.server, "model": model or model_name(backend.server)}
        options.setdefault("tokenizer", getattr(backend, "tokenizer", None))
    exchange = Exchange(options, None if records is None else Path(records).absolute())
    kind = type("AIAgent", (Exchanged,), {"_exchange": exchange, "__doc__": Exchanged.__doc__})
    with contextlib.ExitStack() as entered:
        entered.enter_context(seams.in_place_of("run_agent", "AIAgent", kind))
        if "server" in options:
            runtime = {**IN_PROCESS, "source": "hermes-atropos", "model": options["model"]}
            entered.enter_context(
                seams.in_place_of("hermes_cli.runtime_provider", "resolve_runtime_provider", lambda **_: dict(runtime))
            )
            entered.enter_context(staying_on(options["model"], backend, options.get("context_length")))
            entered.enter_context(answered_by(backend, options["model"], exchange.record))
        yield kind


@contextlib.contextmanager
def staying_on(model: str, backend: Backend, context_length: int | None) -> Iterator[None]:
    """For the length of the block, Hermes' ``/model`` takes no other model than the one that all programs are on.

    Hermes would look for it at an address that does not exist, and write that address into the user's configuration.
    """

    def switch_model(raw_input: str, *_: Any, is_global: bool = False, **__: Any) -> Any:
        from hermes_cli.model_switch import ModelSwitchResult

        name, refusal = raw_input.strip() or model, ""
        if name != model:
            refusal = f"this run is on {model}: for {name}, start another with hermes-atropos run --model {name}"
        elif is_global:
            refusal = "the server of this run has no place in the configuration: leave --global out"
        return ModelSwitchResult(
            success=not refusal,
            error_message=refusal,
            new_model=model,
            target_provider=IN_PROCESS["provider"],
            provider_label="Custom endpoint",
            **{name: IN_PROCESS[name] for name in ("api_key", "base_url", "api_mode")},
        )

    def shown_length(*_: Any, config_context_length: int | None = None, **__: Any) -> int | None:
        known = context_length or config_context_length
        with contextlib.suppress(TimeoutError):  # the server may run on the loop of this thread
            known = known or ask_context_length(backend).result(timeout=1)
        return known

    with (
        seams.in_place_of("hermes_cli.model_switch", "switch_model", switch_model),
        seams.in_place_of("hermes_cli.model_switch", "resolve_display_context_length", shown_length),
    ):
        yield


@dataclass(eq=False)
class Exchange:
    """What the agents of one exchange share.

    Attributes:
        options: arguments of each agent.
        records: the file of the records; None for none.
    """

    options: Mapping[str, Any]
    records: Path | None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, result: AgentResult) -> None:
        """Record a rollout that is over."""
        if self.records is not None:
            Recording(self.records).write(result)

    def take(self, session_id: str) -> Session | None:
        """The session of that id, if no other agent has it."""
        with self._lock:
            return self._sessions.pop(session_id, None)

    def put_back(self, session_id: str, session: Session) -> None:
        with self._lock:
            self._sessions[session_id] = session
            while len(self._sessions) > SESSIONS:
                del self._sessions[next(iter(self._sessions))]


@dataclass(eq=False)
class Session:
    """The conversation of one session, over all of its messages."""

    rollout: Rollout
    recording: Recording | None

    def record(self, result: AgentResult) -> None:
        if self.recording is not None:
            self.recording.write(result)


class Exchanged(AtroposAIAgent):
    """``AtroposAIAgent`` as Hermes' programs make it: on the server of the exchange, with its sessions recorded."""

    _exchange: Exchange
    _session: Session | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        options.update(zip(list(HERMES_PARAMETERS)[1:], args, strict=False))
        parent = acting_agent()
        if parent is not None:
            parent._make_subagent(self, **options)
            return
        given = self._exchange.options
        if "server" in given:
            options = {name: value for name, value in options.items() if name not in HERMES_ROUTES}
        super().__init__(**{**options, **given})

    def _new_rollout(self, sandbox: HermesSandbox | None) -> Rollout:
        session = self._exchange.take(self.session_id)
        if session is None:
            recording = None if self._exchange.records is None else Recording(self._exchange.records)
            session = Session(super()._new_rollout(sandbox), recording)
        session.rollout.sandbox = sandbox
        session.rollout.answered = self._record_so_far if session.recording else None
        self._session = session
        return session.rollout

    def _run(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        try:
            return super()._run(rollout, request, options)
        finally:
            if self.last_result is not None:
                self._session.record(self.last_result["trajectory"])
            self._exchange.put_back(self.session_id, self._session)

    def _record_so_far(self) -> None:
        """Record what a kill must not lose."""
        assert self._session is not None
        conversation = self._session.rollout.conversation
        result = conversation.result(
            conversation.messages,
            StopReason.INTERRUPTED,
            tools=list(self.tools or []),
            sampling=self._session.rollout.sampling,
            error="the program ended while this rollout was under way",
        )
        self._session.record(result)
