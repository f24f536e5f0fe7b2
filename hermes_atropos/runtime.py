"""Where things run: one event loop for synchronous callers, one pool of threads for rollouts.

Hermes' loop is synchronous and blocks, a server's connections belong to one event loop. So each rollout has a thread,
each server has a *home loop* on which all of its requests are made, and a thread waits for its request's answer. The
home is the loop on which the server was first used; for a server that no loop has used yet, and a synchronous caller,
it is the portal: a loop on a thread of this module that lives as long as the process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from hermes_atropos.errors import BlockingCallError
from hermes_atropos.settings import Settings

__all__ = [
    "Turnstile",
    "check_not_on",
    "home_loop",
    "once",
    "portal_loop",
    "run_in_rollout_thread",
    "run_on_portal",
    "run_to_end",
    "turnstile",
]

T = TypeVar("T")

_homes: weakref.WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def once(make: Callable[[], T]) -> Callable[[], T]:
    """Called by several threads at once, ``make`` still runs once: ``functools.cache`` alone does not see to that."""
    lock, cached = threading.RLock(), functools.cache(make)

    @functools.wraps(make)
    def get() -> T:
        with lock:
            return cached()

    return get


@once
def portal_loop() -> asyncio.AbstractEventLoop:
    """The event loop for synchronous callers, started on a daemon thread at the first call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="hermes-atropos-portal", daemon=True).start()
    return loop


@once
def rollout_threads() -> concurrent.futures.ThreadPoolExecutor:
    """The pool on which asynchronous rollouts run Hermes; ``HERMES_ATROPOS_THREADS`` sets its size."""
    return concurrent.futures.ThreadPoolExecutor(
        Settings.from_env().threads, thread_name_prefix="hermes-atropos-rollout"
    )


def home_loop(server: Any, otherwise: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop on which ``server`` is used: its home if that still runs; ``otherwise`` becomes its home."""
    with _lock:
        home = _homes.get(server)
        if home is None or not home.is_running():
            home = _loop_of_primitives(server) or otherwise
            _homes[server] = home
        return home


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _loop_of_primitives(server: Any) -> asyncio.AbstractEventLoop | None:
    """The running loop to which a server's semaphores were bound by use outside this library."""
    for candidate in [server, *getattr(server, "servers", [])]:
        loop: asyncio.AbstractEventLoop | None = getattr(getattr(candidate, "sem", None), "_loop", None)
        if loop is not None and loop.is_running():
            return loop
    return None


@once
def spawner() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hermes-atropos-spawner")


def spawn(function: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Hand ``function`` to the rollout threads: to one that is idle, or to a new one by way of a thread.

    Starting a thread waits until it runs, which among many busy ones takes a while: too long for an event loop.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    threads = rollout_threads()
    if threads._idle_semaphore._value > 0:
        threads.submit(run_into, outcome, function)
    else:
        spawner().submit(threads.submit, run_into, outcome, function)
    return outcome


def run_into(outcome: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    """Run ``function``, unless ``outcome`` has been cancelled, and put there what comes of it."""
    if not outcome.set_running_or_notify_cancel():
        return
    try:
        outcome.set_result(function())
    except BaseException as error:
        told = RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
        outcome.set_exception(told)  # a coroutine cannot be told of a StopIteration
        del outcome  # the error knows this frame, which would know the error


def check_not_on(loop: asyncio.AbstractEventLoop, *, instead: str) -> None:
    """Refuse to block the thread of ``loop``; ``instead`` names the awaitable to use.

    Raises:
        BlockingCallError: the calling thread runs ``loop``.
    """
    if _running_loop() is loop:
        raise BlockingCallError(
            f"A synchronous call on the thread of the loop that serves the model could only deadlock: use {instead}."
        )


def run_on_portal(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the portal's loop and wait for it here; Ctrl-C cancels it and waits for its end."""
    loop = portal_loop()
    started: list[asyncio.Task[T]] = []
    ended: concurrent.futures.Future[asyncio.Task[T]] = concurrent.futures.Future()

    def start() -> None:
        started.append(loop.create_task(work()))
        started[0].add_done_callback(ended.set_result)

    loop.call_soon_threadsafe(start)
    try:
        return ended.result().result()
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(lambda: started[0].cancel())
        ended.result()
        raise


async def run_in_rollout_thread(
    function: Callable[[], T], *, stop: Callable[[], object] = lambda: None, grace: float = 30.0
) -> T:
    """Run ``function`` on a rollout thread.

    When the await is cancelled, ``stop`` is called to end the function's work, and the cancellation goes on once the
    thread has ended, or after ``grace`` seconds.
    """
    outcome = spawn(functools.partial(contextvars.copy_context().run, function))
    try:
        return await asyncio.shield(asyncio.wrap_future(outcome))
    except asyncio.CancelledError:
        if not outcome.cancel():
            stop()
            await settle(outcome, grace)
        raise


async def run_to_end(function: Callable[[], object]) -> None:
    """Run ``function`` on a rollout thread in spite of cancellation, which goes on once it is done."""
    outcome = spawn(function)
    cancelled = await settle(outcome)
    outcome.result()
    if cancelled:
        raise asyncio.CancelledError


async def settle(outcome: concurrent.futures.Future[Any], limit: float | None = None) -> bool:
    """Wait until ``outcome`` is done, for ``limit`` seconds at most; whether a cancellation came meanwhile."""
    loop = asyncio.get_running_loop()
    deadline = None if limit is None else loop.time() + limit
    done = asyncio.Event()
    outcome.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    cancelled = False
    while not outcome.done() and (deadline is None or loop.time() < deadline):
        try:
            await asyncio.wait_for(done.wait(), None if deadline is None else deadline - loop.time())
        except asyncio.CancelledError:
            cancelled = True
        except TimeoutError:
            break
    return cancelled


class Turnstile:
    """Lets so many threads at a time do what more of them would only slow down.

    Args:
        places: how many.
        patience_s: after so long a wait a thread goes on as if it had been its turn. Whoever is inside may wait for
            something that nobody foresaw, such as a callback of the user's, and perhaps for that very thread.
    """

    def __init__(self, places: int = 1, *, patience_s: float = 10.0) -> None:
        self._place = threading.Lock() if places == 1 else threading.Semaphore(places)
        self._patience_s = patience_s
        self._thread = threading.local()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Hold the place; a thread that holds it already, in a callback say, goes on with it."""
        if self._held:
            yield
            return
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Give the place, if this thread holds it, to another meanwhile."""
        if not self._held:
            yield
            return
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def enter(self) -> None:
        """Wait for a place, and hold it until ``leave``."""
        self._thread.held = self._place.acquire(timeout=self._patience_s)

    def leave(self) -> None:
        """Give the place, if this thread holds it, to another; again is harmless."""
        if self._held:
            self._thread.held = False
            self._place.release()

    @property
    def _held(self) -> bool:
        return getattr(self._thread, "held", False)


#: Where Hermes' own code runs, a thread at a time, so that hundreds of rollouts leave the event loop its turn. Threads
#: that compute share one interpreter lock: the loop waits for as many switches of it as there are threads that want it,
#: 5 ms each, which no second thread repays. A rollout's thread passes through for the stretches in which Hermes
#: computes, and steps out while it waits for the model or a tool.
turnstile = Turnstile()
