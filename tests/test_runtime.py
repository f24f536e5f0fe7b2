"""Loops and threads: where a server's calls are made, what a cancelled await waits for, and who computes."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support import LIMIT, run_script, until

from hermes_atropos.errors import BlockingCallError
from hermes_atropos.runtime import (
    Turnstile,
    check_not_on,
    home_loop,
    portal_loop,
    run_in_rollout_thread,
    run_to_end,
)


class Server:
    """Anything that can be weakly referred to."""


class TestHomeLoop:
    def test_the_portal_is_one_loop_on_a_thread_of_its_own(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            assert len({id(loop) for loop in pool.map(lambda _: portal_loop(), range(8))}) == 1

        async def name() -> str:
            return threading.current_thread().name

        assert asyncio.run_coroutine_threadsafe(name(), portal_loop()).result(LIMIT) == "hermes-atropos-portal"

    async def test_it_is_the_loop_of_the_first_use(self) -> None:
        server = Server()
        assert home_loop(server, asyncio.get_running_loop()) is asyncio.get_running_loop()
        assert home_loop(server, portal_loop()) is asyncio.get_running_loop()

    async def test_each_server_has_its_own(self) -> None:
        one, two = Server(), Server()
        assert home_loop(one, portal_loop()) is portal_loop()
        assert home_loop(two, asyncio.get_running_loop()) is asyncio.get_running_loop()

    def test_a_loop_that_has_ended_is_no_home(self) -> None:
        server = Server()

        async def use() -> asyncio.AbstractEventLoop:
            return home_loop(server, asyncio.get_running_loop())

        first = asyncio.run(use())
        assert asyncio.run(use()) is not first
        assert home_loop(server, portal_loop()) is portal_loop()

    async def test_a_server_in_use_elsewhere_is_used_there(self) -> None:
        """Its semaphore is bound to the loop on which others waited for it."""
        server: Any = Server()
        server.sem = asyncio.Semaphore(1)
        async with server.sem:
            waiting = asyncio.create_task(server.sem.acquire())
            await asyncio.sleep(0)
        await waiting
        assert home_loop(server, portal_loop()) is asyncio.get_running_loop()

    async def test_a_manager_is_where_its_servers_are(self) -> None:
        manager: Any = Server()
        manager.servers = [Server(), Server()]
        manager.servers[1].sem = asyncio.Semaphore(0)
        waiting = asyncio.create_task(manager.servers[1].sem.acquire())
        await asyncio.sleep(0)
        assert home_loop(manager, portal_loop()) is asyncio.get_running_loop()
        waiting.cancel()


class TestBlockingCalls:
    async def test_on_the_loop_s_own_thread(self) -> None:
        with pytest.raises(BlockingCallError, match=r"use await agent\.go"):
            check_not_on(asyncio.get_running_loop(), instead="await agent.go()")

    async def test_on_another_loop_s_thread(self) -> None:
        check_not_on(portal_loop(), instead="")

    def test_without_a_loop(self) -> None:
        check_not_on(portal_loop(), instead="")


class TestRolloutThread:
    async def test_a_result(self) -> None:
        assert (await run_in_rollout_thread(threading.current_thread)).name.startswith("hermes-atropos-rollout")

    async def test_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError):
            await run_in_rollout_thread(lambda: 1 // 0)

    async def test_context_variables(self) -> None:
        who = contextvars.ContextVar("who", default="nobody")
        who.set("me")
        assert await run_in_rollout_thread(who.get) == "me"

    async def test_a_cancelled_await_stops_the_work_and_waits_for_it(self) -> None:
        started, stopped, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            assert stopped.wait(LIMIT)
            ended.set()

        task = asyncio.create_task(run_in_rollout_thread(work, stop=stopped.set))
        await asyncio.to_thread(started.wait, LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    async def test_cancelled_again_while_it_waits(self) -> None:
        started, stopped, go_on = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            assert go_on.wait(LIMIT)

        task = asyncio.create_task(run_in_rollout_thread(work, stop=stopped.set))
        await asyncio.to_thread(started.wait, LIMIT)
        task.cancel()
        await asyncio.to_thread(stopped.wait, LIMIT)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_work_that_does_not_stop_is_waited_for_no_longer_than_the_grace(self) -> None:
        started, go_on = threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            assert go_on.wait(LIMIT)

        task = asyncio.create_task(run_in_rollout_thread(work, grace=0.05))
        await asyncio.to_thread(started.wait, LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    async def test_cancelled_before_it_began(self) -> None:
        """Nothing runs that nobody waits for."""
        ran: list[int] = []
        task = asyncio.create_task(run_in_rollout_thread(lambda: ran.append(1)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ran == []

    async def test_work_that_raises_after_the_cancellation(self) -> None:
        started, stopped = threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            stopped.wait(LIMIT)
            raise ZeroDivisionError

        task = asyncio.create_task(run_in_rollout_thread(work, stop=stopped.set))
        await asyncio.to_thread(started.wait, LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_hundreds_at_once(self) -> None:
        together = threading.Barrier(300, timeout=LIMIT)
        await asyncio.gather(*(run_in_rollout_thread(together.wait) for _ in range(300)))


class TestRunToEnd:
    async def test_in_spite_of_cancellation(self) -> None:
        started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            assert go_on.wait(LIMIT)
            ended.set()

        task = asyncio.create_task(run_to_end(work))
        await asyncio.to_thread(started.wait, LIMIT)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    async def test_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError):
            await run_to_end(lambda: 1 // 0)

    async def test_nothing_happens_to_it(self) -> None:
        ended = threading.Event()
        await run_to_end(ended.set)
        assert ended.is_set()


FEW_THREADS = """
import asyncio, os
from support import agent_on, nothing_left, terminal
from hermes_atropos.testing import ScriptedServer

