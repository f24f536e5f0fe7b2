"""Where things run: one event loop for synchronous callers, one pool of threads for rollouts.

Hermes' loop is synchronous and blocks, and a server's connections belong to one event loop. So each rollout has a
thread, each server has a *home loop* on which all of its requests are made, and a rollout's thread waits for the answer
to its request. The home is the loop on which the server was first used. For a synchronous caller and a server that no
loop has used yet, it is the portal: a loop on a thread of this module that lives as long as the process.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

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
    "running_loop",
    "turnstile",
]

P = ParamSpec("P")
T = TypeVar("T")

_homes: weakref.WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def once(make: Callable[[], T]) -> Callable[[], T]:
    """``functools.cache`` for functions that several threads may call at the same time: ``make`` runs once."""
    lock, cached = threading.Lock(), functools.cache(make)

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


@once
def starter() -> concurrent.futures.ThreadPoolExecutor:
    """The thread that starts rollout threads."""
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hermes-atropos-starter")


def home_loop(server: Any, otherwise: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop on which ``server`` is used: its home if that still runs; ``otherwise`` becomes its home."""
    with _lock:
        home = _homes.get(server)
        if home is None or not home.is_running():
            home = _loop_of_semaphores(server) or otherwise
            _homes[server] = home
        return home


def _loop_of_semaphores(server: Any) -> asyncio.AbstractEventLoop | None:
    """The running loop to which a server's semaphores were bound by use outside this library."""
    for candidate in [server, *getattr(server, "servers", [])]:
        loop: asyncio.AbstractEventLoop | None = getattr(getattr(candidate, "sem", None), "_loop", None)
        if loop is not None and loop.is_running():
            return loop
    return None


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that the calling thread runs, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def check_not_on(loop: asyncio.AbstractEventLoop, *, instead: str) -> None:
    """Refuse to block the thread of ``loop``; ``instead`` names the awaitable to use.

    Raises:
        BlockingCallError: the calling thread runs ``loop``.
    """
    if running_loop() is loop:
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
    """Run ``function`` on a rollout thread, with the caller's context variables.

    When the await is cancelled, ``stop`` is called to end the function's work, and the cancellation goes on once the
    thread has ended, or after ``grace`` seconds.
    """
    outcome = submit(functools.partial(contextvars.copy_context().run, function))
    waiting = asyncio.wrap_future(outcome)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not (outcome.cancel() or outcome.done()):
            stop()
            await settle(waiting, grace)
        raise


async def run_to_end(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Run ``function`` on a rollout thread in spite of cancellation, which goes on once it is done."""
    waiting = asyncio.wrap_future(submit(functools.partial(function, *args, **options)))
    cancelled = await settle(waiting)
    result = waiting.result()
    if cancelled:
        raise asyncio.CancelledError
    return result


def submit(function: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Hand ``function`` to the rollout threads, by way of another thread.

    Starting a thread waits until it runs, which takes a while among many busy ones: too long for an event loop.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    starter().submit(rollout_threads().submit, run_into, outcome, function)
    return outcome


def run_into(outcome: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    """Run ``function``, unless ``outcome`` has been cancelled, and put its result or error there."""
    if not outcome.set_running_or_notify_cancel():
        return
    try:
        outcome.set_result(function())
    except BaseException as error:
        # A coroutine cannot raise a StopIteration.
        outcome.set_exception(RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error)
        del outcome  # the error refers to this frame: a cycle otherwise


async def settle(waiting: asyncio.Future[Any], limit: float | None = None) -> bool:
    """Wait until ``waiting`` is done, for ``limit`` seconds at most; whether a cancellation came meanwhile."""
    loop = asyncio.get_running_loop()
    deadline = None if limit is None else loop.time() + limit
    cancelled = False
    while not waiting.done() and (deadline is None or loop.time() < deadline):
        try:
            await asyncio.wait([waiting], timeout=None if deadline is None else deadline - loop.time())
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


class Turnstile:
    """Lets one thread at a time do what several would only slow down.

    Args:
        patience_s: after so many seconds a thread goes on without its turn: whoever is inside may wait for something
            that nobody foresaw, a callback of the user's for example, and perhaps for that very thread.
    """

    def __init__(self, *, patience_s: float = 10.0) -> None:
        self._place = threading.Lock()
        self._first: collections.deque[threading.Lock] = collections.deque()  # who waits for it before all others
        self._passing = threading.Lock()
        self._patience_s = patience_s
        self._thread = threading.local()

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Hold the place; a thread that holds it already, in a callback for example, keeps it."""
        return self._hold(self._wait)

    def first(self) -> contextlib.AbstractContextManager[None]:
        """Hold the place, before all who wait to be ``inside``: for what is short and waited for, such as a release."""
        return self._hold(self._wait_first)

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the place, if this thread holds it, to others meanwhile."""
        if not self._held:
            yield
            return
        self._leave()
        try:
            yield
        finally:
            self._thread.held = self._wait()

    @contextlib.contextmanager
    def _hold(self, wait: Callable[[], bool]) -> Iterator[None]:
        if self._held:
            yield
            return
        self._thread.held = wait()
        try:
            yield
        finally:
            self._leave()

    def _wait(self) -> bool:
        return self._place.acquire(timeout=self._patience_s)

    def _wait_first(self) -> bool:
        turn = threading.Lock()
        with self._passing:
            if self._place.acquire(blocking=False):
                return True
            turn.acquire()
            self._first.append(turn)
        if turn.acquire(timeout=self._patience_s):
            return True
        with self._passing:
            if turn in self._first:
                self._first.remove(turn)
                return False
        return True  # it was passed on just now

    def _leave(self) -> None:
        if self._held:
            self._thread.held = False
            with self._passing:
                if self._first:
                    self._first.popleft().release()  # the place is passed on
                else:
                    self._place.release()

    @property
    def _held(self) -> bool:
        return getattr(self._thread, "held", False)


#: Where Hermes' own code runs, one thread at a time, so that the event loop is late by milliseconds with hundreds of
#: rollouts at once. Threads that compute share one interpreter lock: the loop would wait for each that wants it, 5 ms
#: at a time. A rollout's thread is inside while Hermes computes, and outside while it waits for the model or a tool.
turnstile = Turnstile()
