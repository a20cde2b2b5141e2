"""Published weights on their way into servers: half of them at a time, so that the others go on
serving.

A push to one replica is a transaction: pause, update, resume. Whatever fails, resume is tried: a
server whose weights are whole goes on with them, and one whose weights are half loaded says that it
is stale. If this process dies in between, the lease that it leaves does the same.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import httpx

from opd.faults import fault_point
from opd.log import warn

CONNECT_SECONDS = 5.0
ALIVE_SECONDS = (
    15.0  # to answer at all: a server that hangs must not keep the others from their weights
)
PAUSE_SECONDS = 60.0  # nor one that does not pause
RESUME_SECONDS = 30.0  # beyond the deadline: a server is not left paused
RENEWALS = 3.0  # of a lease while it lasts
FAILURES = (httpx.HTTPError, ValueError)  # of a server, or of what it says


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What the servers are asked for."""

    version: int  # one that `store.publish` has written
    fence: int
    token: str
    # of what is being sampled: it goes on under the new weights, or ends unfinished
    mode: Literal["keep", "abort"] = "keep"
    lease_s: float = 30.0  # a server that hears nothing for so long goes on with what it has
    deadline_s: float = 600.0  # of one server


@dataclass(frozen=True, slots=True)
class ReplicaPush:
    """What a push did to one server."""

    url: str
    ok: bool
    seconds: float
    pause_s: float  # from the answer to /pause to the one to /resume: it computed nothing
    error: str = ""  # one line


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did, replica by replica."""

    replicas: tuple[ReplicaPush, ...]

    @property
    def failed(self) -> tuple[ReplicaPush, ...]:
        """Those that do not serve the version."""
        return tuple(replica for replica in self.replicas if not replica.ok)


class PushFailed(RuntimeError):
    """No server took the weights."""


def push_to_servers(
    urls: Sequence[str], push: Push, *, say: Callable[[str], None] = warn
) -> PushReport:
    """Makes the servers load a version from their own directory: half of them, while the others
    serve, and these.

    A server that fails is reported, and said; PushFailed if all did.
    """
    half = (len(urls) + 1) // 2
    replicas: tuple[ReplicaPush, ...] = ()
    for wave in filter(None, (urls[:half], urls[half:])):
        with ThreadPoolExecutor(len(wave)) as threads:
            replicas += tuple(threads.map(partial(_push_one, push=push), wave))
    report = PushReport(replicas)
    for replica in report.failed:
        say(f"{replica.url} did not take the weights of version {push.version}: {replica.error}")
    if len(report.failed) == len(replicas):
        errors = "; ".join(f"{replica.url}: {replica.error}" for replica in report.failed)
        raise PushFailed(f"no server took the weights of version {push.version}: {errors}")
    return report


def _push_one(url: str, push: Push) -> ReplicaPush:
    start, url = time.monotonic(), url.rstrip("/")
    headers, failure, answer, paused = {"Authorization": f"Bearer {push.token}"}, None, {}, None
    with httpx.Client(
        base_url=url, headers=headers, trust_env=False, timeout=CONNECT_SECONDS
    ) as client:
        ask = partial(_ask, client, push.fence)
        try:
            # who hangs is found out before a pause is waited for
            client.get("/version", timeout=ALIVE_SECONDS)
            pause_s = min(push.deadline_s, PAUSE_SECONDS)
            ask("/pause", pause_s, lease_s=push.lease_s, mode=push.mode)
            paused = time.monotonic()
            fault_point("push.paused")
            with _renewed(ask, push.lease_s):
                left = start + push.deadline_s - time.monotonic()
                ask("/update_weights", left, version=push.version)
        except FAILURES as error:
            failure = error
        finally:
            try:
                answer = ask("/resume", RESUME_SECONDS if paused else CONNECT_SECONDS)
            except FAILURES as error:
                failure = failure or error
    if failure is None and (answer.get("version"), answer.get("state")) != (push.version, "ready"):
        failure = ValueError(f"/resume: it says {answer}")
    error = " ".join(f"{type(failure).__name__}: {failure}".split()) if failure else ""
    now = time.monotonic()
    return ReplicaPush(url, not error, now - start, now - paused if paused else 0.0, error)


def _ask(client: httpx.Client, fence: int, path: str, seconds: float, **body) -> dict:
    """The answer to a control request; one of FAILURES for everything but status 200."""
    limits = httpx.Timeout(max(0.1, seconds), connect=CONNECT_SECONDS)
    answer = client.post(path, json={"fence": fence, **body}, timeout=limits)
    if answer.status_code != 200:
        raise ValueError(f"{path}: {answer.status_code}: {_error_of(answer)}")
    return answer.json()


def _error_of(answer: httpx.Response) -> str:
    with suppress(ValueError, AttributeError):
        return str(answer.json().get("error"))[:500]
    return answer.text[:200]


@contextmanager
def _renewed(ask: Callable[..., dict], lease_s: float):
    """Renews the lease inside: to read large weights takes longer than a server should wait for a
    dead trainer.
    """
    over = threading.Event()

    def renew() -> None:
        while not over.wait(lease_s / RENEWALS):
            with suppress(*FAILURES):  # the next one comes in time, or the lease runs out
                ask("/lease", min(CONNECT_SECONDS, lease_s), lease_s=lease_s)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * CONNECT_SECONDS)
