"""A real model without a server: a small Llama in numpy, in this process or as a process that speaks vLLM's protocol.

``llama`` computes, ``sampler`` draws, ``engine`` batches what comes and goes, ``server`` is an atroposlib server,
``http`` answers as vLLM does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hermes_atropos.embedded.server import MODEL, EmbeddedServer

__all__ = ["MODEL", "EmbeddedServer"]


def __getattr__(name: str) -> Any:
    # Not at once: ``python -m hermes_atropos.embedded`` says how many threads numpy may have before numpy is there.
    if name in __all__:
        from hermes_atropos.embedded import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
