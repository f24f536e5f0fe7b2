"""Everything this library raises, in one tree.

    HermesAtroposError
    ├── ConfigurationError            what was handed in cannot work; raised before any model call
    │   ├── NoServerError                 no server, and no base_url to find one at
    │   ├── UnsupportedServerError        an object that is not an atroposlib server
    │   ├── NoTokenizerError              tokens are to be tracked, and no tokenizer is known
    │   ├── ChatTemplateError             a tokenizer without a usable chat template
    │   ├── CheckpointError               a model's files that are missing, or of a kind that can't be run here
    │   ├── UnknownToolsetError           a toolset name that Hermes does not have
    │   ├── WorkspaceError                a workspace that does not exist or is not a directory
    │   ├── ToolDefinitionError           a tool that cannot be described or registered
    │   ├── SamplingError                 a sampling parameter that the server does not know, or a value that is none
    │   ├── SettingsError                 an environment variable whose value cannot be read
    │   └── UnsupportedVersionError       a hermes-agent or atroposlib that is missing, too old or has changed
    ├── BlockingCallError             a synchronous call where it could only deadlock
    ├── BackendError                  a model call that failed for good; carries url, status, body, attempts
    │   ├── BackendConnectionError        nobody answered
    │   ├── BackendTimeoutError           no answer in time
    │   ├── AnswerLostError               the request was sent, and whether it was taken can't be known
    │   ├── BackendResponseError          an answer that is an error, or does not fit the request
    │   └── ContextLengthError            the prompt leaves no room for an answer
    ├── TokenFidelityError            tokens, masks or logprobs that do not fit what was sent and sampled
    ├── ToolCallRetriesError          a model whose tool calls stayed invalid; carries the messages
    ├── UntrackedError                training data asked of a trajectory that has no tokens
    ├── SandboxError                  a sandbox that could not be opened, or was used after its release
    │   ├── SandboxUnavailableError       a wall that cannot stand on this machine
    │   ├── UnsafePathError               a path that leads out of the workspace, or to what is not a regular file
    │   └── FileTooLargeError             a file, or a copy of a workspace, above its limit
    ├── RolloutFailed                 a rollout that the infrastructure ended; carries the trajectory and the attempts
    ├── VerifierError                 a verifier that raised or hung; carries the item and the trajectory
    └── RecordError                   a trajectory record that is truncated, damaged or of another version

A configuration error is also a ``ValueError``, a timeout also a ``TimeoutError``, a connection error also a
``ConnectionError``, an error of a file also an ``OSError``, so that code which knows nothing of this library catches
what it would expect.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AnswerLostError",
    "BackendConnectionError",
    "BackendError",
    "BackendResponseError",
    "BackendTimeoutError",
    "BlockingCallError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigurationError",
    "ContextLengthError",
    "FileTooLargeError",
    "HermesAtroposError",
    "NoServerError",
    "NoTokenizerError",
    "RecordError",
    "RolloutFailed",
    "SamplingError",
    "SandboxError",
    "SandboxUnavailableError",
    "SettingsError",
    "TokenFidelityError",
    "ToolCallRetriesError",
    "ToolDefinitionError",
    "UnknownToolsetError",
    "UnsafePathError",
    "UnsupportedServerError",
    "UnsupportedVersionError",
    "UntrackedError",
    "VerifierError",
    "WorkspaceError",
]


class HermesAtroposError(Exception):
    """The root: catch this to catch whatever the library itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would make it again by its message alone, which for some is not enough.
        return _made_again, (type(self), self.args), vars(self)


def _made_again(kind: type[HermesAtroposError], arguments: tuple[Any, ...]) -> HermesAtroposError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    return error


class ConfigurationError(HermesAtroposError, ValueError):
    """What was handed in cannot work. The message names it and says what to hand in instead."""


class NoServerError(ConfigurationError):
    """No server was given, and no ``base_url`` at which one could be found."""


class UnsupportedServerError(ConfigurationError):
    """The server is neither an atroposlib ``ServerManager`` or ``APIServer`` nor a managed server."""


class NoTokenizerError(ConfigurationError):
    """The server tracks tokens, but no tokenizer was given and none can be derived from it."""


class ChatTemplateError(ConfigurationError):
    """The tokenizer has no chat template, or its template cannot render a conversation."""


class CheckpointError(ConfigurationError):
    """A checkpoint whose files are missing or damaged, or that asks for what the embedded model does not do."""


