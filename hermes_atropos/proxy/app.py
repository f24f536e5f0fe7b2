"""The endpoints: OpenAI's for each session, those that open and end sessions, and atroposlib's for its clients.

Paths of atroposlib's proxy: ``managed_server_proxy.py`` of atroposlib 0.4.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from hermes_atropos.backends.tracked import known_context_length
from hermes_atropos.errors import HermesAtroposError
from hermes_atropos.listening import Delta, hearing, text_listener
from hermes_atropos.proxy import responses, wire
from hermes_atropos.proxy.session import Limits, Session
from hermes_atropos.proxy.sessions import Sessions
from hermes_atropos.proxy.wire import Refused, refusal_of
from hermes_atropos.servers.failures import url_of
from hermes_atropos.trajectory.records import record_line

__all__ = ["proxy_app"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A body may have so many bytes, and take so many seconds to arrive.
MAX_BODY = 32 * 2**20
BODY_S = 60.0

#: A stream says that it is alive after so many seconds without an answer; until then a failure has its status.
HEARTBEAT_S = 5.0
SILENCE = Delta("content", "")


def proxy_app(server: Any, tokenizer: Any = None, *, key: str = "", **options: Any) -> FastAPI:
    """An ASGI application that answers OpenAI's requests from a model's token calls, one endpoint a rollout.

    ``POST /sessions`` opens a session and tells its ``base_url`` and ``api_key``; any harness that takes these two can
    run there. ``DELETE /{id}`` ends it, and returns the trajectory as a record.

    Args:
        server: an atroposlib ``ServerManager`` or ``APIServer`` with token calls.
        tokenizer: the served model's; by default the server's.
        key: what a client must send to open sessions and to list them; by default anyone who can connect may do so.
        options: ``records``, ``limits``, ``idle_s``, ``context_length``: as in ``Sessions``.

    Raises:
        RecordError: in ``records`` is a journal that can't be read.
    """
    sessions = Sessions(server, tokenizer, **options)
    sessions.restore()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweep = asyncio.create_task(sessions.sweep())
        try:
            yield
        finally:
            sweep.cancel()

    app = FastAPI(title="hermes-atropos proxy", lifespan=lifespan, openapi_url=None)
    app.state.sessions = sessions
    _add_errors(app)
    _add_house(app, sessions, key)
    _add_sessions(app, sessions)
    return app


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        refused = refusal_of(error)
        if refused.status >= 500:
            logger.warning("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(wire.error_body(refused), refused.status)

    for kind in (HTTPException, Refused, HermesAtroposError):
        app.add_exception_handler(kind, answer)


def _add_house(app: FastAPI, sessions: Sessions, key: str) -> None:
    """Health, sessions and servers."""

    def check(request: Request) -> None:
        _check_key(request, key, "this needs the proxy's own key")

    @app.get("/health")
    async def health() -> Any:
        healthy = sum(bool(getattr(one, "server_healthy", True)) for one in sessions.servers)
        return {
            "status": "ok",
            "model": sessions.model,
            "sessions": len(sessions),
            "servers": len(sessions.servers),
            "healthy_servers": healthy,
        }

    @app.get("/v1/models")
    async def models() -> Any:
        return _models(sessions)

    @app.post("/sessions")
    async def open_session(request: Request) -> Any:
        check(request)
        body = await _json(request, empty={})
        limits = {name: body[name] for name in Limits.__slots__ if body.get(name) is not None}
        options = {name: body.get(name) for name in ("tool_parser", "chat_template_kwargs", "base_url")}
        session = sessions.open(limits=limits, **options)
        return _opened(session, sessions) | {
            "base_url": f"{request.base_url}{session.facts.id}/v1",
            "api_key": session.facts.key,
        }

    @app.post("/sessions/create")
    async def create_session(request: Request) -> Any:
        check(request)
        body = await _json(request, empty={})
        parser = body.get("tool_parser", "hermes")
        session = sessions.open(
            keyed=False, tool_parser=parser, track_tree=bool(body.get("track_tree")), base_url=body.get("base_url")
        )
        return _opened(session, sessions) | {"tool_parser": parser}

    @app.get("/sessions")
    async def list_sessions(request: Request) -> Any:
        check(request)
        return {
            "sessions": [
                _opened(session, sessions)
                | {"last_accessed": session.last_used, "num_nodes": len(session.managed.ledger.sequences())}
                for session in sessions
            ]
        }

    @app.get("/servers")
    async def servers(request: Request) -> Any:
        check(request)
        configs = [getattr(one, "config", None) for one in sessions.servers]
        return {
            "servers": [
                {
                    "index": index,
                    "base_url": getattr(config, "base_url", None),
                    "healthy": getattr(one, "server_healthy", True),
                    "model_name": getattr(config, "model_name", sessions.model),
                    "server_type": getattr(config, "server_type", "unknown"),
                }
                for index, (one, config) in enumerate(zip(sessions.servers, configs, strict=True))
            ]
        }

    @app.post("/setup")
    async def setup(request: Request) -> Any:
        """Other servers, for the sessions that are opened from now on: atroposlib's ``ServerManager`` sends its own."""
        check(request)
        body = await _json(request)
        model = body.get("model_name", sessions.model)
        configs = [
            APIServerConfig(**{"server_type": "vllm", "api_key": "", "model_name": model, **known})
            for known in body.get("servers", [])
        ]
        if configs:
            sessions.server = ServerManager(configs)
        return {"status": "ok", "servers": len(sessions.servers), "model_name": model}


