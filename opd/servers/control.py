"""How a trainer changes the weights of a server: pause, update, resume; with a lease and a fence.

`WeightsGate` is the state machine, without I/O and with an injected clock. `Control` puts routes
around it and is what a server asks before it answers: `version = await control.ready()`.
docs/serving.md has the routes in detail:

| route | body | answer |
|---|---|---|
| `POST /pause` | `{"fence", "lease_s", "mode"}` | `{"version", "state": "paused"}` |
| `POST /lease` | `{"fence", "lease_s"}` | the same; the lease runs from now |
| `POST /update_weights` | `{"fence", "version"}` | the same, with weights that `store.verify` has checked, and caches reset |
| `POST /resume` | `{"fence"}` | `{"version", "state": "ready"}` |
| `GET /version` | | protocol, weights, state, fence |

No path is ever named, so no request can make a server read a file of the caller's choice. Who may
post knows OPD_SERVER_TOKEN; without one the routes that change something answer 403. A smaller
fence than the largest seen is a trainer that has a successor: 409. A trainer that dies leaves its
lease, after which a server goes on with the weights that it has; if those are half loaded it is
stale, and answers 503 until a push is complete.
"""  # noqa: E501

import argparse
import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import FastAPI, HTTPException, Request

from opd.log import one_line
from opd.servers.http_service import read_json
from opd.weights.store import verify

State = Literal["stale", "ready", "paused"]
# of what is being computed: it goes on under the new weights, or ends unfinished
PauseMode = Literal["keep", "abort"]

LONGEST_LEASE = 3600.0  # a server that hears nothing for so long goes on
TURN_SECONDS = 600.0  # for the control request before to end
ACT_SECONDS = 600.0  # for a server to pause, to read its weights, to go on
GATE_SECONDS = 600.0  # for a question to wait at a paused server
LEASE_POLL_SECONDS = 1.0  # a lease may be cut short by a resume
MOST_BYTES = 4096  # of a control request


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """Of a server whose weights a trainer pushes."""
    parser.add_argument(
        "--weights_dir", required=True, type=Path, help="where the trainer publishes its weights"
    )
    parser.add_argument(
        "--serve_initial",
        action="store_true",
        help="the model's own weights are version 0: no push is needed",
    )


class Refused(HTTPException):
    """409: a transition that the state does not have, or a trainer that has a successor."""

    def __init__(self, why: str):
        super().__init__(409, why)


class WeightsGate:
    """Whether the weights are whole, and who may change them until when.

    Pure; `clock` is monotonic, in seconds.

    * ready: whole weights of `version`, which answer.
    * paused: a trainer holds the server until its lease runs out; the weights may be between two
      versions.
    * stale: no whole weights, and nobody holds it. It serves nothing.
    """

    def __init__(self, version: int | None = None, clock: Callable[[], float] = time.monotonic):
        self.version = version  # None: no whole weights
        self.fence = 0  # the largest seen
        self._clock = clock
        self._lease_end = -math.inf

    @property
    def state(self) -> State:
        if self.lease_left > 0:
            return "paused"
        return "stale" if self.version is None else "ready"

    @property
    def lease_left(self) -> float:
        """Seconds; 0 if nobody holds the server."""
        return max(0.0, self._lease_end - self._clock())

    def pause(self, fence: int, lease_s: float) -> None:
        """From any state: a trainer that lost an answer may ask again, and a successor
        takes over.
        """
        self._check_fence(fence)
        self._lease_end = self._clock() + min(lease_s, LONGEST_LEASE)

    def renew(self, fence: int, lease_s: float) -> None:
        """Refused once the lease has run out: the server has gone on since."""
        self.check_held(fence)
        self._lease_end = self._clock() + min(lease_s, LONGEST_LEASE)

    def check_held(self, fence: int) -> None:
        """Refuses whoever may not change the weights now."""
        self._check_fence(fence)
        if self.state != "paused":
            raise Refused(
                f"the server is {self.state}, not paused: its lease ran out, or /pause was not "
                "called"
            )

    def begin_load(self, fence: int) -> None:
        """From here to `finish_load` there are no whole weights, whatever happens."""
        self.check_held(fence)
        self.version = None

    def finish_load(self, version: int) -> None:
        """The weights are whole again."""
        self.version = version

    def resume(self, fence: int) -> None:
        """Ends the pause; the state is then ready, or stale without whole weights."""
        self._check_fence(fence)
        self._lease_end = -math.inf

    def _check_fence(self, fence: int) -> None:
        if fence < self.fence:
            raise Refused(f"fence {fence}: a trainer with fence {self.fence} has taken over")
        self.fence = fence


