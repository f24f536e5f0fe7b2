"""What can answer a conversation: token ids where the server has them, plain chat where it has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from hermes_atropos.errors import NoServerError
from hermes_atropos.messages import Message, Tool
from hermes_atropos.toolcalls import ToolCall

__all__ = ["Backend", "ModelTurn", "servers_of"]


def servers_of(server: Any) -> list[Any]:
    """The servers of a ``ServerManager``; a server alone is one.

    Raises:
        NoServerError: a ``ServerManager`` without servers.
    """
    servers = list(getattr(server, "servers", [server]))
    if not servers:
        raise NoServerError("the ServerManager has no servers: give it at least one APIServerConfig")
    return servers


@dataclass(slots=True)
class ModelTurn:
    """One answer of the model.

    Attributes:
        content: the visible text, without reasoning and without well-formed tool-call blocks; None if there is none.
        reasoning: what stood in the reasoning channel or in ``<think>``; None if there is none.
        calls: every attempt at a tool call, in the order of the text, malformed ones included (see
            ``ToolCall.status``).
        finish_reason: ``stop``, ``length`` or ``tool_calls``, as the server reported it.
        ref: the turn's reference in the ledger; None where nothing is tracked.
        prompt_tokens, completion_tokens: counts, 0 where unknown.
        cached_tokens: how many of the prompt's the server had read or sampled before.
        reasoning_tokens: how many of the sampled are reasoning, where the server says so.
        raw: the whole sampled text, special tokens included; equals ``content`` where nothing is tracked.
        model: what the server calls the model that answered; None where it does not say.
    """

    content: str | None
    reasoning: str | None = None
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    ref: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    raw: str = ""
    model: str | None = None


class Backend(Protocol):
    """Answers a list of OpenAI messages. Assistant messages may carry ``TURN_KEY``."""

    #: Whether answers come with token ids and logprobs, so that a rollout can become training data. Where it is True,
    #: the backend is a ``TrackedBackend``.
    tracks_tokens: bool
    #: Whose event loop the calls are made on.
    server: Any

    def fresh(self) -> Self:
        """The same for another rollout: with nothing recorded."""
        ...

    async def sample(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **sampling: Any
    ) -> ModelTurn:
        """Ask for one answer. ``sampling`` holds ``temperature``, ``max_tokens``, ``top_p``, ``stop``, …

        Raises:
            BackendError: the call failed for good.
            TokenFidelityError: the server's answer does not fit the request.
        """
        ...
