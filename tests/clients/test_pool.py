"""The pool of replicas against small servers that do what a test says: real sockets, real processes
to stop and to kill.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest

from opd.clients import transport
from opd.clients.health import Limits
from opd.clients.pool import ReplicaPool, Unanswered
from opd.clients.transport import Call, Rejected
from opd.clients.wire import BadAnswer
from tests.support import fault_proxy
from tests.support.fault_proxy import Answer, Fault, HttpServer, Request, is_scoring

pytestmark = pytest.mark.alone

QUICK = Limits(
    wait_s=20.0,
    timeout_s=2.0,
    connect_s=1.0,
    max_inflight=8,
    probe_every_s=0.2,
    probe_timeout_s=0.3,
    shortest_out_s=0.1,
    longest_out_s=1.0,
)
DEADLINE_S = 60.0


def read_echo(body: bytes) -> str:
    if not body.startswith(b"echo "):
        raise BadAnswer(f"{body[:20]!r} is no echo")
    return body.decode()


PROBE = Call("/probe", b"echo probe", read=read_echo)


def work(number: int, **changes) -> Call:
    return Call("/work", b"echo %d" % number, request_id=f"r{number}", read=read_echo, **changes)


def echo(seconds: float = 0.0):
    async def answer(request: Request) -> Answer:
        if request.path == "/work":
            await asyncio.sleep(seconds)
        return Answer(body=request.body)

    return answer


def serial(seconds: float):
    """One request at a time, probes too: what waits behind the others takes as long as they do."""
    lock = asyncio.Lock()

    async def answer(request: Request) -> Answer:
        async with lock:
            await asyncio.sleep(seconds)
        return Answer(body=request.body)

    return answer


@contextlib.contextmanager
def servers(*answers):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(HttpServer(answer)) for answer in answers]


def pool_of(some, limits: Limits = QUICK, **options) -> ReplicaPool:
    urls = [server if isinstance(server, str) else server.url for server in some]
    return ReplicaPool("teacher T", urls, probe=PROBE, limits=limits, **options)


def limits(**changes) -> Limits:
    return Limits(**{name: getattr(QUICK, name) for name in QUICK.__slots__} | changes)


def until(condition, seconds: float = DEADLINE_S) -> float:
    """Waits for it; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come true"
        time.sleep(0.01)
    return time.monotonic() - start


def ask(pool: ReplicaPool, count: int, start: int = 0, **changes) -> list[str]:
    return pool.collect([pool.submit(work(n, **changes)) for n in range(start, start + count)])


def echoes(count: int, start: int = 0) -> list[str]:
    return [f"echo {n}" for n in range(start, start + count)]


# ---- Balance -------------------------------------------------------------------------------------


def test_answers_come_in_order_from_all_replicas_and_never_more_at_once_than_allowed():
    with servers(echo(0.2), echo(0.2)) as (a, b), pool_of([a, b]) as pool:
        assert ask(pool, 200) == echoes(200)
        stats = pool.take_stats()
    assert a.most_inflight == b.most_inflight == QUICK.max_inflight and stats.most_inflight == 16
    assert stats.requests == 200 == len(stats.latencies) and stats.retries == stats.ejections == 0
    assert (
        a.counts["/work"] + b.counts["/work"] == 200
        and abs(a.counts["/work"] - b.counts["/work"]) < 30
    )
    assert stats.bytes_received >= sum(map(len, echoes(200))) and not stats.failures


def test_the_one_with_fewer_outstanding_requests_gets_the_next():
    with servers(echo(0.15), echo(0.05)) as (slower, faster), pool_of([slower, faster]) as pool:
        under_way, left = set(), 120
        while left:  # four at a time, so that neither is ever full
            while len(under_way) < 4:
                under_way.add(pool.submit(work(left)))
            done, under_way = wait(under_way, timeout=DEADLINE_S, return_when="FIRST_COMPLETED")
            left -= len(done)
        assert faster.counts["/work"] > 2 * slower.counts["/work"]


def test_nothing_to_do_is_no_wait():
    with servers(echo()) as (server,), pool_of([server]) as pool:
        assert pool.collect([]) == []


