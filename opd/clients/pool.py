"""`ReplicaPool`: several servers of one model, asked as one.

Nothing here knows what a request means.

* A request goes to the replica with the fewest outstanding ones, up to a bound on each.
* Connection errors, 5xx, time-outs and answers that `Call.read` does not believe are tried again
  after a pause that doubles, elsewhere if there is an elsewhere. 429 waits as it says. Any other
  4xx is the request's own fault, and is raised as `Rejected` at once.
* What was under way at a replica that leaves the rotation is sent elsewhere at once.
* Every replica is probed with a real, small request. See `opd/clients/health.py` for who is in
  rotation, and for what keeps retries few.
* No request is given up while there is hope. After `wait_s` without an answer it raises
  `Unanswered`, naming URLs and errors.

One background thread runs one event loop with one connection pool; it belongs to the pool and ends
with it. In it every request is a task: `_answer` is its whole life.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import Any

from opd.clients.health import Health, Limits, ReplicaState, Stats
from opd.clients.transport import Call, Failure, Rejected, Transport, Unanswered
from opd.faults import fault_point

CLOSE_S = 10.0  # to end the background thread
TICK_S = 0.1  # how often deadlines are looked at, and replicas that have to be waited for
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # of a request that has failed


@dataclass(slots=True, eq=False)
class _Request:
    """A request on its way to an answer."""

    call: Call
    submitted: float
    turn: asyncio.Future | None = None  # done when `replica` is the one to ask
    replica: Health | None = None  # the last one; not the next, if there is a choice
    deadline: asyncio.Timeout | None = None  # of an attempt, until its answer is there
    failures: int = 0
    first_failure: float | None = None


class ReplicaPool(contextlib.AbstractContextManager):
    """See the module.

    `probe` is a small request that makes the engine compute; it is sent to each replica by itself.

    `close` ends thread, sockets and whatever is under way; a pool is a context manager too.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        *,
        probe: Call,
        limits: Limits | None = None,
        api_key: str | None = None,
        progress: Call | None = None,
    ):
        self.name, self.probe, self.progress = name, probe, progress
        self.limits = limits or Limits()
        self.replicas = [Health(url.rstrip("/"), self.limits) for url in urls]
        self.stats = Stats()
        # while True, probes that fail are no strikes: the servers are known to be busy otherwise
        self.excused = False
        self._waiting: deque[_Request] = deque()
        self._last_answer = self._down_since = None
        self._fault: BaseException | None = None  # of this program, in the background
        self._transport = Transport(
            len(self.replicas) * (self.limits.max_inflight + 4), self.limits.connect_s, api_key
        )
        self._stop = asyncio.Event()
        self._alarm = {replica.url: asyncio.Event() for replica in self.replicas}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"pool {name}", daemon=True)
        self._thread.start()

    # ---- The trainer's side ----

    def submit(self, call: Call) -> Future:
        """Sends `call` as soon as a replica is free; the future has what `call.read` returned,
        Rejected or Unanswered.
        """
        if not self._thread.is_alive():
            raise RuntimeError(f"{self.name}: its thread has ended") from self._fault
        return asyncio.run_coroutine_threadsafe(
            self._answer(_Request(call, time.monotonic())), self._loop
        )

    def collect(self, futures: Sequence[Future]) -> list[Any]:
        """The answers, in order.

        The first failure is raised at once, and the other futures are cancelled.
        """
        pending = set(futures)
        try:
            while pending:
                done, pending = wait_for_futures(
                    pending, timeout=1.0, return_when="FIRST_EXCEPTION"
                )
                for future in [
                    *done,
                    *(f for f in pending if f.cancelled()),
                ]:  # `wait` does not call those done
                    future.result(timeout=0)
                if pending and not self._thread.is_alive():
                    raise RuntimeError(f"{self.name}: its thread has ended") from self._fault
        except BaseException:
            self.cancel(futures)
            raise
        return [future.result(timeout=0) for future in futures]

    def cancel(self, futures: Sequence[Future]) -> None:
        """Gives requests up; what a server is computing for them is aborted there."""
        for future in reversed(futures):  # those that wait first: they are not to start now
            future.cancel()

    def ask_each(self, call: Call, timeout_s: float = 60.0) -> dict[str, Any]:
        """URL -> that replica's own answer to `call`, or the exception; one attempt, whoever is in
        rotation.
        """

        async def ask(replica: Health):
            try:
                return await self._transport.ask(replica.url, call, timeout_s)
            except (Failure, Rejected) as error:
                return error

        async def ask_all():
            async with asyncio.timeout(2 * timeout_s):
                return await asyncio.gather(*map(ask, self.replicas))

        answers = asyncio.run_coroutine_threadsafe(ask_all(), self._loop).result(
            timeout=3 * timeout_s
        )
        return dict(zip([r.url for r in self.replicas], answers, strict=True))

    def take_stats(self) -> Stats:
        """The statistics since the last call."""
        stats, self.stats = self.stats, Stats()
        stats.bytes_received = self._transport.take_bytes()
        return stats

    def close(self) -> None:
        """Ends everything; what is under way is cancelled. More than one call is fine."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=CLOSE_S)
            assert not self._thread.is_alive(), f"pool {self.name}: its thread does not end"

    def __exit__(self, *_) -> None:
        self.close()

    # ---- The background loop ----

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        watchers = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        watchers.append(asyncio.create_task(self._keep_deadlines()))  # ends when the pool is closed
        ended = set()
        while not ended:
            ended, _ = await asyncio.wait(watchers, timeout=1.0, return_when="FIRST_COMPLETED")
        self._fault = next(filter(None, (task.exception() for task in ended)), None)
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CLOSE_S / 2)
        await self._transport.close()

    async def _answer(self, request: _Request) -> Any:
        """Attempts until one is answered, or until there is no hope."""
        try:
            while True:
                try:
                    value = await self._attempt(request)
                    self._answered(request)
                    return value
                except Failure as failure:
                    pause = self._failed(request, failure)
                finally:
                    self._release(request)
                if self._hopeless_for(request) >= self.limits.wait_s:
                    raise self._unanswered(request)
                await asyncio.sleep(pause)
        except Rejected as error:
            raise Rejected(f"{self.name}: {error}") from None
        except asyncio.CancelledError:
            if self._fault is not None:
                raise self._fault from None
            raise

    async def _attempt(self, request: _Request) -> Any:
        """Waits for a replica that is free, and asks it."""
        request.turn = self._loop.create_future()
        if request.replica is None:
            self._waiting.append(request)
        else:  # it has stood in line before
            self._waiting.appendleft(request)
        self._dispatch()
        await request.turn
        if request not in request.replica.inflight:
            raise Failure("connection", "its replica left the rotation before it was sent")
        fault_point("pool.request")
        request.deadline = asyncio.timeout(self.limits.timeout_s)
        try:
            body = await self._transport.send(request.replica.url, request.call, request.deadline)
        finally:
            request.deadline = None
        value = await self._transport.read(request.call, body)
        fault_point("pool.answer")
        return value

    def _release(self, request: _Request) -> None:
        """Whatever became of an attempt, there is room for another one."""
        if request.replica is not None:
            request.replica.inflight.pop(request, None)
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives replicas that are free to the requests that wait."""
        while self._waiting:
            now = time.monotonic()
            free = [replica for replica in self.replicas if replica.may_take(now)]
            if not free:
                return
            request = self._waiting.popleft()
            if request.turn.done():  # cancelled, or given up
                continue
            if request.replica is not None and request.replica.in_rotation:
                self.stats.retries += 1
            elif request.replica is not None:
                self.stats.failovers += 1
            others = [replica for replica in free if replica is not request.replica] or free
            request.replica = min(others, key=lambda r: (len(r.inflight), r.sent))
            request.replica.take(request, now)
            request.turn.set_result(None)
            self.stats.most_inflight = max(
                self.stats.most_inflight, sum(len(r.inflight) for r in self.replicas)
            )

    def _answered(self, request: _Request) -> None:
        self._last_answer = time.monotonic()
        request.replica.answered()
        self.stats.requests += 1
        self.stats.tokens += request.call.tokens
        self.stats.latencies.append(self._last_answer - request.submitted)

    # ---- Failures ----

    def _failed(self, request: _Request, failure: Failure) -> float:
        """Seconds until it is tried again: more each time, and never twice the same, so that many
        do not come back together.
        """
        now, replica = time.monotonic(), request.replica
        if request not in replica.inflight:  # its replica has left the rotation
            return 0.0
        self.stats.failures[failure.kind] += 1
        request.failures += 1
        request.first_failure = request.first_failure or now
        replica.failed(str(failure), now)
        if failure.kind == "busy":
            replica.not_before = now + failure.retry_after
        elif failure.kind in ("refused", "connection"):  # dead, or one that broke: a probe will say
            if replica.in_rotation:
                replica.state = ReplicaState.SUSPECT
            self._alarm[replica.url].set()
        elif replica.struck(str(failure)):
            self._eject(replica, str(failure))
        pause = min(SHORTEST_PAUSE_S * 2 ** (request.failures - 1), LONGEST_PAUSE_S)
        return max(failure.retry_after, random.uniform(0.5, 1.0) * pause)

    def _eject(self, replica: Health, error: str) -> None:
        """Out of rotation; what is under way there goes elsewhere."""
        if not replica.in_rotation:
            return
        self.stats.ejections += 1
        for request in replica.leave(error, time.monotonic()):
            if request.deadline is not None and not request.deadline.expired():
                request.deadline.reschedule(self._loop.time())

    # ---- Health ----

    async def _watch(self, replica: Health) -> None:
        """Probes one replica for as long as the pool lives: at once after a broken connection, and
        after a failed probe.
        """
        alarm = self._alarm[replica.url]
        while True:
            if not replica.in_rotation or self.excused:
                await asyncio.sleep(self.limits.shortest_out_s)
            elif not replica.probe_strikes and replica.state is ReplicaState.SERVING:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(
                        alarm.wait(), self.limits.probe_every_s * random.uniform(0.9, 1.0)
                    )
            alarm.clear()
            await self._probe(replica)

    async def _probe(self, replica: Health) -> None:
        answers = replica.answers
        try:
            await self._transport.ask(replica.url, self.probe, self.limits.probe_timeout_s)
        except (Failure, Rejected) as error:
            await self._probe_failed(replica, error, made_progress=replica.answers > answers)
            return
        replica.probed()
        if replica.state is ReplicaState.OUT:
            replica.come_back(time.monotonic())
        elif replica.state is ReplicaState.SUSPECT:  # it lives, and breaks connections
            replica.state = ReplicaState.SERVING
            if replica.struck(replica.last_error):
                self._eject(replica, replica.last_error)
        self._dispatch()

    async def _probe_failed(
        self, replica: Health, error: Exception, *, made_progress: bool
    ) -> None:
        if not replica.in_rotation or self.excused:
            replica.last_error = str(error)
            return
        kind = error.kind if isinstance(error, Failure) else "rejected"
        if kind in ("refused", "answer"):
            self._eject(replica, str(error))  # dead, or another model: nothing that it says counts
            return
        may_be_full = kind in ("timeout", "busy")
        if may_be_full and (made_progress or await self._engine_moves(replica)):
            replica.probe_strikes = 0
        elif replica.probe_struck(str(error)):
            self._eject(replica, f"{self.limits.strikes} probes failed: {error}")
        elif kind != "timeout":
            # an error comes back at once; three of them take no time
            await asyncio.sleep(self.limits.shortest_out_s)

    async def _engine_moves(self, replica: Health) -> bool:
        """Whether the engine's own count of steps has grown since it was read last."""
        if self.progress is None:
            return False
        try:
            steps = await self._transport.ask(replica.url, self.progress, 1.0)
        except (Failure, Rejected):
            return False
        moves, replica.engine_steps = 0 <= replica.engine_steps < steps, steps
        return moves

    async def _keep_deadlines(self) -> None:
        """Ends the waiting requests whose time is over.

        Those under way have deadlines of their own.
        """
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TICK_S)
            is_down = not any(replica.in_rotation for replica in self.replicas)
            self._down_since = (self._down_since or time.monotonic()) if is_down else None
            self._give_up_the_hopeless(time.monotonic())
            self._dispatch()

    def _give_up_the_hopeless(self, now: float) -> None:
        if any(
            now - sent >= self.limits.wait_s
            for replica in self.replicas
            for sent in replica.inflight.values()
        ):
            return  # what has been under way for so long is slow, not failing, and ends by itself
        for request in self._waiting:
            if not request.turn.done() and self._hopeless_for(request) >= self.limits.wait_s:
                request.turn.set_exception(self._unanswered(request))

    def _hopeless_for(self, request: _Request) -> float:
        """Seconds since there was last a sign that this request may be answered: it has not failed
        yet, others are answered.
        """
        now = time.monotonic()
        down_for = now - self._down_since if self._down_since is not None else 0.0
        failing_for = (
            now - max(request.first_failure, self._last_answer or 0.0)
            if request.first_failure
            else 0.0
        )
        return max(min(down_for, now - request.submitted), failing_for)

    def _unanswered(self, request: _Request) -> Unanswered:
        errors = "; ".join(f"{r.url}: {r.last_error or 'no error'}" for r in self.replicas)
        waited = f"no answer for {self._hopeless_for(request):.0f} s"
        return Unanswered(f"{self.name}: {waited}; last errors: {errors}")
