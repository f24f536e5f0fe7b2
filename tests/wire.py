"""Model servers on loopback that speak the real protocols, as vLLM 0.32 and SGLang 0.5.10 were seen to do.

Each runs on a thread of its own, as a real server runs in a process of its own, and records what it got: the requests,
and whether the client hung up. ``faults`` spoil the answers to the next generation requests, in order.

Statuses, types and words of refusals are those that the engines answered when asked; ``make engines`` asks them again.
Atropos' example trainer's server and OpenAI's API are from their sources and their reference.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from hermes_atropos.testing import chatml_tokenizer

Fault = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]

MODEL = "tests/chatml"


@dataclass
class WireRequest:
    """One request as it arrived.

    Attributes:
        peer: the client's address and port; the same for two requests of one connection.
        drawn: the parameters that the sampler took, the checkpoint's own defaults included.
        sampled: what was sampled for it: (ids, logprobs, finish reason) of each choice.
        hung_up: set when the client closed the connection before it had its answer.
    """

    path: str
    headers: dict[str, str]
    body: Any
    peer: Any
    drawn: dict[str, Any] = field(default_factory=dict)
    sampled: list[tuple[list[int], list[float], str]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)


RECORD = web.RequestKey("record", WireRequest)


class Wire:
    """What the servers share: a thread with a loop, the record, and a model that always says ``reply``.

    Args:
        generation_config: the checkpoint's sampling defaults, for what a request leaves out.
        scaled: whether logprobs are those after the temperature; of a draw near temperature 0 they are near 0.

    Attributes:
        aborts: how many tokens the next answers have when they are aborted. The model knows what it was saying: to a
            prompt that ends with the part of an answer it says the rest.
        abort_each: how many tokens each answer has when it is aborted, once.
        resumed: while it is not set, requests wait.
        flow: called before each further piece of a stream.
        open_paths: need no key.
    """

    open_paths: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        reply: str = "Hello there.",
        api_key: str | None = None,
        context_length: int | None = 4096,
        generation_config: dict[str, Any] | None = None,
        scaled: bool = False,
    ) -> None:
        self.tokenizer = chatml_tokenizer()
        self.reply = reply
        self.api_key = api_key
        self.context_length = context_length
        self.generation_config = generation_config or {}
        self.scaled = scaled
        self.aborts: list[int] = []
        self.abort_each: int | None = None
        self.resumed = threading.Event()
        self.resumed.set()
        self._rests: dict[tuple[int, ...], list[int]] = {}
        self.faults: list[Fault] = []
        self.flow: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
        self.requests: list[WireRequest] = []
        self.arrivals: queue.Queue[WireRequest] = queue.Queue()
        self.url = ""

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="wire")
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.resumed.set()
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._record], client_max_size=2**28)
        app.add_routes(self.routes())
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        record = WireRequest(request.path, dict(request.headers), body, request.transport.get_extra_info("peername"))
        request[RECORD] = record
        self.requests.append(record)
        self.arrivals.put(record)
        closed = request.path not in self.open_paths
        if closed and self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except asyncio.CancelledError:
            record.hung_up.set()
            raise

    async def arrival(self) -> WireRequest:
        """The next request that arrived and was not asked for yet."""
        return await asyncio.to_thread(self.arrivals.get, timeout=30)

    def to(self, path: str) -> list[WireRequest]:
        """The requests that came to a path."""
        return [request for request in self.requests if request.path == path]

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    async def sample(
        self, request: web.Request, prompt_ids: list[int], sampling: dict[str, Any], max_tokens: int | None
    ) -> None:
        if not self.resumed.is_set():
            await asyncio.to_thread(self.resumed.wait)
        drawn = request[RECORD].drawn
        drawn |= self.generation_config | {name: value for name, value in sampling.items() if value is not None}
        room = 2**30 if self.context_length is None else self.context_length - len(prompt_ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        scale = drawn.get("temperature", 1.0) ** 2 if self.scaled else 1.0
        for choice in range(sampling.get("n") or 1):
            ids = self._rests.get(tuple(prompt_ids)) or [*self.encode(self.reply), self.tokenizer.eos_token_id]
            if sampling.get("ignore_eos"):
                ids = ids * (limit // len(ids) + 1)
            cut = self.aborts.pop(0) if self.aborts else limit
            if self.abort_each is not None and tuple(prompt_ids) not in self._rests:
                cut = self.abort_each
            cut = min(cut, limit)
            reason = "stop" if len(ids) <= cut else "length" if cut == limit else "abort"
            if reason == "abort":
                self._rests[(*prompt_ids, *ids[:cut])] = ids[cut:]
            ids = ids[:cut]
            logprobs = [-scale * ((place + 1) / 8 + choice + len(prompt_ids) % 7) for place in range(len(ids))]
            request[RECORD].sampled.append((ids, logprobs, reason))

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        """The answer to a generation request, spoiled by the next fault if there is one."""
        streamed = bool(request[RECORD].body.get("stream"))
        if self.faults:
            return await self.faults.pop(0)(request, self.pieces(body) if streamed else body)
        return await events(request, self.pieces(body), self.flow) if streamed else web.json_response(body)

    def pieces(self, answer: Any) -> list[Any]:
        """The server-sent events of an answer, one for each token."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


