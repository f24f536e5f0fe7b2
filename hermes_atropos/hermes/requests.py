"""What Hermes asks of the model beside the messages, and how a token server is asked for it.

A chat endpoint is sent what Hermes puts into its request. A token server has a sampler's words for some of it, the chat
template has a switch for thinking, and the rest is refused when the agent is constructed.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from hermes_atropos.backends import Backend, servers_of
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.backends.tracked import SAMPLING, TrackedBackend
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.hermes.releases import release
from hermes_atropos.rendering.tokenizers import template_text

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = [
    "IN_PROCESS",
    "UNUSED",
    "add_configured",
    "asked",
    "connect",
    "route_to",
    "serving",
    "warn_of_unused",
    "without",
]

logger = logging.getLogger(__name__)

#: What a request of Hermes has beside what tells the model how to answer.
NOT_SAMPLING = frozenset({"messages", "model", "stream", "stream_options", "timeout", "tools"})

#: What Hermes is told of the way to its model: a URL that HTTP clients refuse before any look-up, and that Hermes takes
#: for a remote one, which it doesn't probe.
IN_PROCESS = {
    "base_url": "inproc://hermes-atropos.invalid/v1",
    "api_key": "in-process",
    "provider": "custom",
    "api_mode": "chat_completions",
}

#: Arguments of Hermes that are not used, and why.
UNUSED = {
    "acp_args": "no agent is started in place of a model",
    "acp_command": "no agent is started in place of a model",
    "api_mode": "a server is asked for chat completions or for tokens",
    "args": "no agent is started in place of a model",
    "command": "no agent is started in place of a model",
    "credential_pool": "the key is api_key=, or the server's own",
    "fallback_model": "one model answers; after a failure of its server, the run ends with that",
}

#: The same of those that a token server has no use for.
OPENROUTER = dict.fromkeys(
    (
        *("openrouter_min_coding_score", "provider_data_collection", "provider_require_parameters", "provider_sort"),
        *("providers_allowed", "providers_ignored", "providers_order"),
    ),
    "it chooses among OpenRouter's providers",
)

#: What Hermes 0.19 asks of a custom endpoint where nobody has said how long an answer may be. Servers refuse it whose
#: context is not much longer, and later releases no longer ask it.
UNASKED_MAX_TOKENS = 65_536

#: What templates call the switch of their thinking, and the level of it.
SWITCHES = ("enable_thinking", "thinking")
LEVEL = "reasoning_effort"


def asked(agent: Hooks, api_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent beside the messages: what Hermes put into its request, and above it what the constructor was given.

    Of ``max_tokens`` the constructor told Hermes, which raises and lowers it as answers need.
    """
    wanted = {name: value for name, value in api_kwargs.items() if name not in NOT_SAMPLING}
    if wanted.get("max_tokens") == UNASKED_MAX_TOKENS and agent.max_tokens is None:
        del wanted["max_tokens"]
    if agent._served.tracks_tokens:  # the rest is Hermes' own word for chat endpoints
        overrides = without(agent.request_overrides, {"chat_template_kwargs"})  # which its prompt has already
        wanted = {name: value for name, value in wanted.items() if name in SAMPLING} | overrides
    return wanted | {name: value for name, value in agent._sampling.items() if name != "max_tokens"}


def without(overrides: Mapping[str, Any] | None, names: Collection[str]) -> dict[str, Any]:
    """Hermes' ``request_overrides`` without what the constructor was given by name."""
    left = {name: value for name, value in (overrides or {}).items() if name not in names}
    if isinstance(left.get("extra_body"), Mapping):
        left["extra_body"] = {name: value for name, value in left["extra_body"].items() if name not in names}
    return left


def warn_of_unused(given: Mapping[str, Any], *, tracked: bool) -> None:
    """Name those of Hermes' arguments that were given and change nothing."""
    for name, why in (UNUSED | (OPENROUTER if tracked else {})).items():
        if given.get(name) and given[name] != IN_PROCESS.get(name):
            _warn_of_unused(name, why)


@functools.cache
def _warn_of_unused(name: str, why: str) -> None:
    logger.warning("AIAgent(%s=…) is not used: %s. This is said once.", name, why)


