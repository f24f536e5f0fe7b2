"""Inference servers over HTTP, as atroposlib ``APIServer`` classes."""

from hermes_atropos.servers.http import StockSGLangServer, StockVLLMServer

__all__ = ["StockSGLangServer", "StockVLLMServer"]
