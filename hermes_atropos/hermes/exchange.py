"""Hermes' own programs on a server of an RL run: for a while, our class stands wherever Hermes' modules hold theirs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletion

from hermes_atropos.backends import Backend
from hermes_atropos.backends.context import ask_context_length
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.conversation import stop_reason_of
from hermes_atropos.errors import HermesAtroposError
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.acting import acting_agent
from hermes_atropos.hermes.agent import AtroposAIAgent, model_name
from hermes_atropos.hermes.hooks import HERMES_PARAMETERS, HERMES_ROUTES
from hermes_atropos.hermes.requests import IN_PROCESS, serving
from hermes_atropos.hermes.result import to_completion
from hermes_atropos.hermes.rollout import Rollout
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.messages import text_of
from hermes_atropos.runtime import run_in_rollout_thread
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
        base_url, api_key: where to find a server, instead of ``server``.
        model: the one that programs begin with, of a server that has several; ``/model`` takes the others.
        records: record each conversation in this file, as :class:`Recording` does: after each model call, all that was
            sampled by then. The messages of one session are one conversation, and its tokens go on from message to
            message. What a program asks the model beside it, for a title say, is a record of its own.
        options: further arguments of ``AtroposAIAgent``; they win over what the programs give.

    Yields:
        The class that stands in place of Hermes'.

    Raises:
        NoServerError, UnsupportedServerError, NoTokenizerError, ChatTemplateError, ConfigurationError: the model cannot
            be reached so.
        UnsupportedVersionError: this release of Hermes lacks something that the library leans on.
    """
    seams.check()
    exchange = Exchange(options, None if records is None else Path(records).absolute())
    kind = type("AIAgent", (Exchanged,), {"_exchange": exchange, "__doc__": Exchanged.__doc__})
    with contextlib.ExitStack() as entered:
        entered.enter_context(seams.in_place_of("run_agent", "AIAgent", kind))
        if server is not None or base_url is not None:
            given = {name: options[name] for name in ("tokenizer", "tool_format") if name in options}
            models = Models(server, model, given | {"base_url": base_url, "api_key": api_key})
            exchange.models = models
            runtime = {**IN_PROCESS, "source": "hermes-atropos", "model": models.first}
            entered.enter_context(
                seams.in_place_of("hermes_cli.runtime_provider", "resolve_runtime_provider", lambda **_: dict(runtime))
            )
            entered.enter_context(switching_among(models, options.get("context_length")))
            entered.enter_context(answered_by(models.found[models.first], models.first, exchange.record))
        yield kind


class Models:
    """The models of the server of an exchange, each looked for once: a worker of a program may be a process of its own.

    Attributes:
        first: the one that the programs are on, until ``/model`` is given another.
        found: what each is asked through.
    """

    def __init__(self, server: Any, model: str | None, search: Mapping[str, Any]) -> None:
        self._server, self._search = server, search
        self.found: dict[str, Backend] = {}
        if model is None:
            backend = resolve(server, **search)
            model = model_name(backend.server)
            self.found[model] = backend
        self.find(model)
        self.first = model

    def find(self, model: str) -> None:
        """Look for a model.

        Raises:
            HermesAtroposError: the server does not have it, or cannot be reached.
        """
        if model not in self.found:
            server = None if self._server is None else serving(self._server, model)
            self.found[model] = resolve(server, model=model, **self._search)

    def options(self, model: str | None) -> dict[str, Any]:
        """The arguments of an agent whose program names ``model``: the first instead, where nobody has chosen that.

        It may be what the user's configuration says.
        """
        name = model if model in self.found else self.first
        backend = self.found[name]
        return {"server": backend.server, "model": name, "tokenizer": getattr(backend, "tokenizer", None)}


@contextlib.contextmanager
def switching_among(models: Models, context_length: int | None) -> Iterator[None]:
    """For the length of the block, Hermes' ``/model`` takes what the server has, and nothing else.

    Hermes would look for it at an address that does not exist, and write that address into the user's configuration.
    """

    def switch_model(raw_input: str, *_: Any, is_global: bool = False, **__: Any) -> Any:
        from hermes_cli.model_switch import ModelSwitchResult

        model, refusal = raw_input.strip() or models.first, ""
        if is_global:
            refusal = "the server of this run has no place in the configuration: leave --global out"
        else:
            try:
                models.find(model)
            except HermesAtroposError as error:
                refusal = str(error)
        return ModelSwitchResult(
            success=not refusal,
            error_message=refusal,
            new_model=model,
            target_provider=IN_PROCESS["provider"],
            provider_label="Custom endpoint",
            **{name: IN_PROCESS[name] for name in ("api_key", "base_url", "api_mode")},
        )

    def shown_length(model: str, *_: Any, config_context_length: int | None = None, **__: Any) -> int | None:
        known = context_length or config_context_length
        with contextlib.suppress(TimeoutError):  # the server may run on the loop of this thread
            known = known or ask_context_length(models.found[model]).result(timeout=1)
        return known

    with (
        seams.in_place_of("hermes_cli.model_switch", "switch_model", switch_model),
        seams.in_place_of("hermes_cli.model_switch", "resolve_display_context_length", shown_length),
    ):
        yield


