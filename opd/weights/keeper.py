"""The weights of a run's servers, kept at the version that was pushed last.

A push reaches every server that is there. One that was restarted or missed it is stale, serves
nothing, and need not wait for the next push, which may be waiting for its answers: what was
published lies on disk, and is pushed again to that server alone.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
from torch import Tensor

from opd.log import warn
from opd.weights import store
from opd.weights.push import Push, PushFailed, PushReport, push_to_servers

LOOK_SECONDS = 2.0  # between two looks at the servers
VERSION_SECONDS = 2.0  # for a server to say which version it has
LEASE_SECONDS = 60.0  # a server whose trainer died in a push goes on after so long
PUSH_SECONDS = 600.0  # of one server
AGAIN_SECONDS = 1.0  # between pushes to a role none of whose servers is there


class WeightKeeper:
    """Publishes to `root` and pushes to the servers of every role, role -> URLs.

    Of rank 0 alone.
    """

    def __init__(
        self,
        roles: Mapping[str, Sequence[str]],
        root: Path,
        fence: int,
        token: str,
        *,
        mode: Literal["keep", "abort"],
        wait_s: float,
    ):
        self.roles, self.root = roles, root
        self.wait_s = wait_s  # for the first server of a role, if all are being restarted
        # the last one; no version was pushed yet
        self._last = Push(
            version=-1,
            fence=fence,
            token=token,
            mode=mode,
            lease_s=LEASE_SECONDS,
            deadline_s=PUSH_SECONDS,
        )
        self._missing: set[str] = set()  # who has not got the version of the last push
        self._said: deque[str] = deque(maxlen=64)
        self._turn = threading.Lock()  # one push at a time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="weight keeper", daemon=True)
        self._thread.start()

    def push(
        self, named_parameters: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, float]:
        """Bytes, seconds, and the longest pause of a server.

        Raises PushFailed if no server of a role takes the weights.
        """
        with self._turn:
            push = replace(self._last, version=version)
            published = store.publish(self.root, named_parameters, version, push.fence)
            started, pauses = time.perf_counter(), []
            for role, urls in self.roles.items():
                report = self._push_to_one_at_least(role, [url.rstrip("/") for url in urls], push)
                self._missing.difference_update(replica.url for replica in report.replicas)
                self._missing.update(replica.url for replica in report.failed)
                pauses += [replica.pause_s for replica in report.replicas if replica.ok]
            self._last = push
        return {
            "bytes": published.bytes,
            "publish_s": published.seconds,
            "s": time.perf_counter() - started,
            "pause_s": max(pauses),
        }

    def _expected(self, urls: Sequence[str]) -> Sequence[str]:
        """Without those that missed the last push, if there are others: `_look_after` brings them
        up to date.
        """
        return [url for url in urls if url not in self._missing] or urls

    def close(self) -> None:
        """Ends the thread; a push to a server under way is finished before."""
        self._over.set()
        self._thread.join(timeout=PUSH_SECONDS)

    def _push_to_one_at_least(self, role: str, urls: Sequence[str], push: Push) -> PushReport:
        deadline, asked = time.monotonic() + self.wait_s, self._expected(urls)
        while True:
            try:
                return push_to_servers(asked, push, say=self._warn_once)
            except PushFailed as error:
                if time.monotonic() > deadline or self._over.wait(AGAIN_SECONDS):
                    raise PushFailed(f"{role}: {error}") from None
                asked = urls

    def _warn_once(self, message: str) -> None:
        """A server that stays away is said once for each version."""
        if message not in self._said:
            self._said.append(message)
            warn(message)

    def _look_after(self) -> None:
        headers = {"Authorization": f"Bearer {self._last.token}"}
        with httpx.Client(headers=headers, trust_env=False, timeout=VERSION_SECONDS) as client:
            while not self._over.wait(LOOK_SECONDS):
                for url in [url for urls in self.roles.values() for url in urls]:
                    if self._is_behind(client, url):
                        self._bring_up(client, url)

    def _bring_up(self, client: httpx.Client, url: str) -> None:
        """Pushes the last version to one server; while the trainer pushes, the next
        look will do.
        """
        if not self._turn.acquire(timeout=VERSION_SECONDS):
            return
        try:
            # it may have got it while we waited
            if not self._over.is_set() and self._is_behind(client, url):
                with suppress(PushFailed):  # `push` has warned; the next look tries again
                    push_to_servers([url], self._last, say=self._warn_once)
                    self._missing.discard(url.rstrip("/"))
        finally:
            self._turn.release()

    def _is_behind(self, client: httpx.Client, url: str) -> bool:
        """Whether a server is there, serves nothing or something older, and nobody else's trainer
        has taken it over.
        """
        if self._last.version < 0:
            return False
        try:
            facts = client.get(f"{url.rstrip('/')}/version").json()
            return (
                facts["state"] != "paused"
                and facts["fence"] <= self._last.fence
                and facts["weights"] != self._last.version
            )
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False