class UnknownToolsetError(ConfigurationError):
    """A toolset name that Hermes does not know."""


class WorkspaceError(ConfigurationError):
    """The workspace given for a task does not exist or is not a directory."""


class ToolDefinitionError(ConfigurationError):
    """A tool without a name, hints or schema, or whose name is already taken."""


class SamplingError(ConfigurationError):
    """A sampling parameter that the server would ignore or refuse; it was not asked."""


class SettingsError(ConfigurationError):
    """An environment variable of this library holds a value that cannot be read."""


class UnsupportedVersionError(ConfigurationError):
    """hermes-agent or atroposlib is missing, of a release that cannot work, or lacks what the library leans on."""


class BlockingCallError(HermesAtroposError, RuntimeError):
    """A synchronous call on the thread of the event loop that would have to serve it."""


class BackendError(HermesAtroposError):
    """A model call that failed for good.

    Attributes:
        url: where the request went, if known.
        status: the HTTP status of the last answer, if there was one.
        body: the start of the last answer's body, if there was one.
        attempts: how many requests were made.
        retry_after: seconds for which the server asked to be left alone, if it did.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str | None = None,
        status: int | None = None,
        body: str | None = None,
        attempts: int = 1,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.url = url
        self.status = status
        self.body = body
        self.attempts = attempts
        self.retry_after = retry_after


class BackendConnectionError(BackendError, ConnectionError):
    """Nobody answered at the server's address."""


class BackendTimeoutError(BackendError, TimeoutError):
    """The server did not answer in time."""


class AnswerLostError(BackendError):
    """A request that was sent and had no answer: whether it was taken can't be known from here."""


class BackendResponseError(BackendError):
    """The server answered with an error, or with something that does not fit the request."""


class ContextLengthError(BackendError):
    """The prompt fills the model's context: there is no room for an answer."""


class TokenFidelityError(HermesAtroposError):
    """Tokens, masks or logprobs that do not fit what was sent to and sampled by the server.

    Attributes:
        turn: number of the model call in its rollout, from 0; None outside a rollout.
        position: index of the first offending token; None where lengths differ.
        expected, found: what should have been there, and what was.
    """

    def __init__(
        self,
        message: str,
        *,
        turn: int | None = None,
        position: int | None = None,
        expected: Any = None,
        found: Any = None,
    ) -> None:
        where = "" if turn is None else f" (turn {turn}" + ("" if position is None else f", position {position}") + ")"
        super().__init__(f"{message}{where}: expected {expected!r}, found {found!r}")
        self.turn = turn
        self.position = position
        self.expected = expected
        self.found = found


class ToolCallRetriesError(HermesAtroposError):
    """The model's tool calls were still invalid after the last retry.

    Attributes:
        messages: the conversation, with every attempt and the error that answered it.
    """

    def __init__(self, message: str, *, messages: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.messages = messages


class UntrackedError(HermesAtroposError):
    """The trajectory has no tokens, so it cannot become training data."""


class SandboxError(HermesAtroposError):
    """A sandbox could not be opened, or was used after its release."""


class SandboxUnavailableError(SandboxError):
    """This machine cannot make the sandbox that was asked for. The message has the cause and the ways out."""


class UnsafePathError(SandboxError, OSError):
    """A path that leads out of the workspace, or to something that is not a regular file; a verifier may score it."""


class FileTooLargeError(SandboxError, OSError):
    """A file, or a copy of a workspace, that is larger than its limit; a verifier may score it."""


class RolloutFailed(HermesAtroposError):
    """A rollout that the infrastructure ended, so that a score would say nothing of the model. The cause is chained.

    Attributes:
        trajectory: what it left (an ``AgentResult``); None where it never started.
        attempts: how often it was tried.
    """

    def __init__(self, message: str, *, trajectory: Any = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.trajectory = trajectory
        self.attempts = attempts


class VerifierError(HermesAtroposError):
    """A verifier that raised, hung or gave no score: nothing is known of the rollout. The cause is chained.

    Attributes:
        item: what was to be verified against.
        trajectory: the rollout (an ``AgentResult``).
    """

    def __init__(self, message: str, *, item: Any, trajectory: Any) -> None:
        super().__init__(message)
        self.item = item
        self.trajectory = trajectory


class RecordError(HermesAtroposError):
    """A trajectory record that is truncated, damaged or of another version."""
