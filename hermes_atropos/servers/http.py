"""What all servers over HTTP have in common: connections, requests, and the token call that a protocol fills in.

Each server has one pooled client a running event loop, closed with that loop, and raises the typed errors of
``hermes_atropos.errors`` with the URL, the status and the start of the body. None retries: that is done once, by the
backend that calls. Cancelling a call closes its connection, on which vLLM and SGLang abort the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import httpx
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ReasoningConfig
from openai.types.chat.chat_completion import ChatCompletion
from openai.types.completion import Completion

from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    ContextLengthError,
    SamplingError,
    UnsupportedServerError,
)
from hermes_atropos.listening import TokenListener, hearing, token_listener
from hermes_atropos.rendering.tokenizers import load_tokenizer
from hermes_atropos.servers.failures import response_error, unexpected
from hermes_atropos.servers.sampling import COMMON, NEUTRAL, settle_grammar, unknown

__all__ = ["Choice", "OpenAIEndpoint", "TokenServer", "served"]

T = TypeVar("T")

# uvicorn, under vLLM and SGLang, drops an idle connection after 5 s: let go of it before it does.
KEEPALIVE_S = 4.0

CONNECT_TIMEOUT_S = 10.0

#: Output ids, their logprobs, and the finish reason.
Choice = tuple[list[int], list[float], Any]


@dataclass(frozen=True, slots=True)
class Connections:
    """What belongs to one event loop: the client, what closes it, and a lock for each question that is asked once."""

    client: httpx.AsyncClient
    lifetime: AsyncGenerator[httpx.AsyncClient, None]
    locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))


class OpenAIEndpoint(APIServer):
    """Any OpenAI-compatible endpoint, at ``config.base_url`` as it stands; no token ids.

    Raises:
        UnsupportedServerError: ``config.base_url`` is not an ``http://`` or ``https://`` URL.
    """

    def __init__(self, config: APIServerConfig, reasoning_config: ReasoningConfig | None = None) -> None:
        if not re.match(r"https?://[^/\s]", config.base_url or ""):
            raise UnsupportedServerError(
                f"base_url={config.base_url!r} is not a server's address: give its URL, as http://localhost:8000/v1"
            )
        super().__init__(config, reasoning_config=reasoning_config)
        self.base_url: str = config.base_url.rstrip("/")
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, Connections] = WeakKeyDictionary()

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        """Keep ``server_healthy`` current, once a second, with a request that generates nothing."""
        while True:
            self.server_healthy = await self.is_healthy()
            await asyncio.sleep(1)

    async def is_healthy(self) -> bool:
        """Whether the server answers, without an error and within five seconds."""
        with contextlib.suppress(BackendError):
            await self.request("GET", f"{self.base_url}/models", timeout_s=5)
            return True
        return False

    async def listed_context_length(self, *, timeout_s: float = 10) -> int | None:
        """Tokens that prompt and answer may have together: vLLM and SGLang list it as ``max_model_len``.

        Raises:
            BackendConnectionError, BackendTimeoutError: nobody answers within ``timeout_s`` seconds.
        """
        with contextlib.suppress(BackendResponseError, AttributeError, KeyError, TypeError):
            listed = await self.request("GET", f"{self.base_url}/models", timeout_s=timeout_s)
            cards = {card["id"]: card for card in listed["data"]}
            return served(cards, self.config.model_name).get("max_model_len")
        return None

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        return await self._openai_call("chat/completions", ChatCompletion, kwargs)

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        return await self._openai_call("completions", Completion, kwargs)

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> tuple[list[Any], ...]:
        raise UnsupportedServerError(f"{self.base_url} is used as a plain OpenAI endpoint, which has no token ids")

    async def _openai_call(self, path: str, answer: type[Any], kwargs: dict[str, Any]) -> Any:
        extra = kwargs.pop("extra_body", None) or {}
        url = f"{self.base_url}/{path}"
        body = await self.request("POST", url, {"model": self.config.model_name, **kwargs, **extra})
        if not isinstance(body, dict) or not body.get("choices"):
            raise unexpected(url, body, "it has no choices")
        # Servers add and omit fields freely: built without validation, as the openai client does.
        return answer.construct(**body)

    async def request(
        self, method: str, url: str, body: Any = None, *, timeout_s: float | None = None, parse: bool = True
    ) -> Any:
        """One HTTP request; its answer's JSON, or its text where ``parse`` is False.

        Args:
            timeout_s: limit of the whole exchange in seconds; None takes ``config.timeout``.

        Raises:
            BackendConnectionError, BackendTimeoutError, BackendResponseError, ContextLengthError: as they say.
        """
        limit = timeout_s or self.config.timeout
        connections = await self._here()
        try:
            async with asyncio.timeout(limit):
                response = await connections.client.request(method, url, json=body)
        except TimeoutError as error:
            raise BackendTimeoutError(f"{url} did not answer within {limit:g} s", url=url) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            cause = str(error) or type(error).__name__
            raise BackendConnectionError(f"no answer from {url}: {cause}", url=url) from error
        if response.is_error:
            raise response_error(url, response.status_code, response.text, response.headers)
        if not parse:
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise unexpected(url, response.text, "it is not JSON") from error

    async def stream(self, url: str, body: Any, heard: Callable[[Any], object]) -> None:
        """One HTTP request whose answer comes as server-sent events; ``heard`` gets the JSON of each as it comes.

        A server that answers at once gives one.

        Raises:
            BackendError: as :meth:`request`, and where the stream breaks off or tells of an error.
        """
        connections, limit = await self._here(), self.config.timeout
        try:
            async with (
                asyncio.timeout(limit),
                connections.client.stream("POST", url, json={**body, "stream": True}) as response,
            ):
                if response.is_error:
                    await response.aread()
                    raise response_error(url, response.status_code, response.text, response.headers)
                if "text/event-stream" not in response.headers.get("Content-Type", ""):
                    heard(json.loads(await response.aread()))
                    return
                async for line in response.aiter_lines():
                    _, event, data = line.partition("data:")
                    if event and data.strip() == "[DONE]":
                        return
                    if event:
                        heard(_event(url, data))
        except TimeoutError as error:
            raise BackendTimeoutError(f"{url} did not answer within {limit:g} s", url=url) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            cause = str(error) or type(error).__name__
            raise BackendConnectionError(f"no answer from {url}: {cause}", url=url) from error
        except ValueError as error:
            raise unexpected(url, "", f"it is not JSON: {error}") from error
        raise BackendConnectionError(f"{url} ended its answer before the end", url=url)

    async def _here(self) -> Connections:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            lifetime = self._opened()
            self._connections[loop] = Connections(await anext(lifetime), lifetime)
        return self._connections[loop]

    async def _opened(self) -> AsyncGenerator[httpx.AsyncClient, None]:
        """A client, closed by ``loop.shutdown_asyncgens()``, with which ``asyncio.run`` ends a loop."""
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.config.api_key}"} if self.config.api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S),
            # Loading certificates takes tens of milliseconds on the loop: only where there are any to verify.
            verify=self.base_url.startswith("https:"),
            # A rollout opens no socket but to its server: no proxies from the environment.
            trust_env=False,
        ) as client:
            yield client

    async def aclose(self) -> None:
        """Close the running loop's connections. The next call opens new ones."""
        connections = self._connections.pop(asyncio.get_running_loop(), None)
        if connections is not None:
            await connections.lifetime.aclose()


