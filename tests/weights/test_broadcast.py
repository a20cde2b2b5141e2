"""Weights that a trainer sends to servers which do not see its folder: real groups over gloo, real
servers, a whole run.

The tests of the servers are in the order of their life. NCCL needs GPUs and is not run here.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from opd.servers.server_processes import ServerOptions, start_replica, stop_all
from opd.weights import broadcast, store
from opd.weights import keeper as keeper_module
from opd.weights.broadcast import receiving, sending
from opd.weights.keeper import WeightKeeper
from opd.weights.offer import Receivers, read_offer
from opd.weights.push import PushFailed, push_to_servers
from tests.servers.test_logprob_server import ask, question
from tests.servers.test_rollout_server import LONG, SECONDS, TOKEN, generate, under_way, wait_for
from tests.support.launch import command, ledger_of, losses_of, parameter_hash, succeed
from tests.support.processes import LOOPBACK, listening_addresses, worker_environment
from tests.support.pushed_server import Server
from tests.support.scripted_server import serving
from tests.whole_runs.test_standalone import models  # noqa: F401 - a fixture

NAMES = {"a.weight": (3, 5), "b.weight": (70,), "c.bias": ()}


def weights_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    shapes = zip(NAMES.items(), dtypes, strict=True)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for (name, shape), dtype in shapes
    }


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "weights"
    store.publish(path, weights_of().items(), 1, 1)
    return path


def receivers(workers: int = 1, **shapes) -> Receivers:
    parameters = {
        name: torch.empty(shape, device="meta") for name, shape in (NAMES | shapes).items()
    }
    return Receivers(workers, "gloo", parameters)


def send_to(root, workers=1, seconds=20.0, fence=1):
    return sending(
        root, 1, fence, address="127.0.0.1", workers=workers, backend="gloo", seconds=seconds
    )


def take(offer, rank: int, most: int | None = None) -> dict[str, torch.Tensor]:
    found = {}
    with receiving(offer, rank, "cpu") as tensors:
        for name, tensor in tensors:
            found[name] = tensor
            if len(found) == most:
                raise RuntimeError("enough")
    return found


def own_sockets() -> set[str]:
    return listening_addresses(os.getpid())


# ---- The group -----------------------------------------------------------------------------------


def test_every_worker_gets_what_was_published_over_loopback_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    monkeypatch.setattr(broadcast, "CHUNK_BYTES", 1024)
    monkeypatch.setenv("OPD_FAULT", "push.sending:delay=0.2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")  # it is not asked
    root, before = tmp_path / "weights", own_sockets()
    store.publish(root, weights_of().items(), 1, 1)
    assert len(list((root / "v1").glob("*.safetensors"))) == 3
    with send_to(root, workers=2) as said, ThreadPoolExecutor(2) as pool:
        offer = read_offer(json.loads(json.dumps(said)), "127.0.0.1", receivers(2))
        takes = [pool.submit(take, offer, rank) for rank in (1, 2)]
        while not all(future.done() for future in takes):
            assert own_sockets() - before <= LOOPBACK
            time.sleep(0.01)
        for future in takes:
            found = future.result(timeout=SECONDS)
            assert found.keys() == weights_of().keys()
            assert all(torch.equal(found[name], value) for name, value in weights_of().items())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", offer.port), timeout=5)


def test_a_receiver_that_dies_ends_the_sender(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    store.publish(tmp_path / "weights", weights_of().items(), 1, 1)
    start = time.monotonic()
    with (
        pytest.raises(ValueError, match=r"500: dead.*sending: "),
        send_to(tmp_path / "weights", workers=2) as said,
    ):
        offer = read_offer(said, "127.0.0.1", receivers(2))
        with ThreadPoolExecutor(2) as pool:
            takes = [pool.submit(take, offer, rank, 1) for rank in (1, 2)]
            for future in takes:
                with pytest.raises(RuntimeError, match="enough"):
                    future.result(timeout=SECONDS)
        wait_for(
            lambda: all(thread.name != "weight sender" for thread in threading.enumerate()), 15
        )
        raise ValueError("500: dead")
    assert time.monotonic() - start < 15  # not the 20 s of the deadline


def test_who_does_not_come_is_not_waited_for_beyond_the_deadline(root):
    with (
        pytest.raises(ValueError, match=r"refused.*did not come within 0.3 s"),
        send_to(root, seconds=0.3),
    ):
        time.sleep(0.6)
        raise ValueError("refused")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^refused$"), send_to(root):
        raise ValueError("refused")
    assert time.monotonic() - start < 5  # a refusal is known at once


def test_what_arrives_must_have_its_hash_and_its_header(root):
    for change in ("sha256", "header"):
        wrong = pytest.raises(
            ValueError, match=r"not what was published|not the one that was announced"
        )
        with wrong, send_to(root) as said:
            shard = json.loads(json.dumps(said["shards"][0]))
            if change == "sha256":
                shard["sha256"] = "0" * 64
            else:
                shard["header"]["__metadata__"] = {"format": "other"}
            take(read_offer(said | {"shards": [shard]}, "127.0.0.1", receivers()), 1)


def test_an_older_fence_or_another_version_is_not_sent(root):
    with pytest.raises(ValueError, match="of fence 1, not version 1 of 2"), send_to(root, fence=2):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 0}, "whole number"),
        ({"port": "80; x"}, "ValueError"),
        ({"seconds": 601}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"chunk_bytes": 1}, "whole number"),
        ({"shards": None}, "TypeError"),
        ({"shards": []}, "were not published"),
        ({"size": 1 << 60}, "whole number"),
        ({"size": 8}, "size or hash"),
        ({"sha256": "../x"}, "size or hash"),
        ({"a.weight": {"dtype": "F99"}}, "F99"),
        ({"a.weight": {"shape": [5, 3]}}, "the model has"),
        ({"a.weight": {"shape": [-3, -5]}}, "whole number"),
        ({"a.weight": {"shape": [1 << 41, 5]}}, "whole number"),
        ({"a.weight": {"data_offsets": [0, 1]}}, "where they"),
        ({"a.weight": None}, "TypeError"),
        ({"d.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "d.weight"),
    ],
)
def test_an_offer_that_cannot_be_is_refused_before_anything_is_allocated(root, change, message):
    with send_to(root) as said:
        offer = json.loads(json.dumps(said))
    for key, value in change.items():
        if key in offer:
            offer[key] = value
        elif key in ("size", "sha256"):
            offer["shards"][0][key] = value
        else:
            header = offer["shards"][0]["header"]
            header[key] = value and header.get(key, {}) | value
    with pytest.raises(ValueError, match=message) as caught:
        read_offer(offer, "127.0.0.1", receivers())
    assert "\n" not in str(caught.value)
    for nothing in (None, [], "x", {}):
        with pytest.raises(ValueError, match="broadcast"):
            read_offer(nothing, "127.0.0.1", receivers())


def test_nccl_that_would_listen_to_the_network_is_refused(monkeypatch):
    check, url = broadcast.check_interface, "http://127.0.0.1:1"
    check([url], {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for reached in (url, "auto"):
        with pytest.raises(
            ValueError, match=f"--weight_transfer broadcast.*{reached}.*NCCL_SOCKET_IFNAME=lo"
        ):
            check([reached], {})
    check([url, "auto"], {"NCCL_SOCKET_IFNAME": "lo"})
    check(["http://192.0.2.1:1"], {})


class Taker(Server):
    """A server of weights that are never used, and come over a group."""

    def __init__(self, root):
        super().__init__(root)
        self.control.receivers, self.found = receivers(), {}

    async def load(self, source, version):
        self.found = await asyncio.to_thread(take, source, 1)
        self.loaded.append(version)


def test_a_server_that_lost_its_weights_is_sent_them_again(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "LOOK_SECONDS", 0.05)
    elsewhere = tmp_path / "elsewhere"
    with serving(Taker(elsewhere)) as first, serving(Taker(elsewhere)) as second:
        roles = {"rollout": [first.url], "logprob": [second.url]}
        keeper = WeightKeeper(
            roles, tmp_path / "weights", 5, TOKEN, mode="keep", wait_s=0.0, broadcast=True
        )
        try:
            found = keeper.push(iter(weights_of().items()), 1)
            assert (
                set(found) == {"bytes", "publish_s", "s", "pause_s"}
                and found["s"] >= found["pause_s"] > 0
            )
            second.gate.version, second.found = None, {}  # as after a restart
            wait_for(lambda: second.gate.state == "ready")
        finally:
            keeper.close()
    assert (first.loaded, second.loaded) == ([1], [1, 1])
    for server in (first, second):
        assert all(torch.equal(server.found[name], value) for name, value in weights_of().items())


def test_a_server_that_takes_no_broadcast_keeps_what_it_has(tmp_path, root):
    with serving(Server(tmp_path)) as server:
        with pytest.raises(PushFailed, match="takes no broadcast; use --weight_transfer directory"):
            push_to_servers([server.url], 1, 1, TOKEN, broadcast_from=root)
        assert server.loaded == []


# ---- Servers that do not see the folder ----------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "weights"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(scope="module")
def servers(tiny, elsewhere, tmp_path_factory):
    """A rollout server of two processes and a log-prob server."""
    os.environ["OPD_SERVER_TOKEN"] = TOKEN
    common = {
        "model": str(tiny.student),
        "name": "student",
        "weights_dir": elsewhere,
        "dtype": "float32",
    }
    rollout = ServerOptions(
        protocol="rollout",
        tensor_parallel=2,
        kv_cache_gib=0.05,
        extra=("--enforce_eager",),
        **common,
    )
    logs = tmp_path_factory.mktemp("logs")
    started = [
        start_replica(options, logs / options.protocol)
        for options in (rollout, ServerOptions(protocol="logprob", **common))
    ]
    try:
        for server in started:
            server.wait_until_ready(300.0)
        yield started
    finally:
        stop_all(started)
        del os.environ["OPD_SERVER_TOKEN"]


@pytest.fixture(scope="module")
def client(servers):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(
        base_url=servers[0].url, headers=headers, timeout=SECONDS, trust_env=False
    ) as client:
        yield client


def broadcast(versions, servers, version: int, **options):  # noqa: F811
    urls = [server.url for server in servers]
    more = {"lease_s": 20.0, "deadline_s": SECONDS, "broadcast_from": versions.root, **options}
    return push_to_servers(urls, version, versions.fence, TOKEN, **more)


def assert_serves(versions, servers, client, version: int) -> None:
    """Both compute with the weights of a version, which this process knows."""
    answer = generate(client, prompt_ids=[3, 4, 5], seed=version, max_tokens=30)
    assert answer["spans"] == [[version, 0, 30]]
    expected = versions.logprobs(version, [3, 4, 5], answer["token_ids"])
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, atol=1e-5, rtol=0)
    asked = question()
    said = ask(servers[1].url, asked)
    expected = versions.logprobs(version, list(asked.prompt_ids), list(asked.response_ids))
    assert said.version == version
    torch.testing.assert_close(said.logprobs_L, expected, atol=1e-5, rtol=0)


def states(servers) -> list[str]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return [
        httpx.get(f"{s.url}/version", headers=headers, timeout=SECONDS).json()["state"]
        for s in servers
    ]


def test_a_broadcast_reaches_servers_over_loopback_alone(
    servers, client, versions, elsewhere, monkeypatch
):
    monkeypatch.setenv("OPD_FAULT", "push.sending:delay=1")
    before, seen = own_sockets(), set()
    versions.publish(1)
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(broadcast, versions, servers, 1)
        while not pushed.done():
            seen |= own_sockets() - before
            for server in servers:
                for process in [
                    psutil.Process(server.process.pid),
                    *psutil.Process(server.process.pid).children(True),
                ]:
                    seen |= listening_addresses(process.pid)
            time.sleep(0.05)
        report = pushed.result(timeout=SECONDS)
    assert not report.failed and all(
        0 < replica.pause_s <= replica.seconds for replica in report.replicas
    )
    assert seen and seen <= LOOPBACK
    assert_serves(versions, servers, client, 1)
    assert not list(elsewhere.iterdir())


def test_a_response_goes_on_under_the_weights_that_were_sent(servers, client, versions):
    versions.publish(2)
    future = under_way(client, **LONG)
    assert not broadcast(versions, servers, 2, mode="keep").failed
    answer = future.result(timeout=SECONDS)
    (old, start, cut), (new, again, end) = answer["spans"]
    assert (old, start, new, end) == (1, 0, 2, 480) and 0 < cut == again < 480
    got = torch.tensor(answer["logprobs"])
    for version, part in ((1, slice(0, cut)), (2, slice(cut, 480))):
        expected = versions.logprobs(version, LONG["prompt_ids"], answer["token_ids"])
        torch.testing.assert_close(got[part], expected[part], atol=2e-5, rtol=0)


def test_what_does_not_fit_the_model_changes_nothing(servers, client, versions):
    versions.publish(3, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(PushFailed, match=r"422.*up_proj.weight: \(3, 3\) was published"):
        broadcast(versions, servers, 3)
    assert states(servers) == ["ready", "ready"]
    assert_serves(versions, servers, client, 2)


def test_the_server_goes_where_the_request_came_from_and_nowhere_else(servers, client, versions):
    with send_to_servers(versions, 2) as offer:
        pass  # nobody listens there any more
    elsewhere = {"host": "192.0.2.1", "address": "192.0.2.1"}
    for server in servers:
        post = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": "192.0.2.1"}
        with httpx.Client(
            base_url=server.url, headers=post, timeout=SECONDS, trust_env=False
        ) as asking:
            fence = versions.fence
            assert asking.post("/pause", json={"fence": fence, "lease_s": 20}).status_code == 200
            body = {"fence": fence, "version": 2, "broadcast": offer | elsewhere, **elsewhere}
            answer = asking.post("/update_weights", json=body)
            assert (
                answer.status_code == 422
                and "the trainer at 127.0.0.1 port" in answer.json()["error"]
            )
            assert asking.post("/resume", json={"fence": fence}).json()["state"] == "ready"
    with httpx.Client(base_url=servers[0].url, timeout=SECONDS, trust_env=False) as stranger:
        assert stranger.post("/update_weights", json=body).status_code == 401


def send_to_servers(versions, version: int):
    return sending(
        versions.root,
        version,
        versions.fence,
        address="127.0.0.1",
        workers=1,
        backend="gloo",
        seconds=20.0,
    )


def test_a_wrong_hash_leaves_it_stale_and_the_next_push_heals_it(servers, client, versions):
    versions.publish(3)
    path = versions.root / "v3" / "model-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(PushFailed, match=r"half loaded.*not what was published"):
        broadcast(versions, servers, 3)
    assert states(servers) == ["stale", "stale"]
    versions.publish(3)
    assert not broadcast(versions, servers, 3).failed
    assert_serves(versions, servers, client, 3)


# A trainer that is struck in the middle of a file.
SENDER = """
import sys
from pathlib import Path
from opd import weight_broadcast
from opd.weights.push import push
weight_broadcast.CHUNK_BYTES, weight_broadcast.STALL_SECONDS = 1 << 15, 3.0
url, version, token, root = sys.argv[1:]
push([url], int(version), 1, token, lease_s=2.0, broadcast_from=Path(root))
"""


@pytest.mark.parametrize(("action", "place"), [("kill", 0), ("kill", 1), ("stop", 0), ("stop", 1)])
def test_a_sender_that_ends_in_the_middle_leaves_a_stale_server(
    servers, client, versions, action, place
):
    url, version = servers[place].url, 2
    versions.publish(version)
    command_line = [sys.executable, "-c", SENDER, url, str(version), TOKEN, str(versions.root)]
    sender = subprocess.Popen(
        command_line, env=worker_environment(OPD_FAULT=f"push.sending:{action}@3")
    )
    try:
        if action == "kill":
            assert sender.wait(timeout=SECONDS) == -signal.SIGKILL
        else:
            wait_for(lambda: psutil.Process(sender.pid).status() == psutil.STATUS_STOPPED)
        start = time.monotonic()
        wait_for(lambda: states(servers)[place] == "stale", 20)
        print(f"{action}: stale after {time.monotonic() - start:.1f} s")
        assert states(servers)[1 - place] == "ready"
    finally:
        sender.kill()
        sender.wait(timeout=SECONDS)
    assert not broadcast(versions, servers, version).failed
    assert_serves(versions, servers, client, version)


@pytest.mark.e2e
def test_a_run_is_that_of_the_directory_bit_for_bit(servers, models, elsewhere, tmp_path):  # noqa: F811
    flags = (
        "--mode",
        "async",
        "--max_staleness",
        "0",
        "--num_steps",
        "2",
        "--rollout_servers",
        servers[0].url,
    )
    runs = []
    for transfer, weights in (("broadcast", tmp_path / "weights"), ("directory", elsewhere)):
        run_dir = tmp_path / transfer
        more = ("--weight_transfer", transfer, "--weights_dir", str(weights))
        succeed(command(models, run_dir, *flags, *more))
        runs.append((losses_of(run_dir), parameter_hash(run_dir), ledger_of(run_dir)))
        assert len(runs[-1][0]) == 2
    assert runs[0] == runs[1]
    assert (tmp_path / "weights" / "v2").is_dir() and (elsewhere / "v2").is_dir()