def _add_sessions(app: FastAPI, sessions: Sessions) -> None:
    """What each session answers: OpenAI's endpoints, what it left, and its end."""

    @app.get("/{session_id}/v1/models")
    async def models(session_id: str, request: Request) -> Any:
        _session(sessions, session_id, request)
        return _models(sessions)

    @app.get("/{session_id}/v1/models/{name:path}")
    async def model(session_id: str, name: str, request: Request) -> Any:
        _session(sessions, session_id, request)
        return _models(sessions)["data"][0]

    @app.post("/{session_id}/v1/chat/completions")
    async def chat(session_id: str, request: Request) -> Response:
        session = _session(sessions, session_id, request)
        ask = wire.read_request(await _json(request))
        body = functools.partial(wire.completion, sessions.model)
        chunks = wire.Chunks(sessions.model, usage=ask.usage)
        return await _answer(session, request, ask, body, chunks.rest, chunks.piece if ask.in_pieces else None)

    @app.post("/{session_id}/v1/responses")
    async def respond(session_id: str, request: Request) -> Response:
        session = _session(sessions, session_id, request)
        given = await _json(request)
        ask = wire.read_request(responses.chat_request(given))

        def body(said: list[wire.Said], usage: dict[str, int]) -> dict[str, Any]:
            return responses.response(sessions.model, said[0], usage, given)

        return await _answer(session, request, ask, body, lambda said, usage: responses.events(body(said, usage)))

    @app.post("/{session_id}/v1/chat/completions/render")
    async def render(session_id: str, request: Request) -> Any:
        """What the model would read; atroposlib's."""
        session = _session(sessions, session_id, request)
        text, ids = await session.preview(wire.read_request(await _json(request)))
        return {"prompt_text": text, "token_ids": ids, "num_tokens": len(ids)}

    @app.get("/{session_id}/nodes")
    async def nodes(session_id: str, request: Request) -> Any:
        managed = _session(sessions, session_id, request).managed
        found = managed.sequences.values() if managed.track_tree else managed.current_nodes
        return JSONResponse({"nodes": [node.model_dump() for node in found]})

    @app.delete("/{session_id}")
    async def end(session_id: str, request: Request) -> Response:
        _session(sessions, session_id, request)
        result = await sessions.end(session_id)
        said = b'{"status":"deleted","uuid":"%b","trajectory":%b}'
        record = await asyncio.to_thread(record_line, result)
        return Response(said % (session_id.encode(), record.strip()), media_type="application/json")