class TokenServer(OpenAIEndpoint):
    """Token ids in, token ids and logprobs out; subclasses speak one server's protocol.

    ``config.base_url`` is the server's address, with or without ``/v1``. Nothing of an answer is repaired or padded:
    whether lengths, ids and logprobs fit is for the ledger to judge.

    Attributes:
        parameters: the sampling parameters that the protocol takes, by vLLM's names.
        streams: whether answers can come piece by piece, for whoever hears them; see :meth:`read_chunk`.
        reserved: tokens of the context that neither prompt nor answer may use.
        context_length: tokens that prompt and answer may have together; None until the server was asked, and where it
            does not say.
    """

    parameters: ClassVar[frozenset[str]] = COMMON
    streams: ClassVar[bool] = False
    reserved: ClassVar[int] = 0

    def __init__(self, config: APIServerConfig, reasoning_config: ReasoningConfig | None = None) -> None:
        super().__init__(config, reasoning_config=reasoning_config)
        self.root = self.base_url.removesuffix("/v1")
        self.base_url = f"{self.root}/v1"
        self.context_length: int | None = None
        self._told: dict[str, Any] = {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that ``config.tokenizer_name`` (or ``model_name``) names, loaded when first asked for.

        Raises:
            NoTokenizerError: it cannot be loaded.
        """
        named = self.config.tokenizer_name
        return load_tokenizer(self.config.model_name if named == "none" else named)

    async def is_healthy(self) -> bool:
        """Whether the server says, within five seconds, that it can answer."""
        with contextlib.suppress(BackendError):
            await self.request("GET", f"{self.root}/health", timeout_s=5, parse=False)
            return True
        return False

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[Any]]:
        """Sample ``n`` answers to ``input_ids``, or to the text ``prompt``.

        Returns:
            The prompt ``[prompt_len] int``, as the server echoed it where it does; the outputs
            ``[choice][output_len] int``; their logprobs ``[choice][output_len] float``; the finish reasons
            ``[choice]``, each a word, or a dict with that word as ``type`` and what else the server told of the call.

        Raises:
            SamplingError: a parameter that the server does not know, outside of ``extra_body``.
            ContextLengthError: the prompt leaves no room for an answer.
            BackendError: no answer, an error, or no token ids.
        """
        prompt, prompt_ids = kwargs.pop("prompt", None), kwargs.pop("input_ids", None)
        if prompt_ids is None:
            prompt_ids = self.tokenizer.encode(prompt)
        url, body = await self.build_request(list(prompt_ids), self._sampling(kwargs))
        listener = token_listener.get()
        if listener is None or not self.streams or kwargs.get("n") not in (None, 1):
            answer = await self.request("POST", url, body)
            with _protocol_of(url, answer):
                echo, choices = self.read_answer(answer)
                outputs, logprobs, reasons = (list(column) for column in zip(*choices, strict=True))
        else:
            listener.begin(prompt_ids)
            echo, (ids, values, reason) = await self._heard(url, body, listener)
            outputs, logprobs, reasons = [ids], [values], [reason]
        return echo or list(prompt_ids), outputs, logprobs, reasons

    async def _heard(self, url: str, body: Any, listener: TokenListener) -> tuple[list[int] | None, Choice]:
        """The prompt's echo and an answer that comes piece by piece, put together."""
        echo: list[int] | None = None
        ids: list[int] = []
        logprobs: list[float] = []
        reasons: list[Any] = []

        def hear(chunk: Any) -> None:
            nonlocal echo
            with _protocol_of(url, chunk):
                told, piece = self.read_chunk(chunk, len(ids))
            echo = echo or told
            if piece is not None:
                new, values, reason = piece
                ids.extend(new)
                logprobs.extend(values)
                reasons.append(reason)
                listener.more(new)

        await self.stream(url, body, hear)
        # vLLM says nothing of an answer that it aborted before the first token.
        return echo, (ids, logprobs, next(filter(None, reversed(reasons)), None) if reasons else "abort")

    def read_chunk(self, chunk: Any, sampled: int) -> tuple[list[int] | None, Choice | None]:
        """A piece of a streamed answer, as ``read_answer`` reads a whole one: what it adds to the ``sampled`` tokens so
        far, or None where it has no choice. Where ``streams`` is True."""
        echo, [choice] = self.read_answer(chunk)
        return echo, choice

    def _sampling(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a call with those that were not given at their neutral values.

        A wish for the answer's form is under ``structured_outputs``, as vLLM has it.
        """
        sampling = {key: value for key, value in arguments.items() if key not in _NOT_SAMPLING and value is not None}
        extra = sampling.pop("extra_body", {})
        for alias in ("max_new_tokens", "max_completion_tokens"):
            if alias in sampling:
                sampling["max_tokens"] = sampling.pop(alias)
        if strange := unknown(sampling, extra, self.parameters):
            raise SamplingError(
                f"{type(self).__name__} does not know {', '.join(strange)}: leave it out, or pass what {self.root} "
                "alone knows in extra_body"
            )
        if sampling.get("max_tokens", 1) < 1:
            raise SamplingError(f"max_tokens={sampling['max_tokens']!r}: give 1 or more")
        sampling = NEUTRAL | sampling | extra
        settle_grammar(sampling)
        return sampling

    @abstractmethod
    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """URL and body of a request.

        Args:
            sampling: complete, by vLLM's names; the caller's own.

        Raises:
            SamplingError: the protocol can't say this.
        """

    @abstractmethod
    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        """The prompt's echo and the choices; whatever a lookup raises means that the answer is not of this protocol."""

    async def max_tokens_for(self, prompt_ids: list[int], wanted: int | None) -> int | None:
        """What the context leaves of the ``max_tokens`` wanted; servers refuse a request for more."""
        if self.context_length is None:
            self.context_length = await self._once(self.listed_context_length)
        if self.context_length is None:
            return wanted
        room = self.context_length - self.reserved - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens, the context of {self.root} {self.context_length}",
                url=self.root,
            )
        return room if wanted is None else min(wanted, room)

    async def _once(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the server says to ``ask``, one of its methods: asked once, and again only where that raised."""
        question = ask.__name__
        async with (await self._here()).locks[question]:
            if question not in self._told:
                self._told[question] = await ask()
            return self._told[question]

    async def told_tokenizer(self) -> str | None:
        """The name or path of the tokenizer, where the server tells it elsewhere than in its list of models."""
        return None

    async def scales_logprobs(self) -> bool | None:
        """Whether the logprobs are of the distribution after the temperature; None where it does not show.

        Found out once, by one short answer that is all but greedy: after the temperature, what was drawn has a
        probability of nearly 1, whatever the model thinks of it.
        """
        return await self._once(self._look_at_logprobs)

    async def _look_at_logprobs(self) -> bool | None:
        with contextlib.suppress(BackendError), hearing(token_listener, None):
            _, _, [logprobs], _ = await self._tokens_and_logprobs_completion_wrapper(
                input_ids=_GIBBERISH, max_tokens=8, temperature=0.01, ignore_eos=True
            )
            doubts = sorted(-value for value in logprobs)
            if len(doubts) == 8 and doubts[3] < 0.001:
                return True
            if len(doubts) == 8 and doubts[5] > 0.1:
                return False
        return None


@contextlib.contextmanager
def _protocol_of(url: str, answer: Any) -> Iterator[None]:
    """Where an answer is read: whatever a lookup raises becomes the error that it is not of the protocol."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise unexpected(url, answer, f"{type(error).__name__}: {error}") from error


def _event(url: str, data: str) -> Any:
    """What an event holds.

    Raises:
        BackendResponseError: an error.
    """
    event = json.loads(data)
    if isinstance(event, dict) and event.get("error"):
        told = event["error"]
        code = told.get("code") if isinstance(told, dict) else None
        # SGLang refuses a request so, without a code.
        raise response_error(url, code if isinstance(code, int) else 400, data, {})
    return event


def served(cards: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    """The card of the model that is meant; that of the model to which a LoRA adapter belongs; else the first.

    Args:
        cards: of ``/v1/models``, by ``id``.
    """
    card = cards.get(name or "") or next(iter(cards.values()), {})
    while (parent := cards.get(card.get("parent") or "")) not in (None, card):
        card = parent
    return card


# Ids of any vocabulary after which nothing follows of itself.
_GIBBERISH = [201, 33, 157, 98, 240, 71, 186, 12]

# Arguments of atroposlib's calls that are not for the sampler.
_NOT_SAMPLING = frozenset(
    {"model", "messages", "tools", "tool_choice", "parallel_tool_calls", "split", "stream", "logprobs", "top_logprobs"}
)
