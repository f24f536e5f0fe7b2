"""The former place of ``hermes_atropos.servers``."""

from hermes_atropos.servers import *  # noqa: F403
from hermes_atropos.servers import __all__ as __all__
