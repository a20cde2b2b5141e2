"""`ReplicaPool`: several servers of one model, asked as one.

Nothing here knows what a request means.

* A request goes to the replica with the fewest outstanding ones, up to a bound on each.
* Connection errors, 5xx, time-outs and answers that `Call.read` does not believe are tried again,
  elsewhere if there is an
  elsewhere. 429 waits as it says. Any other 4xx is the request's own fault, and is raised as
  `Rejected` at once.
* What a dead replica took with it is sent again at once. What a live one failed is sent again
  within a `RetryBudget`.
* Every replica is probed with a real, small request. See `opd/clients/health.py` for who is in
  rotation.
* No request is given up while there is hope. After `wait_s` without an answer it raises
  `Unanswered`, naming URLs and errors.

One background thread runs one event loop with one connection pool; it belongs to the pool and ends
with it.
"""

import asyncio
import contextlib
import functools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import Any

from opd.clients.health import Health, Limits, Patience, RetryBudget, Stats, slow_ones
from opd.clients.transport import Call, Failure, Rejected, Transport, Unanswered
from opd.clients.wire import BadAnswer
from opd.faults import fault_point

CLOSE_S = 10.0  # to end the background thread


@dataclass(slots=True, eq=False)
class _Pending:
    """A request on its way to an answer."""

    call: Call
    future: Future
    submitted: float
    sent: float = 0.0  # its last attempt
    first_failure: float | None = None
    timeouts: int = 0
    failed_at: Health | None = None  # where it is not tried next, if there is a choice
    is_retry: bool = False  # its next attempt has to be paid for
    beyond_budget: bool = False
    task: asyncio.Task | None = None


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
        self.name, self.limits, self.probe, self.progress = (
            name,
            limits or Limits(),
            probe,
            progress,
        )
        self.replicas = [Health(url.rstrip("/"), self.limits) for url in urls]
        self.stats = Stats()
        # while True, probes that fail are no strikes: the servers are known to be busy otherwise
        self.excused = False
        self._budget, self._patience = RetryBudget(self.limits), Patience(self.limits)
        self._open: set[_Pending] = set()  # whatever has no answer yet, wherever it is
        self._waiting: deque[_Pending] = deque()
        self._held: deque[_Pending] = deque()  # retries beyond the budget
        # until a probe has spoken
        self._on_trial: dict[str, list[_Pending]] = {r.url: [] for r in self.replicas}
        self._last_answer = self._down_since = None
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
        future: Future = Future()
        pending = _Pending(call, future, time.monotonic())
        self._loop.call_soon_threadsafe(self._enqueue, pending)
        return future

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
                    raise RuntimeError(f"{self.name}: its thread has ended")
        except BaseException:
            self.cancel(futures)
            raise
        return [future.result(timeout=0) for future in futures]

    def cancel(self, futures: Sequence[Future]) -> None:
        """Gives requests up; what a server is computing for them is aborted there."""
        for future in futures:
            future.cancel()
        self._tell(self._drop_cancelled)

    def ask_each(self, call: Call, timeout_s: float = 60.0) -> dict[str, Any]:
        """URL -> that replica's own answer to `call`, or the exception; one attempt, whoever is in
        rotation.
        """

        async def ask(replica: Health):
            try:
                return await self._transport.ask(replica.url, call, timeout_s)
            except (Failure, Rejected, BadAnswer) as error:
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
        stats.bytes_sent, stats.bytes_received = self._transport.take_bytes()
        return stats

    def close(self) -> None:
        """Ends everything; what is under way is cancelled. More than one call is fine."""
        if self._thread.is_alive():
            self._tell(self._stop.set)
            self._thread.join(timeout=CLOSE_S)
            assert not self._thread.is_alive(), f"pool {self.name}: its thread does not end"

    def _tell(self, what: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(what)

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
        self._stop.set()
        # a fault of this program
        error = next(filter(None, (task.exception() for task in ended)), None)
        for pending in list(self._open):
            if error is not None:
                self._resolve(pending, error=error)
            pending.future.cancel()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CLOSE_S / 2)
        await self._transport.close()

    def _enqueue(self, pending: _Pending) -> None:
        if self._stop.is_set():
            pending.future.cancel()
            return
        self._open.add(pending)
        self._budget.earn()
        self._waiting.append(pending)
        self._dispatch()

    def _dispatch(self) -> None:
        """Starts whatever can start now."""
        while self._waiting and not self._stop.is_set():
            now = time.monotonic()
            free = [replica for replica in self.replicas if replica.may_take(now)]
            if not free:
                return
            pending = self._waiting.popleft()
            if pending.future.cancelled():
                self._open.discard(pending)
                continue
            if pending.is_retry:
                pending.beyond_budget = self._budget.spend()
                if pending.beyond_budget is None:
                    self._held.append(pending)
                    continue
                self.stats.retries += 1
            others = [replica for replica in free if replica is not pending.failed_at] or free
            replica = min(others, key=lambda r: (len(r.inflight), r.sent))
            replica.sent += 1
            pending.sent, replica.inflight[pending] = now, (now, pending.call.tokens)
            pending.task = asyncio.create_task(self._attempt(replica, pending))
            pending.task.add_done_callback(functools.partial(self._ended, replica, pending))
            self.stats.most_inflight = max(
                self.stats.most_inflight, sum(len(r.inflight) for r in self.replicas)
            )

    async def _attempt(self, replica: Health, pending: _Pending) -> Any:
        fault_point("pool.request")
        value = await self._transport.ask(
            replica.url, pending.call, self._patience.of(pending.timeouts)
        )
        fault_point("pool.answer")
        return value

    def _ended(self, replica: Health, pending: _Pending, task: asyncio.Task) -> None:
        """An attempt is over.

        A callback: it also hears of one that was cancelled before it began.
        """
        del replica.inflight[pending]
        if pending.beyond_budget:
            self._budget.one_under_way = pending.beyond_budget = False
        if self._held and not self._budget.one_under_way:
            self._waiting.append(self._held.popleft())
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            if pending.future.cancelled():
                self._open.discard(pending)
            elif not self._stop.is_set():  # its replica left the rotation
                self._again(replica, pending)
        elif error is None:
            self._answered(replica, pending, task.result())
        elif isinstance(error, Failure | BadAnswer):
            self._failed(
                replica,
                pending,
                error if isinstance(error, Failure) else Failure("answer", str(error)),
            )
        else:  # Rejected, or a fault of this program
            self._resolve(
                pending,
                error=Rejected(f"{self.name}: {error}") if isinstance(error, Rejected) else error,
            )
        self._dispatch()

    def _answered(self, replica: Health, pending: _Pending, value: Any) -> None:
        now = self._last_answer = time.monotonic()
        replica.answered(now - pending.sent, pending.call.tokens)
        self._patience.answered(now - pending.sent)
        self.stats.requests += 1
        self.stats.tokens += pending.call.tokens
        self.stats.latencies.append(now - pending.submitted)
        self.stats.by_replica[replica.url] += 1
        self._resolve(pending, value)

    def _resolve(
        self, pending: _Pending, value: Any = None, error: BaseException | None = None
    ) -> None:
        self._open.discard(pending)
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            if error is not None:
                pending.future.set_exception(error)
            else:
                pending.future.set_result(value)

    # ---- Failures ----

    def _failed(self, replica: Health, pending: _Pending, failure: Failure) -> None:
        now = time.monotonic()
        self.stats.failures[failure.kind] += 1
        replica.last_error = str(failure)
        if failure.kind == "busy":
            replica.not_before = now + failure.retry_after
        elif failure.kind in (
            "refused",
            "connection",
        ):  # dead, or one broken connection: a probe will say
            replica.suspect = replica.in_rotation
            self._alarm[replica.url].set()
        elif replica.struck(str(failure)):
            self._eject(replica, str(failure))
        pending.first_failure = pending.first_failure or now
        pending.timeouts += failure.kind == "timeout"
        if replica.suspect:
            self._on_trial[replica.url].append(pending)
        else:
            self._again(replica, pending, pause=failure.retry_after)

    def _again(self, replica: Health, pending: _Pending, pause: float = 0.0) -> None:
        """Back to the head of the queue: at once if its replica left the rotation, else as a retry,
        after a pause.

        The pause grows with the strikes and is never twice the same, so that many do not come back
        together.
        """
        pending.failed_at, pending.is_retry = replica, replica.in_rotation
        if self._hopeless_for(pending) >= self.limits.wait_s:
            self._give_up(pending)
        elif pending.is_retry:
            pause = max(pause, random.uniform(0.05, 0.1) * min(2**replica.strikes, 20))
            self._loop.call_later(pause, self._requeue, pending)
        else:
            self.stats.failovers += 1
            self._waiting.appendleft(pending)

    def _requeue(self, pending: _Pending) -> None:
        self._waiting.appendleft(pending)
        self._dispatch()

    def _eject(self, replica: Health, error: str) -> None:
        """Out of rotation; what is under way there is cancelled and goes elsewhere."""
        replica.leave(error, time.monotonic())
        self.stats.ejections += 1
        for pending in replica.inflight:
            pending.task.cancel()
        self._end_trial(replica)

    def _end_trial(self, replica: Health) -> None:
        """A probe has said whether the replica lives."""
        trial, self._on_trial[replica.url] = self._on_trial[replica.url], []
        for pending in trial:
            self._again(replica, pending)
        self._dispatch()

    def _drop_cancelled(self) -> None:
        """Aborts what is under way; what waits is passed over when its turn comes."""
        self._open = {pending for pending in self._open if not pending.future.cancelled()}
        for replica in self.replicas:
            for pending in [p for p in replica.inflight if p.future.cancelled()]:
                pending.task.cancel()

    # ---- Health ----

    async def _watch(self, replica: Health) -> None:
        """Probes one replica for as long as the pool lives: at once after a broken connection, and
        after a failed probe.
        """
        alarm = self._alarm[replica.url]
        while True:
            if not replica.in_rotation or self.excused:
                await asyncio.sleep(self.limits.shortest_out_s)
            elif not replica.probe_strikes and not replica.suspect:
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
        except (Failure, BadAnswer, Rejected) as error:
            await self._probe_failed(replica, error, made_progress=replica.answers > answers)
            return
        replica.probed()
        if not replica.in_rotation:
            if replica.come_back(time.monotonic()):
                self._dispatch()
        elif replica.suspect:  # it lives, and breaks connections
            replica.suspect = False
            if replica.struck(replica.last_error):
                self._eject(replica, replica.last_error)
            else:
                self._end_trial(replica)

    async def _probe_failed(
        self, replica: Health, error: Exception, *, made_progress: bool
    ) -> None:
        if not replica.in_rotation or self.excused:
            replica.last_error = str(error)
            return
        if isinstance(error, BadAnswer) or (isinstance(error, Failure) and error.kind == "refused"):
            self._eject(replica, str(error))  # dead, or another model: nothing that it says counts
            return
        may_be_full = isinstance(error, Failure) and error.kind in ("timeout", "busy")
        if may_be_full and (made_progress or await self._engine_moves(replica)):
            replica.probe_strikes = 0
        elif replica.probe_struck(str(error)):
            self._eject(replica, f"{self.limits.strikes} probes failed: {error}")
        elif not may_be_full or error.kind == "busy":
            # an error comes back at once; three of them take no time
            await asyncio.sleep(self.limits.shortest_out_s)

    async def _engine_moves(self, replica: Health) -> bool:
        """Whether the engine's own count of steps has grown since it was read last."""
        if self.progress is None:
            return False
        try:
            steps = await self._transport.ask(replica.url, self.progress, 1.0)
        except (Failure, BadAnswer, Rejected):
            return False
        moves, replica.engine_steps = 0 <= replica.engine_steps < steps, steps
        return moves

    async def _keep_deadlines(self) -> None:
        """Ends the waiting requests whose time is over.

        Those under way have deadlines of their own.
        """
        looked = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.2)
            if time.monotonic() - looked >= self.limits.slow_window_s:
                looked = time.monotonic()
                for replica in slow_ones(self.replicas, looked):
                    self._eject(
                        replica,
                        f"{replica.latency(looked)[0]:.1f} s a request, far slower than its "
                        f"neighbours",
                    )
            is_down = not any(replica.in_rotation for replica in self.replicas)
            self._down_since = (self._down_since or time.monotonic()) if is_down else None
            self._give_up_the_hopeless(time.monotonic())
            self._dispatch()

    def _give_up_the_hopeless(self, now: float) -> None:
        if any(
            now - sent >= self.limits.wait_s
            for replica in self.replicas
            for sent, _ in replica.inflight.values()
        ):
            return  # what has been under way for so long is slow, not failing, and ends by itself
        for queue in (self._waiting, self._held):
            for pending in [p for p in queue if self._hopeless_for(p) >= self.limits.wait_s]:
                queue.remove(pending)
                self._give_up(pending)

    def _hopeless_for(self, pending: _Pending) -> float:
        """Seconds since there was last a sign that this request may be answered: it has not failed
        yet, others are answered.
        """
        now = time.monotonic()
        down_for = now - self._down_since if self._down_since is not None else 0.0
        failing_for = (
            now - max(pending.first_failure, self._last_answer or 0.0)
            if pending.first_failure
            else 0.0
        )
        return max(min(down_for, now - pending.submitted), failing_for)

    def _give_up(self, pending: _Pending) -> None:
        errors = "; ".join(f"{r.url}: {r.last_error or 'no error'}" for r in self.replicas)
        waited = f"no answer for {self._hopeless_for(pending):.0f} s"
        self._resolve(pending, error=Unanswered(f"{self.name}: {waited}; last errors: {errors}"))