class Holder(Protocol):
    """What holds the weights of a server: its engine.

    All calls come from one event loop, one after the other.
    """

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing is being computed.

        A second call is fine; "abort" then ends what "keep" had kept.
        """

    async def load(self, directory: Path, version: int) -> None:
        """Replaces the weights by those of a directory, and resets every cache.

        After an exception the weights count as half loaded.
        """

    async def resume(self) -> None:
        """Computes on. What a pause has kept goes on too."""


class Control:
    """The routes of a server whose weights a trainer changes.

    `mount` adds them to its application.
    """

    def __init__(
        self,
        gate: WeightsGate,
        holder: Holder,
        weights_dir: Path,
        *,
        protocol: str,
        token: str | None,
        max_model_len: int | None = None,
    ):
        self.gate, self.holder = gate, holder
        self.weights_dir, self.protocol = weights_dir, protocol
        # tokens that a question may have, for a trainer to know before it asks
        self.max_model_len = max_model_len
        self._has_token = token is not None
        self._turn = asyncio.Lock()  # one control request at a time
        # cleared from a pause until the holder does what the gate then says
        self._settled = asyncio.Event()
        self._settled.set()
        self._watch: asyncio.Task | None = None

    def mount(self, app: FastAPI) -> None:
        """Adds the routes.

        The token itself is checked around the whole application, by `http_service.RequireToken`.
        """
        app.add_api_route("/version", self.tell_version, methods=["GET"])
        for route in (self.pause, self.update_weights, self.resume, self.lease):
            app.add_api_route(f"/{route.__name__}", route, methods=["POST"])

    async def ready(self, seconds: float = GATE_SECONDS) -> int:
        """The version that serves, as soon as the server is not paused.

        HTTPException 503 if it is stale or stays paused.
        """
        try:
            async with asyncio.timeout(seconds):
                while not self._settled.is_set():
                    await self._settled.wait()
        except TimeoutError:
            raise HTTPException(
                503, f"paused for more than {seconds:g} s", headers={"Retry-After": "1"}
            ) from None
        if self.gate.version is None:
            raise HTTPException(503, "stale")
        return self.gate.version

    async def tell_version(self) -> dict[str, Any]:
        gate = self.gate
        facts = {"weights": gate.version, "state": gate.state, "fence": gate.fence}
        if self.max_model_len is not None:
            facts["max_model_len"] = self.max_model_len
        return {"version": "1", "protocol": self.protocol, **facts}

    # ---- What a trainer asks ----

    async def pause(self, request: Request) -> dict[str, Any]:
        """Closes the gate, until a resume or the end of the lease."""
        fence, body = await self._read(request)
        async with self._in_turn():
            mode, lease_s = body.get("mode", "keep"), _whole_or_not(body, "lease_s")
            if mode not in ("keep", "abort"):
                raise HTTPException(400, 'mode: must be "keep" or "abort"')
            self.gate.pause(fence, lease_s)
            self._settled.clear()
            if self._watch is None or self._watch.done():
                self._watch = asyncio.create_task(self._keep_lease())
            async with asyncio.timeout(ACT_SECONDS):
                await self.holder.pause(mode)
        return self._state()

    async def update_weights(self, request: Request) -> dict[str, Any]:
        """Loads a version of the directory that the server was started with."""
        fence, body = await self._read(request)
        async with self._in_turn():
            version = _whole_or_not(body, "version", whole=True)
            self.gate.check_held(fence)
            try:
                async with asyncio.timeout(ACT_SECONDS):
                    directory = await asyncio.to_thread(verify, self.weights_dir, version, fence)
            except ValueError as error:
                raise HTTPException(422, one_line(error)) from None  # nothing has changed
            self.gate.begin_load(fence)
            try:
                async with asyncio.timeout(ACT_SECONDS):
                    await self.holder.load(directory, version)
            except Exception as error:  # whatever the engine raises, the weights are half loaded
                raise HTTPException(
                    500, f"half loaded: {type(error).__name__}: {one_line(error)}"
                ) from error
            self.gate.finish_load(version)
        return self._state()

    async def resume(self, request: Request) -> dict[str, Any]:
        """Opens the gate."""
        fence, _ = await self._read(request)
        async with self._in_turn():
            self.gate.resume(fence)
            await self._settle()
            if self.gate.state == "stale":
                raise HTTPException(503, "stale")
        return self._state()

    async def lease(self, request: Request) -> dict[str, Any]:
        """Renews the lease; not in turn, since a long load needs it."""
        fence, body = await self._read(request)
        self.gate.renew(fence, _whole_or_not(body, "lease_s"))
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {"version": self.gate.version, "state": self.gate.state}

    async def _read(self, request: Request) -> tuple[int, dict[str, Any]]:
        """(fence, the whole body) of a control request."""
        if not self._has_token:
            raise HTTPException(403, "set OPD_SERVER_TOKEN: without it nobody may change weights")
        body = await read_json(request, MOST_BYTES)
        return _whole_or_not(body, "fence", whole=True), body

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """One control request at a time."""
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turn.acquire()
            try:
                yield
            finally:
                self._turn.release()
        except TimeoutError:
            raise HTTPException(
                503, "another control request, or this one, takes too long"
            ) from None

    # ---- The end of a pause ----

    async def _keep_lease(self) -> None:
        """Ends a pause whose trainer has died; if it has died while weights are loaded,
        after that.
        """
        while not self._settled.is_set():
            await asyncio.sleep(min(self.gate.lease_left, LEASE_POLL_SECONDS))
            if self.gate.state != "paused":
                with suppress(TimeoutError):
                    async with asyncio.timeout(TURN_SECONDS), self._turn:
                        if self.gate.state != "paused":  # nobody renewed it meanwhile
                            await self._settle()

    async def _settle(self) -> None:
        """Makes the holder do what the gate says: compute on, or end what would have gone on with
        half-loaded weights.
        """
        async with asyncio.timeout(ACT_SECONDS):
            if self.gate.state == "ready":
                await self.holder.resume()
            elif not self._settled.is_set():
                await self.holder.pause("abort")
        self._settled.set()


def _whole_or_not(body: dict, name: str, *, whole: bool = False) -> Any:
    """A number of at least 0 from a control request, or HTTPException 400."""
    value = body.get(name)
    right = (
        isinstance(value, int) if whole else isinstance(value, int | float) and math.isfinite(value)
    )
    if not right or isinstance(value, bool) or value < 0:
        raise HTTPException(
            400, f"{name}: must be {'an integer' if whole else 'a number'} of at least 0"
        )
    return value
