"""Every environment variable of this library, read in one place, and what they show: bounded, redacted exchanges.

====================================== ========= ======================================================================
variable                               default   meaning
====================================== ========= ======================================================================
``ATROPOS_BYPASS_MANAGED_SERVER``      off       call the OpenAI-compatible endpoint directly with httpx, untracked
``ATROPOS_DIRECT_REQUEST_TIMEOUT_S``   120       limit of such a direct request, seconds
``ATROPOS_AGENT_CHAT_TIMEOUT_S``       none      limit of one model call, seconds
``ATROPOS_DEBUG_AGENT_WAIT_EVERY_S``   none      report every so many seconds while a model call is waited for
``ATROPOS_DEBUG_AGENT_REQUEST``        off       log each request, cut to ``BRIEF`` characters
``ATROPOS_DEBUG_AGENT_REQUEST_FULL``   off       log each request, cut to ``FULL`` characters
``ATROPOS_DEBUG_AGENT_RESPONSE``       off       log each response, cut to ``BRIEF`` characters
``HERMES_DEBUG_ATROPOS_REQUEST``       off       the same as ``ATROPOS_DEBUG_AGENT_REQUEST``
``HERMES_DEBUG_ATROPOS_RESPONSE``      off       the same as ``ATROPOS_DEBUG_AGENT_RESPONSE``
``HERMES_ATROPOS_THREADS``             512       how many rollouts may run at once on threads
====================================== ========= ======================================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hermes_atropos.errors import SettingsError

__all__ = ["BRIEF", "FULL", "Settings", "excerpt", "log_exchange", "redact"]

#: Characters of an ordinary and of a full debug line.
BRIEF, FULL = 4_000, 200_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for.

    Attributes:
        bypass_managed_server: talk to the OpenAI-compatible endpoint itself, without tokens, to isolate a fault.
        direct_request_timeout_s: limit of such a request, in seconds.
        agent_chat_timeout_s: limit of one model call, in seconds; None is no limit.
        wait_report_every_s: seconds between reports while a model call is waited for; None reports nothing.
        request_limit, response_limit: characters of a request or response to log; 0 logs none.
        threads: how many rollouts may run at once on threads.
    """

    bypass_managed_server: bool = False
    direct_request_timeout_s: float = 120.0
    agent_chat_timeout_s: float | None = None
    wait_report_every_s: float | None = None
    request_limit: int = 0
    response_limit: int = 0
    threads: int = 512

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables of the module's table. An empty value counts as unset.

        Raises:
            SettingsError: a switch that is neither on nor off, or a number that is none or not positive.
        """
        brief = _switch(environ, "ATROPOS_DEBUG_AGENT_REQUEST") or _switch(environ, "HERMES_DEBUG_ATROPOS_REQUEST")
        full = _switch(environ, "ATROPOS_DEBUG_AGENT_REQUEST_FULL")
        responses = _switch(environ, "ATROPOS_DEBUG_AGENT_RESPONSE") or _switch(
            environ, "HERMES_DEBUG_ATROPOS_RESPONSE"
        )
        return cls(
            bypass_managed_server=_switch(environ, "ATROPOS_BYPASS_MANAGED_SERVER"),
            direct_request_timeout_s=_seconds(environ, "ATROPOS_DIRECT_REQUEST_TIMEOUT_S") or 120.0,
            agent_chat_timeout_s=_seconds(environ, "ATROPOS_AGENT_CHAT_TIMEOUT_S"),
            wait_report_every_s=_seconds(environ, "ATROPOS_DEBUG_AGENT_WAIT_EVERY_S"),
            request_limit=FULL if full else BRIEF if brief else 0,
            response_limit=BRIEF if responses else 0,
            threads=_count(environ, "HERMES_ATROPOS_THREADS") or 512,
        )


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise SettingsError(f"{name}={environ[name]!r} is neither on nor off: set it to 1 or 0")


def _seconds(environ: Mapping[str, str], name: str) -> float | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError(f"{name}={value!r} is no time limit: set it to a positive number of seconds, or unset it")
    return seconds


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}", value):
        raise SettingsError(f"{name}={value!r} is no count: set it to a whole number from 1 to 99999, or unset it")
    return int(value)


def log_exchange(logger: logging.Logger, title: str, payload: Any, *, limit: int) -> None:
    """Log a request or a response as one bounded line of JSON without secrets; ``limit=0`` logs nothing.

    The level is WARNING: who sets a debug variable wants to see the line, whether or not logging is configured.
    """
    if limit:
        logger.warning("%s: %s", title, excerpt(payload, limit))


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