def model(messages):
    return "Done." if len(messages) > 4 else terminal("echo 1")

async def rollout(agent):
    async with agent.task() as task:
        result = await task.run("Go.")
        assert (await task.terminal("echo 2")).output.strip() == "2"
    return result["final_response"]

async def main():
    agent = agent_on(ScriptedServer(model))
    answers = await asyncio.gather(*(rollout(agent) for _ in range(4)))
    waiting = [asyncio.create_task(rollout(agent)) for _ in range(4)]
    await asyncio.sleep(0)
    for task in waiting[1:]:
        task.cancel()
    answers += [await waiting[0]]
    await asyncio.wait(waiting)
    print(*answers)

with nothing_left():
    asyncio.run(main())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rollouts_than_threads_take_turns(threads: int, tmp_path: Path) -> None:
    done = run_script(FEW_THREADS, tmp_path, HERMES_ATROPOS_THREADS=str(threads))
    assert done.stdout.split() == ["Done."] * 5


class TestTurnstile:
    @staticmethod
    def at_once(turnstile: Turnstile, threads: int, *, first: int = 0) -> int:
        """The most threads that were inside at the same time."""
        inside, most, lock = 0, 0, threading.Lock()

        def work(number: int) -> None:
            nonlocal inside, most
            for _ in range(20):
                with turnstile.first() if number < first else turnstile.inside():
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    with lock:
                        inside -= 1
                    with turnstile.outside():
                        pass

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LIMIT)
        assert not any(worker.is_alive() for worker in workers)
        return most

    def test_one_at_a_time(self) -> None:
        assert self.at_once(Turnstile(), 12) == 1

    def test_whoever_went_on_without_its_turn_gives_no_place_back(self) -> None:
        turnstile = Turnstile(patience_s=0.01)
        with turnstile.inside():
            assert self.enters(turnstile)
            assert turnstile._place.locked()
        assert not turnstile._place.locked()

    def test_patience_has_an_end(self) -> None:
        """Whoever is inside may wait for the thread that waits to come in."""
        turnstile = Turnstile(patience_s=0.01)
        with turnstile.inside():
            assert self.enters(turnstile)
            with turnstile.outside():
                assert self.enters(turnstile)
        assert self.enters(turnstile)

    @staticmethod
    def enters(turnstile: Turnstile) -> bool:
        """Whether another thread finds a place."""
        entered = threading.Event()

        def enter() -> None:
            with turnstile.inside():
                entered.set()

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        return entered.wait(1)

    def test_the_place_is_another_s_while_one_is_outside(self) -> None:
        turnstile = Turnstile()
        with turnstile.inside(), turnstile.outside():
            assert self.enters(turnstile)
        assert self.enters(turnstile)

    def test_who_is_to_be_first_comes_before_all_who_wait(self) -> None:
        turnstile, order = Turnstile(), list[str]()
        waiting = threading.Semaphore(0)

        def enter(name: str, turn: Callable[[], AbstractContextManager[None]]) -> None:
            waiting.release()
            with turn():
                order.append(name)

        threads = [threading.Thread(target=enter, args=(f"waits{number}", turnstile.inside)) for number in range(5)]
        threads.append(threading.Thread(target=enter, args=("first", turnstile.first)))
        with turnstile.inside():
            for thread in threads:
                thread.start()
                waiting.acquire(timeout=LIMIT)
            until(lambda: len(turnstile._first) == 1)
        for thread in threads:
            thread.join(LIMIT)
        assert order[0] == "first"
        assert sorted(order[1:]) == [f"waits{number}" for number in range(5)]
        assert not turnstile._place.locked()

    def test_the_first_are_one_at_a_time_too(self) -> None:
        assert self.at_once(Turnstile(), 12, first=4) == 1

    def test_the_patience_of_the_first_has_an_end(self) -> None:
        turnstile = Turnstile(patience_s=0.01)
        with turnstile.inside(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(self._is_first, turnstile).result(LIMIT)
            assert not turnstile._first
        assert not turnstile._place.locked()

    @staticmethod
    def _is_first(turnstile: Turnstile) -> bool:
        with turnstile.first():
            return True

    def test_outside_twice(self) -> None:
        turnstile = Turnstile()
        with turnstile.inside(), turnstile.outside(), turnstile.outside():
            assert self.enters(turnstile)
        assert self.enters(turnstile)

    def test_outside_without_a_place(self) -> None:
        turnstile = Turnstile()
        with turnstile.outside():
            assert self.enters(turnstile)
        assert self.enters(turnstile)

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_whatever_is_raised_gives_the_place_back(self, error: type[BaseException]) -> None:
        turnstile = Turnstile()
        with pytest.raises(error), turnstile.inside(), turnstile.outside():
            raise error
        assert self.enters(turnstile)

    def test_inside_again_takes_no_second_place(self) -> None:
        """A callback of one agent may run another one, on the same thread."""
        turnstile = Turnstile()
        entered = threading.Event()

        def enter() -> None:
            with turnstile.inside():
                with turnstile.inside():
                    entered.set()
                with turnstile.outside():
                    assert self.enters(turnstile)

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        thread.join(5)
        assert entered.is_set()
        assert self.enters(turnstile)
