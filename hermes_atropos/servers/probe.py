"""What answers at a URL, and what is wrong with it, in one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
from dataclasses import dataclass, replace
from typing import Any

from atroposlib.envs.server_handling.server_baseline import APIServerConfig

from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    ConfigurationError,
    HermesAtroposError,
    NoServerError,
    UntrackedError,
)
from hermes_atropos.servers import PROTOCOLS, AtroposVLLMServer, OpenAIEndpoint, TokenServer
from hermes_atropos.servers.http import served

__all__ = ["Probe", "probe"]

#: Tokenizers of different models differ on at least one of these.
SAMPLE_TEXT = "def f(x):\n\treturn x**2  # naïve, 12345678 — 東京 🙂\n"

#: In any vocabulary; what the server makes of them does not matter.
SAMPLE_IDS = [1, 2, 3]


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found at a URL.

    Attributes:
        base_url: where the server was found.
        server: speaks its protocol; None if nobody could be spoken to.
        model: the name under which it serves the model; None where it does not say.
        tokenizer_name: the model's name or path, from which its tokenizer may be loaded; None where it does not say.
        context_length: tokens of prompt and answer together; None where it does not say.
        problem: what is wrong, as the error to raise; None if tokens can be tracked. An ``UntrackedError`` says that
            the server chats but returns no token ids.
    """

    base_url: str
    server: OpenAIEndpoint | None = None
    model: str | None = None
    tokenizer_name: str | None = None
    context_length: int | None = None
    problem: HermesAtroposError | None = None

    def __str__(self) -> str:
        """One sentence."""
        if self.problem is not None:
            return str(self.problem)
        length = f" with a context of {self.context_length} tokens" if self.context_length else ""
        kind = type(self.server).__name__
        return f"{self.base_url} serves {self.model or 'a model'}{length} and returns token ids ({kind})"


async def probe(
    base_url: str,
    model: str | None = None,
    tokenizer: Any = None,
    api_key: str | None = None,
    *,
    timeout_s: float = 10.0,
    cold_start_s: float = 120.0,
) -> Probe:
    """Find out what answers at ``base_url``, with a handful of requests that sample one token each at most.

    Args:
        base_url: the server's address, with or without ``/v1``.
        model: the model to ask for; None takes the one that the server lists first.
        tokenizer: compared with the server's own, where the server tells how it encodes a text.
        timeout_s: seconds for which somebody is looked for.
        cold_start_s: seconds that a server which is there may take for the rest, as it may have to compile what
            answers the first request.

    Whatever is wrong is in ``Probe.problem``.
    """
    config = APIServerConfig(
        base_url=base_url, model_name=model or "default", api_key=api_key or "", health_check=False
    )
    problem: HermesAtroposError
    limit_s = timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            endpoint, cards = await _list_models(config)
        limit_s = cold_start_s if cards else timeout_s
        async with asyncio.timeout(limit_s):
            return await _look(config, model, tokenizer, endpoint, cards)
    except TimeoutError:
        problem = NoServerError(f"{base_url} did not answer within {limit_s:g} s: it may be starting, or overloaded")
    except BackendConnectionError as error:
        problem = NoServerError(f"nobody answers at {base_url}: start the server, or correct base_url ({error})")
    except ConfigurationError as error:
        problem = error
    return Probe(base_url, problem=problem)


