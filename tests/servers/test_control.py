"""Who may change a server's weights, and what it serves meanwhile: the gate by itself, and the
routes around a fake engine.
"""

import asyncio
import math

import httpx
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from opd.servers import http_service
from opd.servers.control import Control, Refused, WeightsGate
from opd.servers.http_service import RequireToken, new_app
from opd.weights import store

TOKEN = "a-token-of-more-than-16-characters"
SECONDS = 20.0


# ---- The state machine ---------------------------------------------------------------------------


class Gate(RuleBasedStateMachine):
    """Trainers with any fence, in any order, at any time; what they may not do changes nothing."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.gate = WeightsGate(clock=lambda: self.now)
        self.loading = False
        self.whole = None  # the version of the whole weights
        self.held_until = -math.inf
        self.largest = 0

    def allowed(self, fence: int, act, *, needs_pause: bool = False) -> bool:
        before = (self.gate.state, self.gate.version)
        right = fence >= self.largest and not (needs_pause and self.now >= self.held_until)
        if right:
            act()
        else:
            with pytest.raises(Refused):
                act()
            assert (self.gate.state, self.gate.version) == before
        self.largest = max(self.largest, fence)
        return right

    fences, leases = st.integers(0, 3), st.floats(0.0, 10.0)

    @rule(fence=fences, lease_s=leases)
    def pause(self, fence, lease_s):
        if self.allowed(fence, lambda: self.gate.pause(fence, lease_s)):
            self.held_until = self.now + lease_s

    @rule(fence=fences, lease_s=leases)
    def renew(self, fence, lease_s):
        if self.allowed(fence, lambda: self.gate.renew(fence, lease_s), needs_pause=True):
            self.held_until = self.now + lease_s

    @precondition(lambda self: not self.loading)
    @rule(fence=fences)
    def begin_load(self, fence):
        if self.allowed(fence, lambda: self.gate.begin_load(fence), needs_pause=True):
            self.loading, self.whole = True, None

    @precondition(lambda self: self.loading)
    @rule(version=st.integers(0, 9), works=st.booleans())
    def end_load(self, version, works):
        self.loading = False
        if works:
            self.gate.finish_load(version)
            self.whole = version

    @rule(fence=fences)
    def resume(self, fence):
        if self.allowed(fence, lambda: self.gate.resume(fence)):
            self.held_until = -math.inf

    @rule(seconds=leases)
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def says_what_it_is(self):
        if self.now < self.held_until:
            assert self.gate.state == "paused"
        else:
            assert self.gate.state == ("stale" if self.whole is None else "ready")
        assert (self.gate.version, self.gate.fence) == (self.whole, self.largest)


TestGate = Gate.TestCase
TestGate.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


# ---- The routes ----------------------------------------------------------------------------------


class Engine:
    """Notes what it is told; a load takes as long as a test wants, or fails."""

    def __init__(self):
        self.told, self.load_seconds, self.breaks = [], 0.0, False

    async def pause(self, mode):
        self.told.append(f"pause {mode}")

    async def load(self, directory, version):
        self.told.append(f"load {directory.name}")
        await asyncio.sleep(self.load_seconds)
        if self.breaks:
            raise RuntimeError("half of it\nis missing")

    async def resume(self):
        self.told.append("resume")


class Server:
    """The control routes around an engine, and a route that asks the gate."""

    def __init__(self, root, *, version=None, token=TOKEN):
        self.engine = Engine()
        self.control = Control(
            WeightsGate(version), self.engine, root, protocol="opd-test-1", token=token
        )
        app = new_app()
        self.control.mount(app)
        app.add_api_route("/ask", self.ask, methods=["GET"])
        transport = httpx.ASGITransport(app if token is None else RequireToken(app, token))
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://server", headers=headers, timeout=SECONDS
        )

    async def ask(self):
        return {"version": await self.control.ready(5.0)}

    async def post(self, path, **body) -> tuple[int, dict]:
        answer = await self.client.post(path, json={"fence": 1, **body})
        return answer.status_code, answer.json()

    async def get(self, path) -> tuple[int, dict]:
        answer = await self.client.get(path)
        return answer.status_code, answer.json()


@pytest.fixture
def root(tmp_path):
    for version in (1, 2):
        store.publish(tmp_path / "store", [("a", torch.full((3,), float(version)))], version, 1)
    return tmp_path / "store"


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, SECONDS))


def test_a_push(root):
    async def scenario():
        server = Server(root)
        assert await server.get("/ask") == (503, {"error": "stale"})
        assert await server.post("/pause", lease_s=9) == (200, {"version": None, "state": "paused"})
        assert await server.post("/update_weights", version=2) == (
            200,
            {"version": 2, "state": "paused"},
        )
        waiting = asyncio.create_task(server.get("/ask"))
        await asyncio.sleep(0.05)
        assert not waiting.done()  # a question waits for the end of a pause
        assert await server.post("/resume") == (200, {"version": 2, "state": "ready"})
        assert await waiting == (200, {"version": 2})
        facts = {
            "version": "1",
            "protocol": "opd-test-1",
            "weights": 2,
            "state": "ready",
            "fence": 1,
        }
        assert await server.get("/version") == (200, facts)
        assert server.engine.told == ["pause keep", "load v2", "resume"]

    run(scenario())


def test_a_dead_trainers_lease_ends_the_pause(root):
    async def scenario():
        server = Server(root, version=0)
        await server.post("/pause", lease_s=0.2, mode="abort")
        assert await server.get("/ask") == (200, {"version": 0})
        assert server.engine.told == ["pause abort", "resume"]
        status, answer = await server.post("/update_weights", version=1)  # it was not dead but late
        assert status == 409 and "lease" in answer["error"]
        assert (await server.post("/lease", lease_s=5))[0] == 409

    run(scenario())


def test_half_loaded_is_stale_until_a_push_is_complete(root):
    async def scenario():
        server = Server(root, version=0)
        server.engine.breaks = True
        await server.post("/pause", lease_s=1.5)
        status, answer = await server.post("/update_weights", version=1)
        assert status == 500 and "half of it is missing" in answer["error"]
        assert await server.get("/ask") == (
            503,
            {"error": "stale"},
        )  # it waited until the lease had run out
        # nothing that was kept goes on with such weights
        assert server.engine.told[-1] == "pause abort"
        assert await server.post("/resume") == (503, {"error": "stale"})
        server.engine.breaks = False
        await server.post("/pause", lease_s=5)
        await server.post("/update_weights", version=1)
        assert await server.post("/resume") == (200, {"version": 1, "state": "ready"})
        assert await server.get("/ask") == (200, {"version": 1})

    run(scenario())


def test_a_load_that_outlives_its_lease_is_whole_in_the_end(root):
    async def scenario():
        server = Server(root, version=0)
        server.engine.load_seconds = 2.0
        await server.post("/pause", lease_s=1.0)
        assert (await server.post("/update_weights", version=1))[0] == 200
        assert await server.get("/ask") == (200, {"version": 1})
        assert server.engine.told == ["pause keep", "load v1", "resume"]

    run(scenario())


def test_a_lease_is_renewed_while_weights_load(root):
    async def scenario():
        server = Server(root, version=0)
        server.engine.load_seconds = 2.0
        await server.post("/pause", lease_s=1.5)
        load = asyncio.create_task(server.post("/update_weights", version=1))
        await asyncio.sleep(0.2)
        assert (await server.post("/lease", lease_s=5))[1]["state"] == "paused"
        assert await load == (200, {"version": 1, "state": "paused"})

    run(scenario())


def test_a_zombie_is_refused(root):
    async def scenario():
        server = Server(root, version=0)
        await server.post("/pause", fence=2, lease_s=5)
        for path, body in (
            ("/pause", {"lease_s": 5}),
            ("/update_weights", {"version": 1}),
            ("/lease", {"lease_s": 5}),
            ("/resume", {}),
        ):
            status, answer = await server.post(path, **body)
            assert status == 409 and "fence 2" in answer["error"]
        assert (await server.get("/version"))[1]["state"] == "paused"
        # what the zombie has published is not what its successor asks for
        assert (await server.post("/update_weights", fence=2, version=1))[0] == 422
        assert await server.post("/resume", fence=2) == (200, {"version": 0, "state": "ready"})
        assert "load" not in " ".join(server.engine.told)

    run(scenario())


def test_weights_that_are_not_what_was_published_change_nothing(root):
    (root / "v1" / "model-00001.safetensors").write_bytes(b"torn")

    async def scenario():
        server = Server(root, version=0)
        await server.post("/pause", lease_s=5)
        assert (await server.post("/update_weights", version=1))[0] == 422
        assert (await server.post("/update_weights", version=7))[0] == 422
        assert await server.post("/resume") == (200, {"version": 0, "state": "ready"})

    run(scenario())


def test_without_a_token_nobody_changes_anything(root):
    async def scenario():
        server = Server(root, version=0, token=None)
        for path in ("/pause", "/update_weights", "/lease", "/resume"):
            assert (await server.post(path, lease_s=5, version=1))[0] == 403
        assert server.engine.told == [] and await server.get("/ask") == (200, {"version": 0})
        server = Server(root, version=0)
        server.client.headers["Authorization"] = "Bearer another-token-of-some-length"
        for path in ("/pause", "/update_weights", "/lease", "/resume"):
            assert (await server.post(path, lease_s=5, version=1))[0] == 401

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/pause", {}),
        ("/pause", {"lease_s": "5"}),
        ("/pause", {"lease_s": -1}),
        ("/pause", {"lease_s": True}),
        ("/pause", {"lease_s": 5, "mode": "wait"}),
        ("/pause", {"fence": 1.5, "lease_s": 5}),
        ("/pause", {"fence": None, "lease_s": 5}),
        ("/update_weights", {"version": "../v1"}),
        ("/update_weights", {"version": "/etc"}),
        ("/update_weights", {}),
        ("/resume", {"fence": "1"}),
    ],
)
def test_a_mistake_is_one_line(root, path, body):
    async def scenario():
        server = Server(root, version=0)
        await server.post("/pause", lease_s=5)
        status, answer = await server.post(path, **body)
        assert status == 400 and answer["error"] and "\n" not in answer["error"]
        assert (await server.client.post(path, content=b"[" * 3000)).status_code == 400
        assert (await server.client.post(path, content=b" " * 5000)).status_code == 413

    run(scenario())


# ---- A refusal reaches who asked -----------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "read"), [(3, 3), (10**6, 65)], ids=["short", "endless"])
@pytest.mark.parametrize("app", [RequireToken(new_app(), "t" * 16), new_app()], ids=[401, 404])
def test_a_refusal_waits_for_a_short_body(app, blocks, read):
    """TCP would reset a connection that is closed on unread bytes, before the client has read its
    401 or 404.
    """
    events = []

    async def receive():
        events.append("block")
        return {"type": "http.request", "body": b"x" * 1024, "more_body": len(events) < blocks}

    async def send(message):
        events.append(message["type"])

    scope = {"type": "http", "path": "/pause", "headers": [], "method": "POST"}
    asyncio.run(app(scope, receive, send))
    assert (
        events.index("http.response.start") == pytest.approx(read, abs=1)
        and events.count("block") <= read
    )


def test_a_refusal_does_not_wait_long_for_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(http_service, "LINGER_SECONDS", 0.05)
    sent = []

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message.get("status"))

    async def ask():
        async with asyncio.timeout(30):
            await RequireToken(new_app(), "t" * 16)(
                {"type": "http", "path": "/pause", "headers": [], "method": "POST"}, receive, send
            )

    asyncio.run(ask())
    assert sent[0] == 401