# Faults


def status(code: int, body: str = "", **headers: str) -> Fault:
    """An HTTP error. Underscores in header names stand for hyphens."""

    async def fault(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=code, text=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return fault


def text(body: str) -> Fault:
    """Success, with this body."""

    async def fault(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text=body, content_type="application/json")

    return fault


def changed(change: Callable[[Any], Any]) -> Fault:
    """Success, with an answer that was changed in place (or replaced by what ``change`` returns)."""

    async def fault(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        replaced = change(answer)
        return web.json_response(answer if replaced is None else replaced)

    return fault


async def truncated(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
    """Half of the answer, and then the connection is closed."""
    whole = json.dumps(answer).encode()
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    request.transport.close()
    return response


async def slow(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
    """The whole answer, a few bytes at a time."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    whole = json.dumps(answer).encode()
    for start in range(0, len(whole), 7):
        await response.write(whole[start : start + 7])
        await asyncio.sleep(0)
    await response.write_eof()
    return response


async def dropped(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
    """No answer: the connection is closed."""
    request.transport.close()
    return web.Response()


async def hanging(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
    """No answer, for as long as the client waits."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def broken_off(request: web.Request, answer: Any) -> web.StreamResponse:
    """Half of a stream's events, and then the connection is closed."""
    response = web.StreamResponse(headers=EVENT_STREAM)
    await response.prepare(request)
    for piece in answer[: len(answer) // 2]:
        await response.write(event(piece))
    request.transport.close()
    return response


# Streams

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


def event(piece: Any) -> bytes:
    return f"data: {json.dumps(piece)}\n\n".encode()


async def events(request: web.Request, pieces: list[Any], flow: Callable[[], Awaitable[object]]) -> web.StreamResponse:
    response = web.StreamResponse(headers=EVENT_STREAM)
    await response.prepare(request)
    for number, piece in enumerate(pieces):
        if number:
            await flow()
        await response.write(event(piece))
    await response.write(b"data: [DONE]\n\n")
    return response


# Protocols


class OpenAIWire(Wire):
    """``chat/completions`` and ``models`` of any OpenAI-compatible server; ``message`` is the answer's message."""

    owner = "someone"
    usage: dict[str, Any] | None = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}  # noqa: RUF012

    def __init__(self, *, message: dict[str, Any] | None = None, takes_tools: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.message = message
        self.takes_tools = takes_tools

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/models", self.models), web.post("/v1/chat/completions", self.chat)]

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": self.cards()})

    def cards(self) -> list[dict[str, Any]]:
        card = {"id": MODEL, "object": "model", "created": 1, "owned_by": self.owner, "root": MODEL, "parent": None}
        if self.context_length is not None:
            card["max_model_len"] = self.context_length
        return [card]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = request[RECORD].body
        if body["model"] not in {card["id"] for card in self.cards()}:
            return self.no_such_model(body["model"])
        if body.get("tools") and not self.takes_tools:
            message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            return web.json_response(
                {"error": {"message": message, "type": "BadRequestError", "code": 400}}, status=400
            )
        message = self.message or {"role": "assistant", "content": self.reply}
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        return await self.answer(
            request,
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": MODEL,
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": self.usage,
            },
        )

    def pieces(self, answer: Any) -> list[Any]:
        """A message's reasoning and content by the word, its calls by the character; then the usage."""
        [choice] = answer["choices"]
        message, shared = choice["message"], {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL}
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for key in ("reasoning_content", "reasoning", "content"):
            deltas += [{key: word} for word in re.findall(r"\S+\s*|\s+", message.get(key) or "")]
        for index, call in enumerate(message.get("tool_calls") or []):
            function, index = {"name": call["function"]["name"], "arguments": ""}, call.get("index", index)
            deltas.append(
                {"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]}
            )
            deltas += [
                {"tool_calls": [{"index": index, "function": {"arguments": character}}]}
                for character in call["function"]["arguments"]
            ]
        chunks = [{**shared, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({**shared, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
        return [*chunks, {**shared, "choices": [], "usage": answer["usage"]}]

    def no_such_model(self, name: str) -> web.StreamResponse:
        error = {
            "message": f"The model `{name}` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
        return web.json_response({"error": error}, status=404)


class VLLMWire(OpenAIWire):
    """Stock ``vllm serve``. Fields that it does not know are ignored.

    Args:
        release: "new" returns token ids, "old" only ``token_id:N`` tokens, "ancient" neither.
        generate: whether ``/inference/v1/generate`` is there, forbidden (as without ``--enable-scale-out``), or alone.
        weight_version: told by ``/inference/v1/generate``, for each stretch of an answer.
        adapters: LoRA adapters of the model, by name.
    """

    owner = "vllm"
    open_paths = ("/health", "/metrics", "/tokenize", "/version")

    def __init__(
        self,
        *,
        release: str = "new",
        generate: str = "absent",
        weight_version: str = "default",
        adapters: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.release = release
        self.generate = generate
        self.weight_version = weight_version
        self.adapters = adapters

    def routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.post("/tokenize", self.tokenize),
        ]
        if self.generate != "alone":
            routes += [
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
            ]
        if self.generate != "absent":
            routes.append(web.post("/inference/v1/generate", self.generate_tokens))
        return routes

    def cards(self) -> list[dict[str, Any]]:
        adapters = [
            {"id": name, "object": "model", "root": f"/adapters/{name}", "parent": MODEL, "max_model_len": None}
            for name in self.adapters
        ]
        return [*super().cards(), *adapters]

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()  # also while it is paused

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        ids = self.encode(request[RECORD].body["prompt"])
        return web.json_response({"count": len(ids), "max_model_len": self.context_length, "tokens": ids})

    def refused(self, message: str, param: str | None = None) -> web.StreamResponse:
        error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
        return web.json_response({"error": error}, status=400)

    def refusal(self, prompt_ids: list[int], sampling: dict[str, Any]) -> web.StreamResponse | None:
        """What both endpoints refuse in the same words."""
        temperature = sampling.get("temperature", 1.0)
        if any(not 0 <= token < len(self.tokenizer) for token in prompt_ids):
            return self.refused(f"Token id {max(prompt_ids)} is out of vocabulary")
        if not 0 <= temperature <= 2:
            return self.refused(f"temperature must be in [0, 2], got {temperature}.", "temperature")
        if temperature == 0 and (n := sampling.get("n", 1)) > 1:
            return self.refused(f"n must be 1 when using greedy sampling, got {n}.")
        return None

    def no_room(self, prompt_ids: list[int], max_tokens: int) -> web.StreamResponse | None:
        """What ``/v1/completions`` says of lengths. (A request for more than is left is cut in silence.)"""
        length = self.context_length or 2**30
        if max_tokens > length:
            asked = f"max_tokens={max_tokens} cannot be greater than max_model_len={length}. "
            return self.refused(
                f"{asked}Please request fewer output tokens. (parameter=max_tokens, value={max_tokens})", "max_tokens"
            )
        if len(prompt_ids) > length:
            return self.refused(
                f"This model's maximum context length is {length} tokens. However, your prompt contains at least "
                f"{length + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                f"the length of the input prompt. (parameter=input_tokens, value={length + 1})",
                "input_tokens",
            )
        if min(max_tokens, length - len(prompt_ids)) < 1:
            return self.refused("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "max_tokens")
        return None

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = request[RECORD].body
        if body["model"] not in (MODEL, *self.adapters):
            return self.no_such_model(body["model"])
        prompt_ids = self.encode(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        max_tokens = 16 if body.get("max_tokens") is None else body["max_tokens"]
        if refusal := self.no_room(prompt_ids, max_tokens) or self.refusal(prompt_ids, body):
            return refusal
        await self.sample(request, prompt_ids, sampler_of(body), max_tokens)
        choices = []
        for index, (ids, logprobs, reason) in enumerate(request[RECORD].sampled):
            choice: dict[str, Any] = {
                "index": index,
                "text": self.decode(ids),
                "finish_reason": reason,
                "stop_reason": None,
                "logprobs": None,
            }
            if body.get("logprobs") is not None:
                as_ids = body.get("return_tokens_as_token_ids") and self.release != "ancient"
                tokens = [f"token_id:{token}" if as_ids else self.decode([token]) for token in ids]
                top = [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
                choice["logprobs"] = {
                    "token_logprobs": logprobs,
                    "tokens": tokens,
                    "text_offset": [],
                    "top_logprobs": top,
                }
            if self.release == "new":
                returned = body.get("return_token_ids")
                choice |= {"token_ids": ids if returned else None, "prompt_token_ids": prompt_ids if returned else None}
            choices.append(choice)
        # Choices may come in any order: it is their index that counts.
        return await self.answer(
            request,
            {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": choices[::-1]},
        )

    async def generate_tokens(self, request: web.Request) -> web.StreamResponse:
        if self.generate == "forbidden":
            error = {
                "message": "Scale-out endpoints are disabled. Restart the server with --enable-scale-out.",
                "type": "PermissionDeniedError",
                "param": None,
                "code": 403,
            }
            return web.json_response({"error": error}, status=403)
        body = request[RECORD].body
        if body.get("model") not in (None, MODEL, *self.adapters):
            return self.no_such_model(body["model"])
        sampling, prompt_ids = body["sampling_params"], body["token_ids"]
        length = self.context_length or 2**30
        if len(prompt_ids) >= length:
            more = "" if len(prompt_ids) > length else " plus the number of requested output tokens (at least 1)"
            return self.refused(
                f"The decoder prompt (length {len(prompt_ids)}){more} is longer than the maximum model length of "
                f"{length}. Make sure that `max_model_len` is no smaller than the number of text tokens."
            )
        if refusal := self.refusal(prompt_ids, sampling):
            return refusal
        await self.sample(request, prompt_ids, sampler_of(sampling), sampling.get("max_tokens"))
        choices = []
        for index, (ids, logprobs, reason) in enumerate(request[RECORD].sampled):
            content = [
                {"token_id": token, "logprob": value, "rank": 1, "top_logprobs": []}
                for token, value in zip(ids, logprobs, strict=True)
            ]
            told = {"content": content} if sampling.get("logprobs") is not None else None
            spans = [{"version": self.weight_version, "start": 0, "end": len(ids)}] if ids else None
            choices.append(
                {"index": index, "token_ids": ids, "logprobs": told, "finish_reason": reason, "weight_versions": spans}
            )
        echo = prompt_ids if body.get("return_token_ids") else None
        return await self.answer(
            request, {"request_id": "1", "choices": choices[::-1], "prompt_token_ids": echo, "prompt_logprobs": None}
        )

    def pieces(self, answer: Any) -> list[Any]:
        """Each has what it adds; the first the prompt's ids, the last what ended the answer, and its weights.

        An abort has a piece of its own, without tokens; but ``/v1/completions`` says nothing of one before the first.
        """
        [choice] = answer["choices"]
        if "token_ids" not in choice and "message" in choice:
            return super().pieces(answer)
        chunks = []
        count = len(choice.get("token_ids") or (choice["logprobs"] or {}).get("tokens") or [])
        aborted = choice["finish_reason"] == "abort"
        if aborted and not count and "weight_versions" not in choice:
            return []
        for place in range(count + aborted):
            first, last = place == 0, place == count + aborted - 1
            told: Any = choice["logprobs"]
            if told is not None:
                told = {key: values[place : place + 1] for key, values in told.items()}
            piece = choice | {"logprobs": told, "finish_reason": choice["finish_reason"] if last else None}
            if choice.get("token_ids") is not None:
                piece["token_ids"] = choice["token_ids"][place : place + 1]
            if "weight_versions" in choice:
                piece["weight_versions"] = choice["weight_versions"] if last else None
            if "prompt_token_ids" in choice:
                piece["prompt_token_ids"] = choice["prompt_token_ids"] if first else None
            shared = {key: value for key, value in answer.items() if first or key != "prompt_token_ids"}
            chunks.append({**shared, "choices": [piece]})
        return chunks


def sampler_of(body: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters of a vLLM request."""
    known = {
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("n", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "logit_bias", "bad_words"),
        *("allowed_token_ids", "structured_outputs"),
    }
    return {name: value for name, value in body.items() if name in known}


SGLANG_SAMPLING = {
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *(
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "min_new_tokens",
        "n",
        "json_schema",
        "regex",
        "ebnf",
    ),
    *("structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"),
    *("custom_params", "stream_interval", "logit_bias", "sampling_seed"),
}


class SGLangWire(OpenAIWire):
    """SGLang, with its native ``/generate``; ``weight_version`` is told with each answer.

    A token beyond the vocabulary kills it. What it was sent by a wrong model name it answers all the same.
    """

    owner = "sglang"

    def __init__(self, *, weight_version: str = "default", scaled: bool = True, **kwargs: Any) -> None:
        super().__init__(scaled=scaled, **kwargs)
        self.weight_version = weight_version
        self.incremental = False
        self.dead = False

    def routes(self) -> list[web.RouteDef]:
        return [
            *super().routes(),
            web.get("/health", self.health),
            web.get("/model_info", self.model_info),
            web.post("/tokenize", self.tokenize),
            web.post("/generate", self.generate),
            web.post("/v1/completions", self.completions),
        ]

    async def health(self, request: web.Request) -> web.StreamResponse:
        await self.sample(request, [0], {"temperature": 0.0}, 1)
        return web.Response()

    async def model_info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": MODEL, "tokenizer_path": MODEL, "weight_version": self.weight_version})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"tokens": self.encode(request[RECORD].body["prompt"])})

    def no_such_model(self, name: str) -> web.StreamResponse:
        raise AssertionError("any name is accepted")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """It takes token ids, but returns none."""
        choice = {
            "index": 0,
            "text": self.reply,
            "finish_reason": "stop",
            "logprobs": {"tokens": ["Hello"], "token_logprobs": [-0.1]},
        }
        return web.json_response({"id": "1", "object": "text_completion", "model": MODEL, "choices": [choice]})

    def problem(self, prompt_ids: list[int] | None, sampling: dict[str, Any]) -> str | None:
        """Why a request is refused with a 400."""
        length, last = self.context_length or 2**30, len(self.tokenizer) - 1
        wanted = sampling.get("max_new_tokens")
        beyond = [token for token in sampling.get("logit_bias") or {} if not 0 <= int(token) <= last]
        if prompt_ids is None:
            return "Either text, input_ids or input_embeds should be provided."
        if len(prompt_ids) >= length:
            return f"The input ({len(prompt_ids)} tokens) is longer than the model's context length ({length} tokens)."
        if wanted is not None and len(prompt_ids) + wanted >= length:
            return (
                f"Requested token count exceeds the model's maximum context length of {length} tokens. You requested a "
                f"total of {len(prompt_ids) + wanted} tokens: {len(prompt_ids)} tokens from the input messages and "
                f"{wanted} tokens for the completion. Please reduce the number of tokens in the input messages or the "
                "completion to fit within the limit."
            )
        if len(prompt_ids) > length - 6:
            return (
                f"Input length ({len(prompt_ids)} tokens) exceeds the maximum allowed length ({length - 6} tokens). "
                "Use a shorter input or enable --allow-auto-truncate."
            )
        if sampling.get("top_k") == 0:
            return "top_k must be -1 (disable) or at least 1, got 0."
        if beyond:
            return f"logit_bias must has keys in [0, {last}], got {beyond[0]}."
        return None

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = request[RECORD].body
        sampling = body.get("sampling_params") or {}
        prompt_ids = body.get("input_ids") or (self.encode(body["text"]) if "text" in body else None)
        if self.dead:
            return await dropped(request, {})
        if sampling.keys() - SGLANG_SAMPLING:
            return web.Response(status=500, text="Internal Server Error", headers={"Connection": "close"})
        if (problem := self.problem(prompt_ids, sampling)) and body.get("stream"):
            return await events(request, [{"error": {"message": problem}}], self.flow)
        if problem:
            return web.json_response({"error": {"message": problem}}, status=400)
        if max(prompt_ids) >= len(self.tokenizer):
            self.dead = True
            return await dropped(request, {})
        await self.sample(request, prompt_ids, sampling, sampling.get("max_new_tokens", 128))
        results = []
        for ids, logprobs, reason in request[RECORD].sampled:
            ended: dict[str, Any] = {"type": "length", "length": len(ids)}
            if reason == "stop":
                ended = {"type": "stop", "matched": ids[-1]}
            elif reason == "abort":
                ended = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            told: dict[str, Any] = {
                "id": "1",
                "finish_reason": ended,
                "prompt_tokens": len(prompt_ids),
                "weight_version": self.weight_version,
                "completion_tokens": len(ids),
                "cached_tokens": 0,
            }
            if body.get("return_logprob"):
                told["output_token_logprobs"] = [
                    [value, token, None] for token, value in zip(ids, logprobs, strict=True)
                ]
            results.append({"text": self.decode(ids), "output_ids": ids, "meta_info": told})
        return await self.answer(request, results if len(results) > 1 else results[0])

    def pieces(self, answer: Any) -> list[Any]:
        """Each repeats all so far; or, with ``--incremental-streaming-output``, it has what it adds."""
        if "choices" in answer:
            return super().pieces(answer)
        told, ids, chunks = answer["meta_info"], answer["output_ids"], []
        aborted = told["finish_reason"]["type"] == "abort"
        for piece in range(1, len(ids) + 1 + aborted):
            count = min(piece, len(ids))  # an abort has a piece of its own, without a further token
            start = piece - 1 if self.incremental else 0
            so_far = told | {
                "completion_tokens": count,
                "finish_reason": told["finish_reason"] if piece == len(ids) + aborted else None,
                "output_token_logprobs": told["output_token_logprobs"][start:count],
            }
            chunks.append({"text": self.decode(ids[start:count]), "output_ids": ids[start:count], "meta_info": so_far})
        return chunks


class AtroposVLLMWire(Wire):
    """The vLLM server of Atropos' example trainer: no ``/v1`` at all; what it cannot read it answers with 500."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/health", self.health), web.post("/generate", self.generate)]

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = dict(request[RECORD].body)
        if "prompt" not in body or body.keys() & {"model", "sampling_params"}:
            return web.Response(status=500, text="Internal Server Error")
        prompt = body["prompt"]
        prompt_ids = self.encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
        await self.sample(request, prompt_ids, sampler_of(body), body.get("max_tokens", 16))
        sampled = request[RECORD].sampled
        answer: dict[str, Any] = {
            "text": [self.decode(ids) for ids, _, _ in sampled],
            "prompt": self.decode(prompt_ids),
            "finish_reasons": [reason for _, _, reason in sampled],
        }
        if body.get("logprobs") is not None:
            answer["logprobs"] = [
                [[{str(token): value}] for token, value in zip(ids, logprobs, strict=True)]
                for ids, logprobs, _ in sampled
            ]
            answer["prompt_token_ids"] = prompt_ids
            answer["token_ids"] = [ids for ids, _, _ in sampled]
        return await self.answer(request, answer)


class WebsiteWire(Wire):
    """No inference server: any path answers with a page."""

    def routes(self) -> list[web.RouteDef]:
        return [web.route("*", "/{path:.*}", self.page)]

    async def page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>Welcome</html>", content_type="text/html")


@contextlib.contextmanager
def nobody() -> Any:
    """An address at which nobody listens."""
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