def test_many_threads_and_two_pools_share_the_servers():
    with servers(echo(0.01), echo(0.01)) as some, pool_of(some) as one, pool_of(some) as other:
        answers = {}

        def go(place: int) -> None:
            answers[place] = ask((one, other)[place % 2], 40, start=100 * place)

        threads = [threading.Thread(target=go, args=(place,)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=DEADLINE_S)
        assert answers == {place: echoes(40, 100 * place) for place in range(8)}


def test_large_answers_are_read_beside_the_loop():
    """Reading them takes longer than a probe may: probes would time out, and a good
    replica leave.
    """

    async def answer(request: Request) -> Answer:
        return Answer(body=request.body if request.path == "/probe" else bytes(1 << 19))

    def read(body: bytes) -> int:
        time.sleep(1.0)
        return len(body)

    with servers(answer) as (server,), pool_of([server], limits(timeout_s=10.0)) as pool:
        calls = [Call("/work", b"x", request_id=f"r{n}", read=read) for n in range(4)]
        assert pool.collect([pool.submit(call) for call in calls]) == [1 << 19] * 4
        stats, probes = pool.take_stats(), server.counts["/probe"]
    assert not stats.ejections and probes > 10, "they were answered all the while"
    assert "answers" not in " ".join(thread.name for thread in threading.enumerate())


def test_everyone_may_be_asked_directly():
    with servers(echo(), echo()) as (a, b), pool_of([a, b]) as pool:
        b.fault = Fault("500")
        answers = pool.ask_each(work(1), timeout_s=5.0)
    assert answers[a.url] == "echo 1" and "HTTP 500" in str(answers[b.url])


# ---- Refused, busy, failing ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_raised_at_once_names_pool_and_url_and_is_never_repeated(status):
    async def answer(request: Request) -> Answer:
        return Answer(
            status if request.path == "/work" else 200,
            request.body if status < 422 else b"x" * 100_000,
        )

    with servers(answer) as (server,), pool_of([server]) as pool:
        with pytest.raises(Rejected, match=f"teacher T: {server.url}/work: HTTP {status}"):
            ask(pool, 1)
        assert server.counts["/work"] == 1


def test_the_key_is_sent_and_never_shown():
    key = "sk-a-very-secret-key"

    async def answer(request: Request) -> Answer:  # as some servers do
        status = int(request.body.split()[-1]) if request.path == "/work" else 200
        return Answer(
            status,
            f"wrong key: {request.headers['authorization']}".encode()
            if status > 200
            else request.body,
        )

    with servers(answer) as (server,), pool_of([server], limits(wait_s=0.5), api_key=key) as pool:
        assert ask(pool, 1, start=200) == ["echo 200"]
        for status, error in ((401, Rejected), (500, Unanswered)):
            with pytest.raises(error, match=f"HTTP {status}: wrong key: Bearer") as caught:
                ask(pool, 1, start=status)
            assert key not in str(caught.value)
        assert {request.headers["authorization"] for request in server.requests} == {
            f"Bearer {key}"
        }


def test_busy_waits_as_long_as_it_says_and_costs_no_strike():
    with servers(echo()) as (server,), pool_of([server], limits(max_inflight=1)) as pool:
        server.fault = Fault("429", only=is_scoring, first=1)
        start = time.monotonic()
        assert ask(pool, 2) == echoes(2)
        assert 1.0 <= time.monotonic() - start < 5.0
        came = [at for path, at in server.times if path == "/work"]
        assert came[1] - came[0] >= 1.0, "the other request waited too"
        stats = pool.take_stats()
    assert stats.failures == {"busy": 1} and stats.ejections == 0 and server.counts["/work"] == 3


@pytest.mark.parametrize(
    "retry_after", ["nan", "inf", "-5", "1e99", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_busy_for_an_odd_time_is_not_for_ever(retry_after, monkeypatch):
    monkeypatch.setattr(transport, "LONGEST_RETRY_AFTER_S", 1.5)

    async def answer(request: Request) -> Answer:
        first = request.path == "/work" and server.counts["/work"] == 1
        return Answer(429 if first else 200, request.body, {"Retry-After": retry_after})

    with servers(answer) as (server,), pool_of([server], limits(wait_s=30.0)) as pool:
        assert ask(pool, 1) == echoes(1)


@pytest.mark.parametrize("strikes", [3, 10**9], ids=["ejected", "one-by-one"])
def test_failures_cost_at_most_a_tenth_more_requests_and_nothing_is_lost(strikes):
    """Whatever waits is not thrown at servers that fail: a busy machine is none of them."""
    limit = limits(
        max_inflight=32,
        longest_out_s=0.3,
        strikes=strikes,
        timeout_s=60.0,
        connect_s=20.0,
        probe_timeout_s=5.0,
    )
    with servers(echo(0.002), echo(0.002)) as some, pool_of(some, limit) as pool:
        futures = [pool.submit(work(n)) for n in range(1000)]
        for server in some:
            server.fault = Fault("500", only=is_scoring)
        until(lambda: all(server.fault.struck >= 20 for server in some))
        time.sleep(2.0)  # the fault lasts
        for server in some:
            server.fault = None
        assert pool.collect(futures) == echoes(1000)
        stats, sent = pool.take_stats(), sum(server.counts["/work"] for server in some)
    print(f"amplification {sent / 1000:.3f}, {stats.retries} retries, {stats.failovers} failovers")
    assert sent <= 1200
    # what an ejected replica was still to answer is asked elsewhere, and its failure not counted
    if strikes == 3:
        assert stats.ejections >= 2
    else:
        assert stats.failures["status"] > 20


def test_one_that_fails_every_request_and_answers_every_probe_is_out_most_of_the_time():
    """Probes must not forgive: half of all requests would fail first."""
    for kind in ("500", "reset", "cut_json"):
        with (
            servers(echo(0.01), echo(0.01)) as (bad, good),
            pool_of([bad, good], limits(longest_out_s=30.0)) as pool,
        ):
            bad.fault = Fault(kind, only=is_scoring)
            assert ask(pool, 400) == echoes(400)
            stats = pool.take_stats()
            assert stats.ejections and bad.counts["/work"] < 80, kind
            assert bad.counts["/probe"] < 100, "a storm of probes"


# ---- Fail over -----------------------------------------------------------------------------------


def test_a_dead_replica_is_out_at_once_and_comes_back():
    with (
        servers(echo(0.3), echo(0.3)) as (a, b),
        pool_of([a, b], limits(shortest_out_s=0.5)) as pool,
    ):
        futures = [pool.submit(work(n)) for n in range(200)]
        until(lambda: a.counts["/work"] > 20 and a.inflight == 8)
        a.refuse()
        print(f"out after {until(lambda: not pool.replicas[0].in_rotation, 5.0):.2f} s")
        assert pool.collect(futures) == echoes(200)
        stats = pool.take_stats()
        # sent again before or after the probe has found it dead
        assert stats.retries + stats.failovers >= 8
        assert stats.ejections == 1 and "connect" in pool.replicas[0].last_error
        before = a.counts["/work"]
        a.open()
        until(lambda: pool.replicas[0].in_rotation)
        assert ask(pool, 100) == echoes(100) and a.counts["/work"] > before + 20


def test_broken_connections_of_a_live_replica_are_no_reason_to_leave():
    with servers(echo(0.1), echo(0.1)) as (a, b), pool_of([a, b]) as pool:
        futures = [pool.submit(work(n)) for n in range(60)]
        until(lambda: a.inflight == 8)
        a.break_connections()
        assert pool.collect(futures) == echoes(60)
        stats = pool.take_stats()
    assert stats.ejections == 0 and stats.failures["connection"] >= 8


def test_one_that_comes_back_with_another_model_is_not_let_in():
    other = []

    async def answer(request: Request) -> Answer:
        return Answer(body=b"another" if other and request.path == "/probe" else request.body)

    with servers(answer, echo()) as (a, b), pool_of([a, b]) as pool:
        a.refuse()
        until(lambda: not pool.replicas[0].in_rotation)
        other.append(True)
        a.open()
        probes = a.counts["/probe"]
        until(lambda: a.counts["/probe"] > probes + 5)
        assert not pool.replicas[0].in_rotation and "is no echo" in pool.replicas[0].last_error
        asked = a.counts["/work"]
        assert ask(pool, 50) == echoes(50) and a.counts["/work"] == asked
        other.clear()
        until(lambda: pool.replicas[0].in_rotation)


def test_one_that_changes_its_model_while_it_answers_is_out_at_its_next_probe():
    other = []

    async def answer(request: Request) -> Answer:
        await asyncio.sleep(0.01)
        return Answer(body=b"another" if other and request.path == "/probe" else request.body)

    with servers(answer, echo(0.01)) as (a, b), pool_of([a, b]) as pool:
        futures = [pool.submit(work(n)) for n in range(500)]
        until(lambda: a.counts["/work"] > 20)
        other.append(True)
        probes = a.counts["/probe"]
        until(lambda: not pool.replicas[0].in_rotation, 2.0)
        assert a.counts["/probe"] <= probes + 2, "no second chance"
        assert pool.collect(futures) == echoes(500)


def test_a_saturated_replica_is_never_ejected_while_answers_come():
    async def make():
        return serial(0.08)

    answer = asyncio.run(make())
    with (
        servers(answer) as (server,),
        pool_of([server], limits(max_inflight=40, timeout_s=30.0)) as pool,
    ):
        assert ask(pool, 80) == echoes(80)
        stats = pool.take_stats()
    assert stats.ejections == stats.retries == 0, stats


def test_a_full_server_that_answers_nothing_is_alive_as_long_as_its_engine_moves():
    steps = []

    async def answer(request: Request) -> Answer:
        if request.path == "/metrics":
            steps.append(1)
            return Answer(body=b"%d" % (len(steps) if moves else 7))
        await asyncio.sleep(3.0)
        return Answer(body=request.body)

    progress = Call("/metrics", read=float)
    slow = limits(timeout_s=30.0)
    for moves, ejected in ((True, False), (False, True)):
        with servers(answer) as (server,), pool_of([server], slow, progress=progress) as pool:
            future = pool.submit(work(1))
            until(future.done if moves else lambda: not pool.replicas[0].in_rotation)
            assert (pool.take_stats().ejections > 0) == ejected


# ---- Deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["500", "reset", "cut_json", "hang", "slow_loris", "redirect", "endless", "refuse"]
)
def test_what_never_works_is_given_up_in_time_with_names_and_cause(kind):
    with (
        servers(echo(), echo()) as (server, elsewhere),
        pool_of([server], limits(wait_s=1.5, timeout_s=0.5)) as pool,
    ):
        server.fault = Fault(kind, only=is_scoring, location=elsewhere.url + "/work")
        if kind == "refuse":
            server.refuse()
        start = time.monotonic()
        with pytest.raises(
            Unanswered, match=f"teacher T: no answer for . s; last errors: {server.url}: "
        ) as caught:
            ask(pool, 40)
        assert 1.4 <= time.monotonic() - start < 8.0
        assert "no error" not in str(caught.value) and not elsewhere.requests
        print(caught.value)


def test_all_dead_waits_and_goes_on_when_one_comes_back():
    with servers(echo(), echo()) as (a, b), pool_of([a, b]) as pool:
        a.refuse()
        b.refuse()
        futures = [pool.submit(work(n)) for n in range(50)]
        until(lambda: not any(replica.in_rotation for replica in pool.replicas))
        assert not any(future.done() for future in futures)
        b.open()
        assert pool.collect(futures) == echoes(50) and pool.take_stats().failures.keys() <= {
            "refused",
            "connection",
        }


def test_servers_that_are_slow_are_waited_for_even_by_one_that_failed_once():
    """Everything takes longer than `wait_s`, and one request failed at the start: its place is
    behind the others.
    """
    limit = limits(wait_s=0.5, timeout_s=10.0, max_inflight=1, probe_timeout_s=5.0)
    with servers(echo(1.5)) as (server,), pool_of([server], limit) as pool:
        server.fault = Fault("500", only=is_scoring, first=1)
        assert ask(pool, 3) == echoes(3)


def test_a_request_that_fails_while_others_are_answered_is_not_given_up():
    with (
        servers(echo(0.05)) as (server,),
        pool_of([server], limits(wait_s=0.5, max_inflight=2)) as pool,
    ):
        server.fault = Fault("500", only=lambda request: request.body == b"echo 0")
        start = time.monotonic()
        futures = [pool.submit(work(n)) for n in range(60)]
        assert pool.collect(futures[1:]) == echoes(59, 1)
        assert server.fault.struck <= 6 + time.monotonic() - start, "its pauses do not grow"
        server.fault = None
        assert pool.collect(futures[:1]) == echoes(1)


# ---- Wedged and stopped --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "slow_loris"])
def test_one_that_finishes_no_request_is_out_by_its_time_outs_and_everything_is_answered(kind):
    with (
        servers(echo(0.05), echo(0.05)) as (bad, good),
        pool_of([bad, good], limits(timeout_s=1.0)) as pool,
    ):
        ask(pool, 20)
        bad.fault = Fault(kind, only=is_scoring)  # its probes are answered
        futures = [pool.submit(work(n)) for n in range(300)]
        seconds = until(lambda: not pool.replicas[0].in_rotation, 15.0)
        start = time.monotonic()
        assert pool.collect(futures) == echoes(300)
        assert time.monotonic() - start < 30.0, "what it held went elsewhere at once"
        print(f"{kind}: out after {seconds:.1f} s: {pool.replicas[0].last_error}")
        until(lambda: bad.inflight == 0)  # what it was doing is cancelled there


@contextlib.contextmanager
def process(seconds: float):
    command = [sys.executable, str(Path(fault_proxy.__file__)), str(seconds)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait(timeout=30)
        child.stdin.close()
        child.stdout.close()


@pytest.mark.parametrize("sig", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_process_is_out_within_15_s_by_the_limits_of_a_run(sig):
    with (
        process(0.1) as (child, url),
        process(0.1) as (_, other),
        pool_of([url, other], Limits()) as pool,
    ):
        futures = [pool.submit(work(n)) for n in range(40)]
        until(lambda: pool.replicas[0].answers > 3)
        os.kill(child.pid, sig)
        futures += [pool.submit(work(n)) for n in range(40, 120)]
        start = time.monotonic()
        until(lambda: not pool.replicas[0].in_rotation, 15.0)
        print(
            f"{sig.name}: out after {time.monotonic() - start:.1f} s: {pool.replicas[0].last_error}"
        )
        assert pool.collect(futures) == echoes(120)
        if sig == signal.SIGSTOP:
            os.kill(child.pid, signal.SIGCONT)
            until(lambda: pool.replicas[0].in_rotation, 15.0)


def test_an_idle_pool_finds_a_stopped_process_within_15_s_by_its_probes():
    with process(0.0) as (child, url), pool_of([url], Limits()) as pool:
        assert ask(pool, 1) == echoes(1)
        os.kill(child.pid, signal.SIGSTOP)
        print(f"out after {until(lambda: not pool.replicas[0].in_rotation, 15.0):.1f} s")


# ---- Cancelled, closed ---------------------------------------------------------------------------


def test_what_is_cancelled_is_cancelled_at_the_server_and_the_pool_goes_on():
    with servers(echo(30.0)) as (server,), pool_of([server], limits(timeout_s=60.0)) as pool:
        for _ in range(5):
            futures = [pool.submit(work(n)) for n in range(20)]
            until(lambda: server.inflight == 8)
            pool.cancel(futures)
            until(lambda: server.inflight == 0)
        until(lambda: not pool._waiting and not pool.replicas[0].inflight)
        assert server.left == 40
        server.answer = echo()
        assert ask(pool, 20) == echoes(20)


def test_collect_raises_the_first_failure_and_cancels_the_rest():
    async def answer(request: Request) -> Answer:
        if request.body == b"echo 3":
            return Answer(400, b"no")
        await asyncio.sleep(0 if request.path == "/probe" else 30.0)
        return Answer(body=request.body)

    with servers(answer) as (server,), pool_of([server]) as pool:
        futures = [pool.submit(work(n)) for n in range(20)]
        with pytest.raises(Rejected):
            pool.collect(futures)
        assert all(future.done() for future in futures)
        until(lambda: server.inflight == 0)


def test_collect_ends_when_another_thread_cancels_or_closes():
    with servers(echo(30.0)) as (server,):
        for end in ("cancel", "close"):
            pool = pool_of([server], limits(timeout_s=60.0))
            futures = [pool.submit(work(n)) for n in range(20)]
            until(lambda: server.inflight == 8)
            timer = threading.Timer(
                0.2, pool.close if end == "close" else lambda p=pool, f=futures: p.cancel(f)
            )
            timer.start()
            start = time.monotonic()
            with pytest.raises(CancelledError):
                pool.collect(futures)
            assert time.monotonic() - start < 5.0
            timer.join(timeout=30)
            pool.close()
            until(lambda: server.inflight == 0)


def test_close_ends_whatever_is_under_way_and_whatever_waits():
    with servers(echo(30.0)) as (server,), pool_of([server], limits(timeout_s=60.0)) as pool:
        futures = [pool.submit(work(n)) for n in range(20)]
        until(lambda: server.inflight == 8)
        server.fault = Fault("429")
        server.break_connections()  # some of them are now in the pause before a retry
        until(lambda: server.fault.struck)
        pool.close()
        assert all(future.cancelled() for future in futures)
        with pytest.raises(RuntimeError):
            pool.submit(work(1))
        pool.close()


def test_a_fault_of_this_program_is_raised_and_not_waited_for():
    def broken(body: bytes):
        raise ZeroDivisionError("ours")

    with servers(echo()) as (server,), pool_of([server]) as pool:
        with pytest.raises(ZeroDivisionError, match="ours"):
            pool.collect([pool.submit(Call("/work", b"x", read=broken))])
        assert ask(pool, 1) == echoes(1)
    probe = Call("/probe", b"x", read=broken)
    with (
        servers(echo(30.0)) as (server,),
        ReplicaPool("P", [server.url], probe=probe, limits=QUICK) as pool,
        pytest.raises(ZeroDivisionError, match="ours"),
    ):
        ask(pool, 1)


def sockets() -> Counter:
    found = Counter()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{entry}").split(":")[0]] += 1
    return found


def connections_to(port: int) -> int:
    """Of this process's machine, open from the client's side (`rem_address`), in whatever state but
    TIME_WAIT.
    """
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] != "06" for row in rows)


def test_no_thread_socket_or_task_is_left_after_an_exception():
    with servers(echo(30.0), echo(0.0)) as some:
        threads, fds = threading.active_count(), sockets()
        for _ in range(3):
            with pytest.raises(KeyError), pool_of(some, limits(timeout_s=60.0)) as pool:
                futures = [pool.submit(work(n)) for n in range(30)]
                until(lambda: some[0].inflight == 8)
                pool.collect(futures[1:2])
                raise KeyError("of the trainer")
            assert all(future.done() for future in futures)
        until(lambda: all(server.inflight == 0 and not server._connections for server in some))
        until(lambda: not any(connections_to(server.port) for server in some))
        assert threading.active_count() == threads and pool._loop.is_closed()
        until(lambda: sockets() == fds)


def loses_requests_from(number: int):
    """Answers probes at once, and requests below `number`; the others it swallows."""

    async def answer(request: Request) -> Answer:
        if request.path == "/work" and int(request.body.split()[1]) >= number:
            await asyncio.sleep(3600)
        return Answer(body=request.body)

    return answer


def test_the_only_replica_loses_requests_while_its_probes_are_answered():
    """Its attempts end at `timeout_s`, and the second one that fails is the last."""
    with (
        servers(loses_requests_from(20)) as (one,),
        pool_of([one], limits(wait_s=1.0, timeout_s=2.0)) as pool,
    ):
        assert ask(pool, 20) == echoes(20)
        start = time.monotonic()
        with pytest.raises(
            Unanswered, match=f"teacher T: no answer for .*{one.url}: no answer within"
        ):
            ask(pool, 3, start=20)
        seconds = time.monotonic() - start
    print(f"given up after {seconds:.1f} s")
    assert 4 <= seconds < 10
