"""What was handed in → a backend: the one place that knows every kind of server there is."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from hermes_atropos.backends import Backend, servers_of
from hermes_atropos.errors import NoServerError, UnsupportedServerError, UntrackedError
from hermes_atropos.rendering.tokenizers import load_tokenizer, own_tokenizer
from hermes_atropos.settings import Settings

__all__ = ["resolve"]

logger = logging.getLogger(__name__)


def resolve(
    server: Any = None,
    *,
    tokenizer: Any = None,
    base_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    tool_format: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    **tracking: Any,
) -> Backend:
    """The backend that can talk to ``server``, or to what answers at ``base_url``.

    Args:
        server: an atroposlib ``ServerManager``, ``APIServer``, ``ManagedServer`` or ``ProxyManagedServer``, or an
            ``ExactManagedServer``. Servers with a token call are tracked, others answer as plain chat.
        tokenizer: a tokenizer, or the name or path of one. Where it is None, the server's own is taken.
        base_url: where to look for a server when none is given. What answers there is found out by ``probe``, which
            blocks for ten seconds at most; on an event loop, call ``asyncio.to_thread(resolve, base_url=…)``.
        model, api_key: for the server at ``base_url``; None asks it which model it serves.
        tool_format: how the model writes tool calls; ``auto`` finds out from the tokenizer.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        settings: the environment's by default; ``bypass_managed_server`` makes the backend an untracked one that
            calls the server's OpenAI-compatible endpoint with httpx.
        tracking: further arguments of ``TrackedBackend`` (``renderer``, ``context_length``, ``vocab_size``);
            ignored where nothing is tracked.

    Raises:
        NoServerError: neither ``server`` nor ``base_url``, or nobody answers there.
        UnsupportedServerError: no atroposlib server, or one that can neither chat nor sample tokens.
        NoTokenizerError: tokens are to be tracked, and no tokenizer was given, known or loadable.
    """
    settings = settings or Settings.from_env()
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    invents_tokens = False
    if server is None:
        if not base_url:
            raise NoServerError("no server: pass server= (ServerManager, APIServer or managed server) or base_url=")
        server = _find(base_url, model, api_key, tokenizer)
    elif hasattr(server, "get_url") and hasattr(server, "session_uuid"):
        server = _endpoint(server.get_url(), server.model_name)
    elif hasattr(server, "get_state") and hasattr(server, "server"):
        from atroposlib.envs.server_handling.managed_server import DummyManagedServer

        invents_tokens = isinstance(server, DummyManagedServer)
        tokenizer = getattr(server, "tokenizer", None) if tokenizer is None else tokenizer
        server = server.server

    servers = servers_of(server)
    for one in servers:
        if not hasattr(one, "config") or not (has_token_call(one) or hasattr(one, "_chat_completion_wrapper")):
            raise UnsupportedServerError(
                f"{type(one).__name__} is not an atroposlib server: pass a ServerManager, an APIServer or a managed "
                "server, or base_url= for a server's address"
            )
    if settings.bypass_managed_server:
        config = servers[0].config
        server = _endpoint(config.base_url, config.model_name, config.api_key, settings.direct_request_timeout_s)
        servers = [server]
    if invents_tokens or not all(map(has_token_call, servers)):
        from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer

        from hermes_atropos.backends.chat import ChatBackend

        # TRL's server renders the chat template itself, without tools.
        forgets_tools = any(isinstance(one, TrlVllmServer) for one in servers)
        return ChatBackend(
            server,
            tool_format=tool_format,
            native_tools=False if forgets_tools else None,
            chat_template_kwargs=chat_template_kwargs,
        )

    from hermes_atropos.backends.tracked import TrackedBackend

    tokenizer = own_tokenizer(servers[0]) if tokenizer is None else tokenizer
    return TrackedBackend(
        server, tokenizer, tool_format=tool_format, chat_template_kwargs=chat_template_kwargs, **tracking
    )


def has_token_call(server: Any) -> bool:
    """Whether a server takes token ids and returns token ids and logprobs.

    atroposlib's OpenAI and TRL servers, and our plain endpoint, have the method but refuse every call.
    """
    from atroposlib.envs.server_handling.openai_server import OpenAIServer
    from atroposlib.envs.server_handling.server_baseline import APIServer
    from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer

    from hermes_atropos.servers import OpenAIEndpoint

    name = "_tokens_and_logprobs_completion_wrapper"
    refusals = {getattr(kind, name) for kind in (APIServer, OpenAIServer, TrlVllmServer, OpenAIEndpoint)}
    return getattr(type(server), name, None) not in {None, *refusals}


def _endpoint(base_url: str, model: str, api_key: str | None = None, timeout_s: float = 1200) -> Any:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

    from hermes_atropos.servers import OpenAIEndpoint

    config = APIServerConfig(base_url=base_url, model_name=model, api_key=api_key or "", health_check=False)
    config.timeout = timeout_s  # seconds; atroposlib declares it a whole number
    return OpenAIEndpoint(config)


_found: WeakValueDictionary[tuple[str, str | None, str | None], Any] = WeakValueDictionary()
_finding = threading.Lock()


def _find(base_url: str, model: str | None, api_key: str | None, tokenizer: Any) -> Any:
    """The server at ``base_url``, looked for once and then shared by all who ask, as long as anyone uses it.

    Raises:
        ConfigurationError: none that could be used.
    """
    from hermes_atropos.servers.probe import probe

    with _finding:
        server = _found.get((base_url, model, api_key))
        if server is None:
            # On a thread of its own, so that it also works where an event loop runs.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                found = thread.submit(lambda: asyncio.run(probe(base_url, model, tokenizer, api_key))).result()
            if isinstance(found.problem, UntrackedError):
                logger.warning("%s", found)
            elif found.problem is not None:
                raise found.problem
            server = _found[base_url, model, api_key] = found.server
        return server
