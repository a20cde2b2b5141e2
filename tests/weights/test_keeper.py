"""Servers are kept at the version that was pushed last: real control routes on real sockets, around
an engine that is none.
"""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch

from opd.weights import keeper as keeper_module
from opd.weights.keeper import WeightKeeper
from opd.weights.push import PushFailed
from tests.support.pushed_server import TOKEN, Server
from tests.support.scripted_server import serving, until

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(keeper_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(keeper_module, "AGAIN_SECONDS", 0.05)


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "weights"
    path.mkdir(mode=0o700)
    return path


@contextmanager
def keeper_of(root, wait_s: float = 0.0, fence: int = 5, **roles):
    keeper = WeightKeeper(roles, root, fence, TOKEN, mode="keep", wait_s=wait_s)
    try:
        yield keeper
    finally:
        keeper.close()
        assert not keeper._thread.is_alive()


def parameters():
    return iter([("weight", torch.ones(3))])


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def test_a_push_reaches_every_role_and_a_server_that_lost_its_weights_gets_them_again(root):
    with serving(Server(root)) as first, serving(Server(root)) as second:
        with keeper_of(root, rollout=[first.url], logprob=[second.url]) as keeper:
            found = keeper.push(parameters(), 1)
            assert (
                found["bytes"] > 0 and found["s"] >= found["pause_s"] > 0 and found["publish_s"] > 0
            )
            assert first.loaded == second.loaded == [1]
            keeper.push(parameters(), 2)
            second.gate.version = None  # as after a restart
            until(lambda: second.gate.state == "ready")
            time.sleep(0.3)  # and no more than that
        assert (first.loaded, second.loaded, second.gate.version) == ([1, 2], [1, 2, 2], 2)


def test_a_role_without_a_server_is_waited_for_and_then_named(root, monkeypatch):
    warnings = []
    monkeypatch.setattr(keeper_module, "warn", warnings.append)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        serving(Server(root)) as there,
        keeper_of(root, logprob=[there.url], rollout=[url]) as keeper,
    ):
        with pytest.raises(PushFailed, match=f"^rollout: no server took .* {url}"):
            keeper.push(parameters(), 1)
        keeper.wait_s = DEADLINE_S
        late = Server(root, port)
        with ThreadPoolExecutor() as thread:
            pushed = thread.submit(keeper.push, parameters(), 2)
            until(lambda: len(warnings) == 2)
            with serving(late):
                pushed.result(timeout=DEADLINE_S)
        assert late.loaded == [2]
        # not at each try
        assert len(warnings) == 2 and "version 1" in warnings[0] and "version 2" in warnings[1]


def test_a_server_that_missed_a_push_does_not_hold_up_the_next_one_and_comes_back(
    root, monkeypatch
):
    warnings, port = [], free_port()
    monkeypatch.setattr(keeper_module, "warn", warnings.append)
    with (
        serving(Server(root)) as there,
        keeper_of(root, rollout=[f"http://127.0.0.1:{port}/", there.url]) as keeper,
    ):
        for version in (1, 2, 3):
            keeper.push(parameters(), version)
        assert len(warnings) == 1 and "version 1" in warnings[0]  # it was not asked for the others
        with serving(Server(root, port)) as back:
            until(lambda: back.gate.state == "ready" and not keeper._missing)
            keeper.push(parameters(), 4)
        assert back.loaded == [3, 4] and there.loaded == [1, 2, 3, 4]


def test_a_server_of_a_later_trainer_is_left_alone(root):
    with serving(Server(root)) as server, keeper_of(root, rollout=[server.url]) as keeper:
        keeper.push(parameters(), 1)
        server.gate.fence, server.gate.version = 6, 0
        time.sleep(0.5)
        assert server.loaded == [1]


def test_half_of_the_servers_load_together_while_the_others_serve(root):
    both, times = threading.Barrier(2), {}

    class Slow(Server):
        async def load(self, directory, version):
            begun = time.monotonic()
            if self is not fleet[2]:
                await asyncio.to_thread(both.wait, DEADLINE_S)  # the other one has to come
            await super().load(directory, version)
            times[self] = begun, time.monotonic()

    with ExitStack() as stack:
        fleet = [stack.enter_context(serving(Slow(root))) for _ in range(3)]
        keeper = stack.enter_context(keeper_of(root, rollout=[server.url for server in fleet]))
        keeper.push(parameters(), 1)
    assert [server.loaded for server in fleet] == [[1]] * 3
    assert times[fleet[2]][0] >= max(times[server][1] for server in fleet[:2])
