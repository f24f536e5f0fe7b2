"""Every environment variable of this library, read in one place.

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

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hermes_atropos.errors import SettingsError

__all__ = ["BRIEF", "FULL", "Settings"]

#: Characters of an ordinary and of a full debug line.
BRIEF, FULL = 4_000, 200_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for, in the words of the module's table. None sets no limit and reports nothing.

    Attributes:
        request_limit, response_limit: characters of a request or response to log; 0 logs none.
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
            SettingsError: a switch that is neither on nor off, or a limit that is not a positive number.
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
        raise SettingsError(
            f"{name}={value!r} is not a time limit: set it to a positive number of seconds, or unset it"
        )
    return seconds


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}", value):
        raise SettingsError(f"{name}={value!r} is not a count: set it to a whole number from 1 to 99999, or unset it")
    return int(value)
