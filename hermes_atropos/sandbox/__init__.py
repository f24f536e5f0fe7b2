"""Stand-in until the room is there."""

from hermes_atropos.hermes.terminal import CommandResult, Sandbox

__all__ = ["CommandResult", "Sandbox"]
