"""What the library has to say: its warnings on standard error, and what the debug variables show, without secrets.

Hermes puts a queue on the root logger, for its own log files. To :mod:`logging` that is a handler, so it would print
nothing more. :class:`ToStandardError` on the library's own logger does, and leaves alone what another handler prints.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["ToStandardError", "excerpt", "keys_in", "log_exchange", "redact", "show"]


class ToStandardError(logging.Handler):
    """Writes warnings to standard error, unless another handler on their way writes them there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        # Hermes' `-z` points sys.stderr at nowhere while its agent runs.
        muted = sys.stderr is None or getattr(sys.stderr, "name", None) == os.devnull
        stream = sys.__stderr__ if muted else sys.stderr
        if stream is None or any(_prints(handler, record, stream) for handler in _others(record, self)):
            return
        try:
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except Exception:
            self.handleError(record)


def _prints(handler: logging.Handler, record: logging.LogRecord, stream: Any) -> bool:
    """Whether a handler writes the record to the stream: one of :mod:`logging`, or of rich."""
    to = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    return to is not None and to in (stream, sys.__stderr__) and record.levelno >= handler.level


def _others(record: logging.LogRecord, own: logging.Handler) -> Iterator[logging.Handler]:
    """The handlers that a record passes, as :meth:`logging.Logger.callHandlers` goes through them."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        yield from (handler for handler in logger.handlers if handler is not own)
        logger = logger.parent if logger.propagate else None


def show(logger: logging.Logger, message: str, *values: object) -> None:
    """Log what a debug variable asks for as a warning, whatever level the logger has."""
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, values, None)
    logger.handle(record)


def log_exchange(logger: logging.Logger, title: str, payload: Any, *, limit: int) -> None:
    """Show a request or a response as one bounded line of JSON without secrets; ``limit=0`` shows nothing."""
    if limit:
        show(logger, "%s: %s", title, excerpt(payload, limit))


def excerpt(payload: Any, limit: int) -> str:
    """``payload`` as JSON of at most ``limit`` characters and a note of what was cut, without secrets.

    Strings and lists are cut before they are serialised, so that the cost depends on ``limit`` and not on the payload.
    """
    text = redact(json.dumps(_bounded(payload, limit), ensure_ascii=False, default=repr))
    return text if len(text) <= limit else f"{text[:limit]}… [{len(text) - limit} more characters]"


def _bounded(value: Any, limit: int, *, schemas: bool = False) -> Any:
    """``value`` without secrets and with little that ``limit`` would cut; ``schemas``: it has JSON schemas by name."""
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[:limit]}… [{len(value) - limit} more characters]"
    if isinstance(value, Mapping):
        return {
            str(k): "[redacted]"
            if _SECRET_KEY.search(str(k)) and not (schemas and isinstance(v, Mapping))
            else _bounded(v, limit, schemas=k == "properties")
            for k, v in value.items()
        }
    if is_dataclass(value) and not isinstance(value, type):
        return _bounded({entry.name: getattr(value, entry.name) for entry in fields(value)}, limit)
    if isinstance(value, list | tuple):
        # A list item takes two characters of JSON at least.
        kept = [_bounded(item, limit) for item in value[: limit // 2]]
        return kept if len(kept) == len(value) else [*kept, f"… [{len(value) - len(kept)} more items]"]
    if hasattr(value, "model_dump"):
        return _bounded(value.model_dump(exclude_none=True), limit)
    return value


_SECRET_KEY = re.compile(
    r"api[-_]?key|authorization|password|passwd|secret|credential|cookie|(?:access|auth)[-_]?token", re.I
)

_SECRETS = [
    # Provider keys by prefix: OpenAI and its imitators, Hugging Face, GitHub, Slack, AWS, Google.
    (re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"), "[redacted]"),
    (re.compile(r"\b(?:hf|ghp|gho|ghs|ghu|github_pat|xox[abprs]|glpat|npm|pypi)[_-][A-Za-z0-9_-]{16,}"), "[redacted]"),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "[redacted]"),
    (re.compile(r"\bAIza[0-9A-Za-z_-]{30,}"), "[redacted]"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"), "[redacted]"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.S), "[redacted]"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1 [redacted]"),
    # NAME_OF_A_SECRET=value, as in a shell or an .env file.
    (
        re.compile(r"\b(\w*(?:API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD)\w*)(=|: ?)[\"']?[^\s\"'\\,;]{6,}"),
        r"\1\2[redacted]",
    ),
    # The same in lower case, and in JSON, however often that is quoted.
    (
        re.compile(
            r"([\w-]*(?:api[-_]?key|password|passwd|secret|credential|(?:access|auth)[-_]?token)[\w-]*"
            r"(?:\\*[\"'])?\s*[:=]\s*(?:\\*[\"'])?)[^\s\"'\\,;{}\[\]]{6,}",
            re.I,
        ),
        r"\1[redacted]",
    ),
    # Credentials in a URL.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:\"]+:[^\s/@\"]+@", re.I), r"\1[redacted]@"),
]


def redact(text: str) -> str:
    """``text`` with ``[redacted]`` in place of what looks like a key, token, password or private key."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


#: A name of an environment variable of which a word says that it has a key, or leads to one.
_SECRET_VARIABLE = re.compile(
    r"""
    (?:^|_) (?: api_?keys? | auth | cookies? | dsn | gpg_agent_info | kerberos | keys? | krb5ccname | kubeconfig | netrc
              | jwt | pat | tokens? ) (?:_|$)
    | access_?key | credential | passphrase | passwd | password | secret | private_?key | _pwd$ | apikey
    """,
    re.I | re.X,
)


def keys_in(environ: Mapping[str, str]) -> set[str]:
    """The variables that look like a key, by their name or their value (a provider's prefix, a password in a URL)."""
    return {name for name, value in environ.items() if _is_key(name, value)}


@functools.lru_cache(maxsize=4096)
def _is_key(name: str, value: str) -> bool:
    return bool(_SECRET_VARIABLE.search(name)) or redact(value) != value