def route_to(where: Mapping[str, Any], backend: Backend) -> dict[str, Any]:
    """What Hermes is told of the way to its model.

    What it puts into a request to a chat endpoint depends on the address and the provider: it knows some (OpenRouter,
    Ollama), and the user's configuration others (``custom_providers``). Of a token server it knows nothing.

    Raises:
        ConfigurationError: Hermes would ask other models for that provider.
    """
    if where["server"] is None and where["provider"] == "moa":
        raise ConfigurationError("provider='moa': Hermes would ask several models of its own choice. Leave it out")
    if backend.tracks_tokens:
        return IN_PROCESS
    if where["server"] is not None:
        first = servers_of(backend.server)[0]
        return {**IN_PROCESS, "base_url": first.config.base_url or IN_PROCESS["base_url"]}
    key = where["api_key"] or IN_PROCESS["api_key"]
    return {**IN_PROCESS, "base_url": where["base_url"], "api_key": key, "provider": where["provider"]}


def connect(options: Mapping[str, Any], where: Mapping[str, Any]) -> Backend:
    """The backend that ``where`` names (the arguments of ``resolve``, and a provider), for what Hermes was given.

    Raises:
        ConfigurationError: it cannot be asked for what ``options`` ask for.
    """
    where = {name: value for name, value in where.items() if name != "provider"}
    backend = resolve(**where)
    if not backend.tracks_tokens:
        return backend
    overrides = options["request_overrides"]
    if strange := sorted(overrides.keys() - SAMPLING - {"extra_body"}):
        raise ConfigurationError(
            f"request_overrides[{strange[0]!r}]: it belongs to chat endpoints, and this server is asked for tokens. "
            "Leave it out, or put what the server's sampler knows into request_overrides['extra_body']"
        )
    switch = template_switch(cast(TrackedBackend, backend).tokenizer, options.get("reasoning_config"))
    switch |= (overrides.get("extra_body") or {}).get("chat_template_kwargs") or {}
    return resolve(**{**where, "chat_template_kwargs": switch | where["chat_template_kwargs"]}) if switch else backend


def add_configured(agent: Hooks, where: Mapping[str, Any]) -> None:
    """Have a token server asked for what ``custom_providers`` in the user's configuration says of its address.

    Raises:
        ConfigurationError: it cannot be asked for that.
    """
    if not where["base_url"] or where["server"] is not None:
        return
    place = {"provider": where["provider"] or "", "model": agent.model, "base_url": where["base_url"]}
    extra = release().extra_body(**place, custom_providers=getattr(agent, "_custom_providers", None) or [])
    if not extra:
        return
    if "chat_template_kwargs" in extra:
        raise ConfigurationError(
            f"custom_providers: extra_body: chat_template_kwargs: {extra['chat_template_kwargs']}: the server is sent "
            "rendered prompts, so give AtroposAIAgent(chat_template_kwargs=…)"
        )
    overrides = agent.request_overrides or {}
    agent.request_overrides = {**overrides, "extra_body": {**extra, **(overrides.get("extra_body") or {})}}


def serving(server: Any, model: str) -> Any:
    """A server as it is for those who ask for one of its models.

    Raises:
        ConfigurationError: it has no such model.
    """
    servers = getattr(server, "servers", [getattr(server, "server", server)])
    names = [getattr(getattr(one, "config", None), "model_name", None) for one in servers]
    if model not in names:
        has = ", ".join(sorted({str(name) for name in names}))
        raise ConfigurationError(f"the server has no model {model!r}, but {has}: hand in another server for it")
    if set(names) == {model}:
        return server
    twin = copy.copy(server)
    twin.servers = [one for one, name in zip(servers, names, strict=True) if name == model]
    return twin


def template_switch(tokenizer: Any, reasoning: Mapping[str, Any] | None) -> dict[str, Any]:
    """Hermes' ``reasoning_config`` as arguments of the chat template.

    A template with a switch and no level thinks, or does not.

    Raises:
        ConfigurationError: the template has no such argument.
    """
    if not reasoning:
        return {}
    switch = next((name for name in SWITCHES if _reads(tokenizer, name, True, False)), None)
    level = str(reasoning.get("effort") or "").strip().lower()
    thinks = reasoning.get("enabled") is not False and level != "none"
    said: dict[str, Any] = {} if switch is None else {switch: thinks}
    if thinks and level and _reads(tokenizer, LEVEL, "low", "high"):
        said[LEVEL] = level
    if not said and not (thinks and not level):
        raise ConfigurationError(
            f"reasoning_config={dict(reasoning)!r}: the model's chat template has no argument for it "
            f"({', '.join((*SWITCHES, LEVEL))}). Leave it out"
        )
    return said


def _reads(tokenizer: Any, name: str, one: Any, other: Any) -> bool:
    """Whether it matters to a chat template which of the two values an argument has."""
    texts = {template_text(tokenizer, [{"role": "user", "content": "?"}], **{name: value}) for value in (one, other)}
    return len(texts) == 2
