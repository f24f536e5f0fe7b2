"""What an environment is at, to look at while it works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:
    from hermes_atropos.environment.env import HermesEnv

__all__ = ["line", "shown"]

logger = logging.getLogger(__name__)

#: Seconds between two looks, in a terminal and in a log.
IN_TERMINAL, IN_LOG = 1.0, 60.0

SHOWN_OTHERWISE = {"rollouts", "tokens", "groups"}


@contextlib.asynccontextmanager
async def shown(env: HermesEnv) -> AsyncIterator[None]:
    """For the length of the block, a line on standard error: live in a terminal, else one a minute in the log."""
    showing = asyncio.create_task(_show(env))
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.wait([showing])


async def _show(env: HermesEnv) -> None:
    started = time.monotonic()
    if not sys.stderr.isatty():
        while True:
            await asyncio.sleep(IN_LOG)
            logger.info("%s", line(env, time.monotonic() - started))
    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        while True:
            live.update(line(env, time.monotonic() - started), refresh=True)
            await asyncio.sleep(IN_TERMINAL)


def line(env: HermesEnv, seconds: float) -> str:
    """Groups, rollouts, reward, tokens and faults, in one line; ``seconds`` since the start."""
    serving = env.serving
    rewards = env.metrics["reward"]
    parts = [
        f"{env.in_flight} rollouts in flight",
        f"{env.counts['rollouts']} done",
        f"reward {fmean(rewards):.3f}" if rewards else "",
        f"{env.counts['tokens'] / max(seconds, 1e-9):.0f} tokens/s",
        f"groups: {serving.outbox.summary()}" if serving else f"{env.curr_step} groups",
        *(f"{count} {name}" for name, count in sorted(env.counts.items()) if name not in SHOWN_OTHERWISE),
        f"API away: {serving.delivery.away}" if serving and serving.delivery.away else "",
    ]
    return " · ".join(filter(None, parts))
