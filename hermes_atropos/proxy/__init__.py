"""One OpenAI-compatible endpoint a rollout, for any harness in any process: the only room that answers HTTP."""

from hermes_atropos.proxy.app import proxy_app
from hermes_atropos.proxy.command import CommandAgent
from hermes_atropos.proxy.listen import Proxy, ProxySession
from hermes_atropos.proxy.session import Limits

__all__ = ["CommandAgent", "Limits", "Proxy", "ProxySession", "proxy_app"]