@contextlib.contextmanager
def answered_by(backend: Backend, model: str, record: Callable[[AgentResult], object]) -> Iterator[None]:
    """For the length of the block, what Hermes asks beside a conversation is a rollout of its own on ``backend``.

    That is a title, say, or an approval. Hermes sends these calls to the provider that the user's configuration names
    for them, which stays so; else to the main one, which is ours and has no address. One that shows an image to a
    backend that sees none goes where Hermes finds a model that does.

    Args:
        record: gets what each leaves.
    """
    from agent import auxiliary_client

    theirs, theirs_async = auxiliary_client.call_llm, auxiliary_client.async_call_llm

    def ours(task: str | None, request: Mapping[str, Any]) -> bool:
        chosen = (request.get(name) for name in ("provider", "model", "base_url", "api_key"))
        provider = auxiliary_client._resolve_task_provider_model(task, *chosen)[0]
        seen = not backend.tracks_tokens or all(text_of(m.get("content")) is not None for m in request["messages"])
        return provider in (None, "", "auto") and seen and not request.get("stream")

    def answer(task: str | None, request: Mapping[str, Any]) -> ChatCompletion:
        rollout, reason = Rollout.on(backend, None, max_tool_call_retries=0), StopReason.COMPLETED
        tools = request.get("tools") or None
        sampling = {name: request[name] for name in ("temperature", "max_tokens") if request.get(name) is not None}
        try:
            turn = rollout.ask(request["messages"], tools, sampling, interrupted=lambda: False, compresses=False)
            completion = to_completion(turn, model)
            auxiliary_client._validate_llm_response(completion, task)  # from 0.19 on, Hermes counts here what it took
            return completion
        except BaseException as error:
            reason = stop_reason_of(rollout.failure or error)
            raise
        finally:
            messages = rollout.conversation.messages
            last = messages[-1] if messages and reason is StopReason.COMPLETED else {}
            failure = None if rollout.failure is None else str(rollout.failure)
            result = rollout.left(reason, tools, final_response=last.get("content") or "", error=failure)
            result.metadata["auxiliary"] = task
            record(result)

    def call(task: str | None = None, **request: Any) -> Any:
        return answer(task, request) if ours(task, request) else theirs(task, **request)

    async def call_async(task: str | None = None, **request: Any) -> Any:
        if not ours(task, request):
            return await theirs_async(task, **request)
        return await run_in_rollout_thread(lambda: answer(task, request))

    with (
        seams.in_place_of("agent.auxiliary_client", "call_llm", call),
        seams.in_place_of("agent.auxiliary_client", "async_call_llm", call_async),
    ):
        yield


@dataclass(eq=False)
class Exchange:
    """What the agents of one exchange share.

    Attributes:
        options: arguments of each agent.
        records: the file of the records; None for none.
        models: where the agents are; None leaves that to the programs.
    """

    options: Mapping[str, Any]
    records: Path | None
    models: Models | None = None
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
    """The conversation of one session with one model, over all of its messages."""

    model: str
    rollout: Rollout
    recording: Recording | None


class Exchanged(AtroposAIAgent):
    """``AtroposAIAgent`` as Hermes' programs make it: on the server of the exchange, with its sessions recorded."""

    _exchange: Exchange
    _session: Session

    def __init__(self, *args: Any, **options: Any) -> None:
        options.update(zip(list(HERMES_PARAMETERS)[1:], args, strict=False))
        parent = acting_agent()
        if parent is not None:
            parent._make_subagent(self, **options)
            return
        models = self._exchange.models
        if models is not None:
            route = models.options(options.get("model"))
            options = {name: value for name, value in options.items() if name not in HERMES_ROUTES} | route
        super().__init__(**{**options, **self._exchange.options})

    def _where_is(self, model: str) -> dict[str, Any]:
        models = self._exchange.models
        if models is None:
            return super()._where_is(model)
        models.find(model)
        return models.options(model)

    def _new_rollout(self, sandbox: HermesSandbox | None) -> Rollout:
        session = self._exchange.take(self.session_id)
        if session is None or session.model != self.model:
            recording = None if self._exchange.records is None else Recording(self._exchange.records)
            session = Session(self.model, super()._new_rollout(sandbox), recording)
        session.rollout.sandbox = sandbox
        session.rollout.answered = self._record_so_far if session.recording else None
        self._session = session
        return session.rollout

    def _run(self, rollout: Rollout, request: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        try:
            return super()._run(rollout, request, options)
        finally:
            if self._session.recording is not None and self.last_result is not None:
                self._session.recording.write(self.last_result["trajectory"])
            self._exchange.put_back(self.session_id, self._session)

    def _record_so_far(self) -> None:
        """Record what a kill must not lose."""
        assert self._session.recording is not None
        error = "the program ended while this rollout was under way"
        left = self._session.rollout.left(StopReason.INTERRUPTED, self.tools, error=error)
        self._session.recording.write(left)
