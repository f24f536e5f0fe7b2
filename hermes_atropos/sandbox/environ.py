"""Which of the trainer's variables a task's processes must not have: its keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from hermes_atropos.logs import redact

__all__ = ["keys_in"]

#: A name of which a word says that it has a key, or leads to one.
NAME = re.compile(
    r"""
    (?:^|_) (?: api_?keys? | auth | cookies? | dsn | gpg_agent_info | kerberos | keys? | krb5ccname | kubeconfig | netrc
              | jwt | pat | tokens? ) (?:_|$)
    | access_?key | credential | passphrase | passwd | password | secret | private_?key | _pwd$ | apikey
    """,
    re.I | re.X,
)


def keys_in(environ: Mapping[str, str]) -> set[str]:
    """The variables that look like a key, by their name or their value (a provider's prefix, a password in a URL)."""
    return {name for name, value in environ.items() if is_key(name, value)}


@functools.lru_cache(maxsize=4096)
def is_key(name: str, value: str) -> bool:
    return bool(NAME.search(name)) or redact(value) != value
