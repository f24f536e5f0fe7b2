"""Inference servers over HTTP, as atroposlib ``APIServer`` classes: one a protocol, listed in ``PROTOCOLS``.

======================== ============================================ ==========================================
class                    speaks to                                    at
======================== ============================================ ==========================================
``StockVLLMServer``      stock ``vllm serve``, 0.10.2 or newer        ``/v1/completions`` with token ids
``VLLMGenerateServer``   ``vllm serve --tokens-only`` and the like    ``/inference/v1/generate``
``StockSGLangServer``    stock SGLang, and Atropos' SGLang servers    ``/generate``
``AtroposVLLMServer``    the vLLM server that Atropos ships           ``/generate``
``OpenAIEndpoint``       anything else; no token ids                  ``chat/completions``, ``completions``
======================== ============================================ ==========================================

Each fits ``ServerManager(configs, server_class=…)`` and ``BaseEnv.server_cls``.
"""

from typing import TypeVar

from hermes_atropos.servers.atropos import AtroposVLLMServer
from hermes_atropos.servers.http import Choice, OpenAIEndpoint, TokenServer
from hermes_atropos.servers.sglang import StockSGLangServer
from hermes_atropos.servers.vllm import StockVLLMServer, VLLMGenerateServer

__all__ = [
    "PROTOCOLS",
    "AtroposVLLMServer",
    "Choice",
    "OpenAIEndpoint",
    "StockSGLangServer",
    "StockVLLMServer",
    "TokenServer",
    "VLLMGenerateServer",
    "register",
]

SomeServer = TypeVar("SomeServer", bound=type[TokenServer])

#: The protocols with token ids, in the order in which what answers at a URL is asked for them.
PROTOCOLS: list[type[TokenServer]] = [StockVLLMServer, StockSGLangServer, AtroposVLLMServer, VLLMGenerateServer]


def register(protocol: SomeServer) -> SomeServer:
    """Class decorator: add a protocol to ``PROTOCOLS``."""
    PROTOCOLS.append(protocol)
    return protocol
