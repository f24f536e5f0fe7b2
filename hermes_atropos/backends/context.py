"""How many tokens a conversation may have: what servers say of themselves, asked once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from typing import Any
from weakref import WeakKeyDictionary

from hermes_atropos.backends import Backend, servers_of
from hermes_atropos.errors import BackendError, UnsupportedServerError
from hermes_atropos.runtime import portal_loop
from hermes_atropos.servers import OpenAIEndpoint

__all__ = ["ask_context_length", "length_of"]

_asked: WeakKeyDictionary[Any, concurrent.futures.Future[int | None]] = WeakKeyDictionary()
_lock = threading.Lock()

ANSWER_LIMIT_S = 5.0


def ask_context_length(backend: Backend) -> concurrent.futures.Future[int | None]:
    """The smallest that the backend's servers list of themselves, else the tokenizer's; None where nobody says.

    Each server is asked once, off the calling thread, by ``/models``, within five seconds.
    """
    servers = servers_of(backend.server)
    lengths = [getattr(server, "context_length", None) or _ask_one(server) for server in servers]
    return asyncio.run_coroutine_threadsafe(_smallest(lengths, getattr(backend, "tokenizer", None)), portal_loop())


async def _smallest(lengths: list[Any], tokenizer: Any) -> int | None:
    told = [length if isinstance(length, int) else await asyncio.wrap_future(length) for length in lengths]
    return min(filter(None, told), default=None) or length_of(tokenizer)


def length_of(tokenizer: Any) -> int | None:
    """How many tokens a tokenizer says that its model takes; None where it does not say."""
    length = getattr(tokenizer, "model_max_length", None)
    # Hugging Face's word for "unknown" is 10**30.
    return length if isinstance(length, int) and 0 < length < 10**8 else None


def _ask_one(server: Any) -> concurrent.futures.Future[int | None]:
    with _lock:
        if server not in _asked:
            _asked[server] = asyncio.run_coroutine_threadsafe(_listed(server), portal_loop())
        return _asked[server]


async def _listed(server: Any) -> int | None:
    with contextlib.suppress(BackendError, UnsupportedServerError):
        base_url = getattr(server, "base_url", server.config.base_url)
        endpoint = OpenAIEndpoint(server.config.model_copy(update={"base_url": base_url}))
        try:
            return await endpoint.listed_context_length(timeout_s=ANSWER_LIMIT_S)
        finally:
            await endpoint.aclose()
    return None
