"""The training profile: a private Hermes home that calls no one.

Hermes reads its home once, when it is imported, and finds there whose model to call, what to remember and what to
source. A rollout that is to be trained on must depend on none of that, so the profile points Hermes at a temporary home
with a small ``config.yaml``, in which auxiliary calls (a tool that lets a model look at an image, say) lead nowhere,
and takes the credentials of the model providers that Hermes knows out of this process's environment: an auxiliary call
of an unknown kind falls back on whichever it finds (`agent/auxiliary_client.py`).

Without it, Hermes reads and writes the user's home as always. Model calls go to the given server either way.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.runtime import once
from hermes_atropos.sandbox.files import remove_at_end

__all__ = ["active_profile", "freeze_heap", "trim_heap", "use_training_profile"]

# A config.yaml must exist: without one every read of the configuration expands all defaults again (about 5 ms, several
# times a model call).
CONFIG = """\
model: {model}
agent:
  # A line of the system prompt on the machine's Python. On a busy machine it may come too late for some prompts of a
  # group, which must be equal.
  environment_probe: false
  # From 0.21 it takes two empty answers for proof that the next is empty too. A sample proves nothing.
  empty_response_guard: {{enabled: false}}
compression:
  enabled: {compression}
memory:
  memory_enabled: false
  user_profile_enabled: false
terminal:
  auto_source_bashrc: false
  lifetime_seconds: 86400
display:
  interim_assistant_messages: false
checkpoints:
  enabled: false
logging:
  level: WARNING
# Of programs that no rollout is: left out, because Hermes copies its whole configuration twice a command.
bedrock: []
dashboard: []
discord: []
gateway: []
kanban: []
stt: []
telegram: []
tts: []
voice: []
auxiliary:
{auxiliary}
"""

#: The kinds of auxiliary calls in `hermes_cli/config.py`, 0.13 to 0.22.
AUXILIARY = [
    *("approval", "background_review", "compression", "curator", "flush_memories", "goal_judge", "kanban_decomposer"),
    *("mcp", "memory_query_rewrite", "moa_aggregator", "moa_reference", "monitor", "profile_describer"),
    *("review", "session_search", "skills_hub", "title_generation", "triage_specifier", "tts_audio_tags", "vision"),
    *("voice_chat", "web_extract"),
]
NOWHERE = "  {}: &nowhere {{provider: custom, base_url: 'inproc://auxiliary.invalid/v1', api_key: none}}"
ALSO_NOWHERE = "  {}: *nowhere"  # Hermes reads the file for each agent, and this in a third of the time

ENVIRONMENT = {
    "HERMES_SKIP_SSL_GUARD": "1",  # reads and checks all certificates at each construction, about 90 ms
    "HERMES_FILE_MUTATION_VERIFIER": "0",  # footers that the harness adds to the final response
    "HERMES_TURN_COMPLETION_EXPLAINER": "0",
    "HERMES_DISABLE_LAZY_INSTALLS": "1",
}

#: Of glibc's mallopt(3), in its malloc.h.
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3

#: In Hermes' list of credentials, and needed elsewhere.
OTHER_USES = {"HF_TOKEN", "GH_TOKEN", "GITHUB_TOKEN"}

_active: Path | None = None
_log_folder: Path | None = None


def active_profile() -> Path | None:
    """The home of the training profile, or None where it is not in use."""
    return _active


def log_folder() -> Path | None:
    """Under which folder Hermes keeps its log files while the training profile is in use; None for no files."""
    return _log_folder


def use_training_profile(
    *,
    context_length: int | None = None,
    compression: bool = False,
    keep_env: Collection[str] = (),
    log_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Give this process a private Hermes home, and take model providers' keys out of its environment, for good.

    Call it before anything else imports Hermes, ``AtroposAIAgent`` included; a second call returns the same home. When
    the first agent is constructed, what the process holds by then, Hermes' modules above all, is taken out of the
    garbage collector's sight (``gc.freeze``): each of its looks through all of that would stop the event loop for a
    tenth of a second. glibc is told to take memory from two heaps: by default it keeps up to eight for each core, which
    hundreds of threads fill in turn, and none has what another has freed. It is also told to take large blocks apart
    from them and to give those back at once, and not, as by default, to do so less and less.

    Args:
        context_length: tokens that the model can read, by which Hermes compresses; None takes what the server says.
        compression: whether Hermes may summarise long histories; each summary starts a new sequence.
        keep_env: names of variables that stay though they hold a provider's key or address: a verifier's judge may
            need them. Hermes' auxiliary calls could find them too.
        log_folder: where Hermes keeps its ``logs/agent.log`` and ``logs/errors.log``; None turns those files off.

    Returns:
        The home, removed when the process ends.

    Raises:
        ConfigurationError: Hermes has been imported already.
    """
    global _active, _log_folder
    if _active is not None:
        return _active
    if "hermes_constants" in sys.modules or "run_agent" in sys.modules:
        raise ConfigurationError(
            "hermes-agent has been imported already and has read the user's home: "
            "call hermes_atropos.use_training_profile() before the first import of AtroposAIAgent or of Hermes itself."
        )
    home = Path(tempfile.mkdtemp(prefix="hermes-atropos-home-"))
    remove_at_end(home)
    config = CONFIG.format(
        model="{}" if context_length is None else f"{{context_length: {context_length}}}",
        compression="true" if compression else "false",
        auxiliary="\n".join([NOWHERE.format(AUXILIARY[0]), *map(ALSO_NOWHERE.format, AUXILIARY[1:])]),
    )
    (home / "config.yaml").write_text(config, encoding="utf-8")
    os.environ.update(ENVIRONMENT, HERMES_HOME=str(home))
    os.environ.setdefault("TMPDIR", tempfile.gettempdir())  # from 0.21, Hermes takes another, and prunes it
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    _active, _log_folder = home, None if log_folder is None else Path(log_folder).absolute()
    for name in provider_credentials() - OTHER_USES - set(keep_env):
        os.environ.pop(name, None)
    return home


@once
def freeze_heap() -> None:
    """What ``use_training_profile`` says of the garbage collector; nothing without the profile."""
    if _active is not None:
        gc.collect()
        gc.freeze()


def trim_heap() -> None:
    """Have glibc give back what is free between what is not, which takes milliseconds; nothing without the profile."""
    if _active is not None:
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def provider_credentials() -> set[str]:
    """The environment variables from which Hermes takes keys and addresses of model providers."""
    from hermes_cli.auth import PROVIDER_REGISTRY

    names = {"OPENROUTER_API_KEY", "OPENROUTER_BASE_URL", "OPENAI_API_BASE"}
    for provider in PROVIDER_REGISTRY.values():
        names.update(provider.api_key_env_vars, [provider.base_url_env_var or ""])
    return names - {""}