async def _answer(
    session: Session,
    request: Request,
    ask: wire.Ask,
    body: Callable[[list[wire.Said], dict[str, int]], dict[str, Any]],
    rest: Callable[[list[wire.Said], dict[str, int]], Iterable[bytes]],
    piece: Callable[[Delta], Iterable[bytes]] | None = None,
) -> Response:
    """The answer to a request, whole or as a stream; ended where the client goes away.

    Args:
        body: the whole answer.
        rest: the events of a stream that are left at its end.
        piece: its events for what the model says meanwhile; None where it has none.
    """
    said: list[wire.Said] = []
    heard: asyncio.Queue[Delta | None] = asyncio.Queue()  # None at the end
    with hearing(text_listener, heard.put_nowait if piece and ask.stream else None):
        work = asyncio.create_task(session.run(_while_connected(request, session.answer(ask))))
    work.add_done_callback(lambda _: heard.put_nowait(None))
    try:
        if not ask.stream:
            said, usage = await work
            return JSONResponse(body(said, usage))
        delta = await _next(heard)
        if delta is None:
            work.result()
    except Exception as error:
        raise refusal_of(error) from error
    except asyncio.CancelledError:
        work.cancel()
        raise

    async def stream() -> AsyncIterator[bytes]:
        nonlocal delta, said
        delivered = False
        try:
            while delta is not None:
                if delta is SILENCE:
                    yield b": the model is still at work\n\n"
                elif piece is not None:
                    for data in piece(delta):
                        yield data
                delta = await _next(heard)
            said, usage = work.result()
            for data in rest(said, usage):
                yield data
            delivered = True
        except Exception as error:
            yield wire.event(wire.error_body(refusal_of(error)))
        finally:
            work.cancel()
            if not delivered:
                session.undelivered(said)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _next(heard: asyncio.Queue[Delta | None]) -> Delta | None:
    """What comes next; SILENCE if nothing does for a while."""
    try:
        async with asyncio.timeout(HEARTBEAT_S):
            return await heard.get()
    except TimeoutError:
        return SILENCE


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancelled if the client hangs up before it is there."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client went away", "client_gone")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request, empty: Any = None) -> Any:
    """The body, a JSON object; ``empty`` where there is none.

    Raises:
        Refused: it is too long, too slow, or not a JSON object.
    """
    text = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                text += part
                if len(text) > MAX_BODY:
                    raise Refused(413, f"the body has more than {MAX_BODY} bytes", "body_too_long")
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_S:g} s", "body_too_slow") from None
    if not text and empty is not None:
        return empty
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(body, Mapping):
        raise Refused(400, "the body must be a JSON object", "invalid_body")
    return body


def _session(sessions: Sessions, session_id: str, request: Request) -> Session:
    session = sessions.get(session_id)
    _check_key(request, session.facts.key, "this session has another API key: send the one that it was created with")
    session.last_used = time.time()
    return session


def _check_key(request: Request, key: str | None, refusal: str) -> None:
    """Refuse a request without the key, if there is one."""
    given = request.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise Refused(401, refusal, "invalid_api_key")


def _models(sessions: Sessions) -> dict[str, Any]:
    length = sessions.context_length or known_context_length(sessions.servers, sessions.tokenizer)
    lengths = {} if length is None else {"context_length": length, "max_model_len": length}
    card = {"id": sessions.model, "object": "model", "created": int(time.time()), "owned_by": "hermes-atropos"}
    return {"object": "list", "data": [card | lengths]}


def _opened(session: Session, sessions: Sessions) -> dict[str, Any]:
    """A session as atroposlib tells it: its ``base_url`` is the model server's."""
    return {
        "id": session.facts.id,
        "uuid": session.facts.id,
        "model_name": sessions.model,
        "created_at": session.facts.created,
        "base_url": session.facts.options.get("base_url") or url_of(sessions.servers[0]),
    }
