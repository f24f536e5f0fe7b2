"""Trajectories as Atropos wants them."""

from __future__ import annotations

from typing import Any


def managed_state(trajectory: Any) -> dict[str, Any]:
    from atroposlib.envs.server_handling.managed_server import SequenceNode

    return {
        "nodes": [
            SequenceNode(
                full_text=sequence.full_text,
                tokens=sequence.tokens,
                masked_tokens=sequence.masked_tokens,
                logprobs=sequence.logprobs,
                metadata=sequence.metadata,
            )
            for sequence in trajectory.sequences
        ]
    }
