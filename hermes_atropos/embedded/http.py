"""The embedded model as a process: the part of vLLM's protocol that this library's clients and trainers speak.

Token ids in and out at ``/v1/completions`` and ``/inference/v1/generate``, and of vLLM's development mode what brings
new weights: ``/pause``, ``/collective_rpc`` with ``reload_weights``, ``/update_weight_version``,
``/reset_prefix_cache``, ``/resume``, ``/weight_info``. Shapes and words are those of vLLM 0.32
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). What isn't known is refused with a 400, where
vLLM would ignore it. As in vLLM, ``reload_weights`` keeps what was computed with the old ones: reset the prefix cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hermes_atropos.embedded.engine import Request as Answer
from hermes_atropos.embedded.server import EmbeddedServer
from hermes_atropos.errors import BackendError, ConfigurationError, ContextLengthError
from hermes_atropos.rendering.tokenizers import decode

__all__ = ["embedded_app", "serve"]

#: Seconds for which answers may go on when the process is told to end.
SHUTDOWN_S = 2

# What a request may have beside the parameters of the sampler.
_OF_COMPLETIONS = {"model", "prompt", "logprobs", "return_token_ids", "return_tokens_as_token_ids", "stream", "user"}

#: Turns the tokens of an answer from one place to another into a choice of the protocol; True if they are its last.
Shape = Callable[[Answer, int, int, bool], dict[str, Any]]


class _Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def embedded_app(server: EmbeddedServer, name: str = "embedded") -> FastAPI:
    """The application that answers for ``server``, whose model it calls ``name``."""
    app = FastAPI(title="hermes-atropos embedded model", openapi_url=None)

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, ContextLengthError):
            error = _Refused(400, f"This model's maximum context length is exceeded: {error}", param="input_tokens")
        elif not isinstance(error, _Refused):
            error = _Refused(400, str(error))
        return JSONResponse(error.body, error.status)

    for kind in (_Refused, BackendError, ConfigurationError):
        app.add_exception_handler(kind, refused)
    _add_facts(app, server, name)
    _add_answers(app, server, name)
    _add_weights(app, server)
    return app


def _add_facts(app: FastAPI, server: EmbeddedServer, name: str) -> None:
    @app.get("/health")
    async def health() -> Any:
        return Response()

    @app.get("/v1/models")
    async def models() -> Any:
        card = {"id": name, "object": "model", "created": 0, "owned_by": "hermes-atropos", "parent": None}
        return {
            "object": "list",
            "data": [card | {"root": str(server.checkpoint), "max_model_len": server.context_length}],
        }

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body = await _body(request)
        ids = server.tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
        return {"count": len(ids), "max_model_len": server.context_length, "tokens": ids}


def _add_answers(app: FastAPI, server: EmbeddedServer, name: str) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await _body(request)
        prompt = body.get("prompt")
        prompt_ids = _ids(server.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, "prompt")
        sampling = {"max_tokens": 16} | {key: value for key, value in body.items() if key not in _OF_COMPLETIONS}

        def shape(answer: Answer, start: int, end: int, last: bool) -> dict[str, Any]:
            ids = answer.output_ids[start:end]
            choice = {"index": answer.choice, "text": decode(server.tokenizer, ids, skip_special_tokens=True)}
            choice |= {"finish_reason": answer.finish_reason if last else None, "stop_reason": None, "logprobs": None}
            if body.get("logprobs") is not None:
                as_ids = body.get("return_tokens_as_token_ids")
                tokens = [f"token_id:{one}" if as_ids else decode(server.tokenizer, [one]) for one in ids]
                choice["logprobs"] = {"tokens": tokens, "token_logprobs": answer.logprobs[start:end]}
            if body.get("return_token_ids"):
                choice |= {"token_ids": ids, "prompt_token_ids": prompt_ids if start == 0 else None}
            return choice

        head = {"id": "cmpl", "object": "text_completion", "created": 0, "model": name}
        return await _answered(request, server, name, body, prompt_ids, sampling, head, shape)

    @app.post("/inference/v1/generate")
    async def generate(request: Request) -> Response:
        body = await _body(request)
        prompt_ids = _ids(body.get("token_ids"), "token_ids")
        sampling = dict(body.get("sampling_params") or {})
        with_logprobs = sampling.pop("logprobs", None) is not None

        def shape(answer: Answer, start: int, end: int, last: bool) -> dict[str, Any]:
            ids = answer.output_ids[start:end]
            content: list[dict[str, Any]] = [
                {"token_id": one, "logprob": logprob, "rank": None, "top_logprobs": []}
                for one, logprob in zip(ids, answer.logprobs[start:end], strict=True)
            ]
            return {
                "index": answer.choice,
                "token_ids": ids,
                "logprobs": {"content": content} if with_logprobs else None,
                "finish_reason": answer.finish_reason if last else None,
                "weight_versions": (answer.weights or None) if last else None,
            }

        head = {"request_id": "generate", "prompt_token_ids": prompt_ids if body.get("return_token_ids") else None}
        return await _answered(request, server, name, body, prompt_ids, sampling, head, shape)


async def _answered(
    request: Request,
    server: EmbeddedServer,
    name: str,
    body: Mapping[str, Any],
    prompt_ids: list[int],
    sampling: Mapping[str, Any],
    head: Mapping[str, Any],
    shape: Shape,
) -> Response:
    """The answer as one object, or piece by piece."""
    if body.get("model") not in (None, name):
        raise _Refused(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
    pieces: asyncio.Queue[Answer | None] = asyncio.Queue()
    call = server.sample(prompt_ids, sampling, pieces.put_nowait if body.get("stream") else None)
    if not body.get("stream"):
        answers = await _unless_hung_up(request, call)
        return JSONResponse({**head, "choices": [shape(answer, 0, len(answer.output_ids), True) for answer in answers]})
    task = asyncio.create_task(call)
    task.add_done_callback(lambda _: pieces.put_nowait(None))
    answer = await pieces.get()
    if answer is None:
        await task

    async def events() -> AsyncIterator[str]:
        nonlocal answer
        told: dict[int, int] = {}
        try:
            while answer is not None:
                last = answer.ended  # looked at first: another thread adds tokens
                start, end = told.get(answer.choice, 0), len(answer.logprobs)
                if end > start or last:
                    told[answer.choice] = end
                    yield f"data: {json.dumps({**head, 'choices': [shape(answer, start, end, last)]})}\n\n"
                answer = await pieces.get()
            yield "data: [DONE]\n\n"
        finally:
            task.cancel()

    return StreamingResponse(events(), media_type="text/event-stream")


async def _unless_hung_up(request: Request, call: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """What the call comes back with; given up when the client closes the connection."""
    task = asyncio.create_task(call)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await task
    finally:
        task.cancel()
        watching.cancel()


def _add_weights(app: FastAPI, server: EmbeddedServer) -> None:
    """vLLM's ``entrypoints/serve/dev``: what a trainer on the same machine needs to bring new weights."""
    engine = server.engine

    @app.post("/pause")
    async def pause(mode: Literal["abort", "wait", "keep"] = "abort") -> Any:
        await asyncio.to_thread(engine.pause, mode)
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> Any:
        engine.resume()
        return {"status": "resumed"}

    @app.post("/collective_rpc")
    async def collective_rpc(request: Request) -> Any:
        body = await _body(request)
        folder = (body.get("kwargs") or {}).get("weights_path")
        if body.get("method") != "reload_weights" or not isinstance(folder, str):
            raise _Refused(400, "only {'method': 'reload_weights', 'kwargs': {'weights_path': …}} can be asked for")
        await asyncio.to_thread(engine.load_weights, folder, forget=False)
        return {"results": [None]}

    @app.post("/update_weight_version")
    async def update_weight_version(request: Request) -> Any:
        version = (await _body(request)).get("new_version")
        if not isinstance(version, str):
            raise _Refused(400, "new_version must be a text", param="body.new_version")
        engine.version = version
        return {"success": True, "new_version": version}

    @app.get("/weight_info")
    async def weight_info() -> Any:
        return {"weight_version": engine.version}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Any:
        await asyncio.to_thread(engine.forget)
        return {"success": True}


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise _Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refused(400, "the body is not a JSON object")
    return body


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise _Refused(400, f"{name} must be a list of token ids", param=name)
    return value


class _Server(uvicorn.Server):
    """One that a signal ends as a success."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, setattr, self, "should_exit", True)
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"http://{host}:{port}", flush=True)


def serve(server: EmbeddedServer, host: str, port: int, name: str = "embedded") -> None:
    """Answer at an address, which is printed, until SIGTERM or SIGINT comes; port 0 takes a free one.

    Raises:
        ConfigurationError: it can't listen there.
    """
    config = uvicorn.Config(
        embedded_app(server, name),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    try:
        asyncio.run(_Server(config).serve())
    except SystemExit as error:  # uvicorn's word for an address that it can't have
        raise ConfigurationError(f"can't listen on {host}:{port}: is the address in use?") from error