async def _look(
    config: APIServerConfig,
    model: str | None,
    tokenizer: Any,
    endpoint: OpenAIEndpoint,
    cards: dict[str, dict[str, Any]],
) -> Probe:
    if model is not None and cards and model not in cards:
        similar = difflib.get_close_matches(model, cards, n=3, cutoff=0.0)
        raise ConfigurationError(
            f"{endpoint.base_url} does not serve {model!r}: pass model={' or '.join(map(repr, similar))}"
        )
    # LoRA adapters name the model that they belong to as their parent.
    model = model or next((name for name, card in cards.items() if not card.get("parent")), None)
    card = served(cards, model)
    tokenizer_name = card.get("root") or model
    config = config.model_copy(
        update={"model_name": model or config.model_name, "tokenizer_name": tokenizer_name or "none"}
    )
    found = Probe(
        base_url=endpoint.base_url,
        model=model,
        tokenizer_name=tokenizer_name,
        context_length=card.get("max_model_len"),
    )
    failures: list[BackendError] = []
    for protocol in PROTOCOLS:
        server = protocol(config)
        server.context_length = found.context_length
        try:
            answer = await server._tokens_and_logprobs_completion_wrapper(
                input_ids=SAMPLE_IDS, max_tokens=1, temperature=0.0
            )
        except BackendError as error:
            failures.append(error)
        else:
            name = await server.told_tokenizer() or tokenizer_name
            config.tokenizer_name = name or "none"
            problem = await _wrong_tokenizer(server, tokenizer, answer[1][0])
            return replace(found, base_url=server.root, server=server, tokenizer_name=name, problem=problem)
        finally:
            await server.aclose()
    if not cards:
        raise NoServerError(
            f"what answers at {config.base_url} is not an inference server: correct base_url ({failures[0]})"
        )
    server = OpenAIEndpoint(config.model_copy(update={"base_url": endpoint.base_url}))
    if failures[0].status is None or failures[0].status >= 500:
        await _say_hello(server)
    untracked = UntrackedError(
        f"{endpoint.base_url} serves {model} but returns no token ids, so that rollouts can't become training data: "
        f"serve the model with vLLM 0.10.2 or newer, or with SGLang ({failures[0]})"
    )
    return replace(found, server=server, problem=untracked)


async def _say_hello(server: OpenAIEndpoint) -> None:
    """Tell a server that has no token call, and breaks on it, from one that is broken."""
    try:
        await server._chat_completion_wrapper(messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    except BackendError as error:
        raise NoServerError(
            f"{server.base_url} serves {server.config.model_name} but fails: look at the server's log ({error})"
        ) from error
    finally:
        await server.aclose()


async def _list_models(config: APIServerConfig) -> tuple[OpenAIEndpoint, dict[str, dict[str, Any]]]:
    """The OpenAI endpoint and its models' cards by name; no cards where it lists none."""
    given = OpenAIEndpoint(config)
    versioned = OpenAIEndpoint(config.model_copy(update={"base_url": f"{given.base_url.removesuffix('/v1')}/v1"}))
    for endpoint in [versioned] if versioned.base_url == given.base_url else [versioned, given]:
        try:
            listed = await endpoint.request("GET", f"{endpoint.base_url}/models")
            return endpoint, {card["id"]: card for card in listed["data"]}
        except BackendResponseError as error:
            if error.status in {401, 403}:
                raise ConfigurationError(f"{endpoint.base_url} refuses the API key: pass api_key= ({error})") from error
        except (KeyError, TypeError):
            continue
        finally:
            await endpoint.aclose()
    return versioned, {}


async def _wrong_tokenizer(server: TokenServer, tokenizer: Any, sampled: list[int]) -> ConfigurationError | None:
    if tokenizer is None:
        return None
    theirs = await _encoded_by(server)
    ours = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
    if theirs is not None and theirs not in (ours, tokenizer.encode(SAMPLE_TEXT)):
        why = f"the server encodes {SAMPLE_TEXT!r} as {theirs[:8]}…, the tokenizer as {ours[:8]}…"
    elif sampled and max(sampled) >= len(tokenizer):
        why = f"it has {len(tokenizer)} tokens, and the server sampled token {max(sampled)}"
    else:
        return None
    return ConfigurationError(
        f"the tokenizer is not that of the model at {server.root}: {why}; pass the model's own as tokenizer="
    )


async def _encoded_by(server: TokenServer) -> list[int] | None:
    """The server's own encoding of ``SAMPLE_TEXT``; None where it cannot be asked."""
    if isinstance(server, AtroposVLLMServer):
        url, body = f"{server.root}/generate", {"prompt": SAMPLE_TEXT, "max_tokens": 1, "logprobs": 0}
        key = "prompt_token_ids"
    else:
        url, body = f"{server.root}/tokenize", {"prompt": SAMPLE_TEXT, "add_special_tokens": False}
        body["model"] = server.config.model_name
        key = "tokens"
    with contextlib.suppress(BackendResponseError, AttributeError):
        return (await server.request("POST", url, body)).get(key)
    return None
