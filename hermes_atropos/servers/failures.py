"""What goes wrong with a server, as one of this library's errors."""

from __future__ import annotations

import email.utils
import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from tenacity import RetryError

from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    ContextLengthError,
    HermesAtroposError,
    UnsupportedServerError,
)

__all__ = ["BODY_KEPT", "response_error", "typed", "unexpected", "url_of"]

#: Characters of a failed answer's body that its error keeps.
BODY_KEPT = 2_000


def unexpected(url: str, answer: Any, why: str) -> BackendResponseError:
    """The error for an answer that came with success and is not what was asked for."""
    body = answer if isinstance(answer, str) else json.dumps(answer)
    return BackendResponseError(
        f"{url} did not answer as its protocol says ({why}): {body[:200]}", url=url, status=200, body=body[:BODY_KEPT]
    )


def response_error(url: str, status: int, body: str, headers: Mapping[str, str] | None = None) -> BackendError:
    """The error for an HTTP error status: ``ContextLengthError`` where the body says so, else ``BackendResponseError``.

    Its ``retry_after`` is what the ``Retry-After`` header asks for.
    """
    kind: type[BackendError] = ContextLengthError if _says_overlong(status, body) else BackendResponseError
    return kind(
        f"{url} answered {status}: {_words(body)[:500]}",
        url=url,
        status=status,
        body=body[:BODY_KEPT],
        retry_after=_retry_after((headers or {}).get("retry-after", "")),
    )


def _says_overlong(status: int, body: str) -> bool:
    """Whether an error says that prompt and answer do not fit into the context: by its code or parameter, else by its
    words."""
    if status not in {400, 413, 422}:
        return False
    try:
        error = json.loads(body)
    except ValueError:
        error = {}
    error = error.get("error", error) if isinstance(error, Mapping) else {}
    told = error if isinstance(error, Mapping) else {"message": error}
    if told.get("code") == "context_length_exceeded" or told.get("param") in {"input_tokens", "input_text"}:
        return True
    message = str(told.get("message") or body)
    # A request for no token at all is never sent, so it is what vLLM made of a prompt that fills the context.
    return bool(_OVERLONG.search(message)) and not _TOO_MANY_ASKED.search(message)


def _words(body: str) -> str:
    """What a body says; of a page, as a gateway in front of the server sends, without its tags."""
    body = body.strip()
    if body.startswith("<"):
        return " ".join(re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", body, flags=re.S).split())
    return body


def _retry_after(header: str) -> float | None:
    """Seconds from a ``Retry-After`` header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    date = email.utils.parsedate_tz(header)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


# How OpenAI, vLLM and SGLang word a prompt that does not fit.
_OVERLONG = re.compile(
    r"context[ _]length|context window|max(?:imum)?[ _]model[ _]len|longer than the (?:maximum )?model|"
    r"exceeds the maximum allowed length|"
    r"max_tokens must be at least 1, got 0",
    re.I,
)

# How vLLM words a max_tokens that no prompt would leave room for.
_TOO_MANY_ASKED = re.compile(r"max_\w*tokens=\d+ cannot be greater than", re.I)


def typed(error: Exception, server: Any) -> HermesAtroposError:
    """A server's exception as one of ours. What can't be recognised is a plain ``BackendError``: never retried."""
    import aiohttp
    import httpx
    import openai

    url = url_of(server)
    match error:
        case HermesAtroposError():
            return error
        case RetryError(last_attempt=last) if isinstance(cause := last.exception(), Exception):
            return typed(cause, server)
        case NotImplementedError():
            return UnsupportedServerError(f"{type(server).__name__} has no token call: {error}")
        case aiohttp.ClientResponseError(status=status) if status >= 400:
            # atroposlib's servers drop the body before it can be read.
            return response_error(str(error.request_info.real_url), status, error.message, error.headers)
        case httpx.HTTPStatusError(response=response) | openai.APIStatusError(response=response):
            return response_error(str(response.url), response.status_code, response.text, response.headers)
        case TimeoutError() | httpx.TimeoutException() | openai.APITimeoutError():
            return BackendTimeoutError(f"{url} did not answer in time", url=url)
        case aiohttp.ClientResponseError() | httpx.DecodingError() | httpx.TooManyRedirects() | json.JSONDecodeError():
            return BackendResponseError(f"{url} gave no answer to what was asked: {error}", url=url)
        case ConnectionError() | socket.gaierror() | aiohttp.ClientError():
            return BackendConnectionError(f"no answer from {url}: {error or type(error).__name__}", url=url)
        case httpx.TransportError() | openai.APIConnectionError():
            return BackendConnectionError(f"no answer from {url}: {error.__cause__ or error}", url=url)
    refused = getattr(error, "status_code", None)
    if isinstance(refused, int) and refused >= 400:
        return response_error(str(url), refused, str(error))
    return BackendError(f"the call of {type(server).__name__} failed: {type(error).__name__}: {error}", url=url)


def url_of(server: Any) -> str | None:
    return getattr(getattr(server, "config", None), "base_url", None)
