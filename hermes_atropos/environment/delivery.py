"""An environment's place at Atropos' API: registered, asked where training is, and given what the outbox holds.

The API keeps everything in memory. When it ends, the environments' registrations and the groups that wait in it go with
it, and what is posted before a trainer has registered spoils the trainer's registration. So whenever the API was away,
the environment registers again, which succeeds once the trainer is there, and only then sends on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Any

from hermes_atropos.environment.outbox import Entry, Event, Outbox
from hermes_atropos.errors import AnswerLostError, BackendConnectionError, BackendError, BackendResponseError
from hermes_atropos.runtime import run_to_end
from hermes_atropos.servers.atropos_api import AtroposAPI

__all__ = ["Delivery"]

logger = logging.getLogger(__name__)

#: Seconds between two tries while the API does not answer, or looks for something to send.
PAUSE = 0.5

#: Answers after which the same request may succeed: the API is busy or has stumbled. A proxy's 502 or 504 is an answer
#: that was lost.
COME_AGAIN = {429, 500, 503}
LOST = {502, 504}


class Delivery:
    """Registers an environment, follows the trainer, and sends the groups of an outbox in order.

    Args:
        api: where to.
        outbox: what.
        environment: what the environment registers as: ``desired_name``, ``group_size``, ….

    Attributes:
        registration: what the API answered to the last registration; None while there is none.
        away: why the API is not there; None while it is.
    """

    def __init__(self, api: AtroposAPI, outbox: Outbox, environment: dict[str, Any]) -> None:
        self._api = api
        self._outbox = outbox
        self._environment = environment
        self.registration: dict[str, Any] | None = None
        self.away: str | None = "not asked yet"
        self._in_queue: deque[Entry] = deque()
        self._in_batch: deque[tuple[Entry, int]] = deque()

    async def register(self) -> dict[str, Any]:
        """Wait until the API is there and a trainer has started; returns what the API says to the environment."""
        while self.registration is None:
            await self._try_to_register()
            if self.registration is None:
                await asyncio.sleep(PAUSE)
        return self.registration

    async def _try_to_register(self) -> None:
        try:
            self.registration = await self._api.register(**self._environment)
        except BackendError as error:
            self._gone_away(str(error))
            return
        if self.registration is None:
            self._gone_away("it waits for a trainer to start")
        else:
            self._back()

    async def status(self) -> dict[str, Any] | None:
        """Where training is; None while the API is away, or has forgotten this environment, which registers again."""
        if self.registration is None:
            await self._try_to_register()
            return None
        sent = len(self._in_queue)  # what is sent meanwhile may be in the answer or not
        try:
            status = await self._api.status(self.registration["env_id"])
        except BackendError as error:
            self._lost_registration(error)
            return None
        self._back()
        await self._follow(status["current_step"], sent - int(status.get("self_queue_size") or 0))
        return status

    async def _follow(self, step: int, left: int) -> None:
        """Note which groups the trainer has drawn, now that ``left`` more have left the queue, and the trainer's step.

        The API makes all batches that it can of its queue, counts a step for each, and makes no more before the trainer
        has drawn them: a group that has left the queue was drawn once there is a further step.
        """
        for _ in range(min(left, len(self._in_queue))):
            self._in_batch.append((self._in_queue.popleft(), step))
        while self._in_batch and self._in_batch[0][1] < step:
            await run_to_end(self._outbox.note, self._in_batch.popleft()[0], Event.DRAWN)

    async def run(self) -> None:
        """Send what the outbox holds, in order, until cancelled."""
        while True:
            if self.registration is None or not (self._outbox.doubtful or self._outbox.waiting):
                await asyncio.sleep(PAUSE / 5)
            elif self._outbox.doubtful:
                await self._settle(self._outbox.doubtful[0], "the process ended while it was sent")
                self._outbox.doubtful.pop(0)
            else:
                await self._send(self._outbox.waiting[0])

    async def drained(self, limit: float) -> bool:
        """Wait until nothing waits, for ``limit`` seconds at most; whether nothing does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self._outbox.waiting:  # noqa: ASYNC110 - the outbox is filled and emptied on threads
                    await asyncio.sleep(PAUSE / 5)
        return not self._outbox.waiting

    async def leave(self) -> None:
        """Tell the API that the environment has ended, if it listens."""
        if self.registration is not None:
            try:
                await self._api.leave(self.registration["env_id"])
            except BackendError as error:
                logger.info("the API was not told that this environment has ended: %s", error)
        await self._api.close()

    async def _send(self, entry: Entry) -> None:
        await run_to_end(self._outbox.note, entry, Event.SENDING)
        try:
            # A fresh API must not get a group before its trainer has registered.
            if (await self._api.trainer()).get("batch_size", -1) == -1 or self.registration is None:
                raise BackendConnectionError(f"{self._api.url} has been started again")
        except BackendError as error:
            await run_to_end(self._outbox.note, entry, Event.READY)
            self._lost_registration(error)
            return
        try:
            await self._api.send(entry.groups, self.registration["env_id"])
        except BackendConnectionError as error:
            await run_to_end(self._outbox.note, entry, Event.READY)
            self._lost_registration(error)
            return
        except AnswerLostError as error:
            await self._settle(entry, str(error))
            self._lost_registration(error)
        except BackendResponseError as error:
            if error.status in COME_AGAIN:
                await run_to_end(self._outbox.note, entry, Event.READY)
                self._gone_away(str(error))
                await asyncio.sleep(error.retry_after or PAUSE)
                return
            if error.status in LOST:
                await self._settle(entry, str(error))
            else:
                logger.error("the API has refused group %s of %s: %s", entry.id, entry.item, error)
                await run_to_end(self._outbox.note, entry, Event.REFUSED, why=str(error))
        else:
            await self._taken(entry)
        self._outbox.waiting.popleft()

    async def _taken(self, entry: Entry) -> None:
        await run_to_end(self._outbox.note, entry, Event.TAKEN)
        self._in_queue.append(entry)

    async def _settle(self, entry: Entry, why: str) -> None:
        """End a group whose answer was lost: the API has it if it is the one that came last; else nobody knows."""
        try:
            latest = await self._api.latest()
            taken = (latest.get("group_overrides") or {}).get("group_id") == entry.id
        except BackendError:
            taken = False
        if taken:
            await self._taken(entry)
            return
        logger.error("whether the API has group %s of %s can't be known, and it is not sent again: %s",
                     entry.id, entry.item, why)  # fmt: skip
        await run_to_end(self._outbox.note, entry, Event.UNKNOWN, why=why)

    def _lost_registration(self, error: BackendError) -> None:
        """The API was away. Whether it is the same that comes back can't be seen: the environment registers again."""
        self._gone_away(str(error))
        self.registration = None
        for entry in [*(entry for entry, _ in self._in_batch), *self._in_queue]:
            logger.warning("group %s of %s was with the API, and is gone if the API has ended", entry.id,
                           entry.item)  # fmt: skip
            self._outbox.note(entry, Event.GONE)
        self._in_queue.clear()
        self._in_batch.clear()

    def _gone_away(self, why: str) -> None:
        if self.away != why:
            logger.warning("the Atropos API is away, rollouts go on and their groups wait: %s", why)
        self.away = why

    def _back(self) -> None:
        if self.away is not None:
            logger.info("the Atropos API is there")
        self.away = None
