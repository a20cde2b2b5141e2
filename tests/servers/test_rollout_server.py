"""Rollout servers and the weights that are pushed into them: real servers, tiny models, real
pushes.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch
from transformers import Qwen3ForCausalLM

from opd import processes
from opd.servers.rollout_server import read_sampling
from opd.servers.server_processes import serving
from opd.weights import store
from opd.weights.push import Push, PushFailed, push_to_servers
from tests.support.processes import LOOPBACK, listening_addresses, worker_environment

TOKEN = "a-token-of-more-than-16-characters"
VOCAB, CONTEXT, EOS = 40, 512, 1
SECONDS, KV_GIB = 120.0, 0.03
LONG = {"prompt_ids": [3, 4, 5], "seed": 7, "max_tokens": 480}


@dataclasses.dataclass
class Versions:
    """The student after so many steps: the models, and the store in which a trainer
    publishes them.
    """

    models: dict[int, Qwen3ForCausalLM]
    root: object
    fence: int = 1

    def publish(self, version: int, **changes: torch.Tensor) -> None:
        weights = dict(self.models[version].named_parameters()) | changes
        store.publish(self.root, weights.items(), version, self.fence)

    @torch.no_grad()
    def logprobs(self, version: int, prompt_ids: list[int], token_ids: list[int]) -> torch.Tensor:
        """[L] of the response under the weights of a version."""
        logits = self.models[version](torch.tensor([prompt_ids + token_ids])).logits[
            0, len(prompt_ids) - 1 : -1
        ]
        return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.fixture(scope="module")
def versions(tiny, tmp_path_factory) -> Versions:
    models = {}
    for version in range(1, 4):
        models[version] = Qwen3ForCausalLM.from_pretrained(tiny.student)
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in models[version].parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    return Versions(models, tmp_path_factory.mktemp("weights") / "root")


@pytest.fixture(scope="module")
def replica(tiny, versions, tmp_path_factory):
    """One server, stale until the first push; the tests below are in the order of its life."""
    os.environ["OPD_SERVER_TOKEN"] = TOKEN
    log_dir = tmp_path_factory.mktemp("server")
    try:
        with serving(
            str(tiny.student),
            protocol="rollout",
            weights_dir=versions.root,
            kv_cache_gib=KV_GIB,
            dtype="float32",
            log_dir=log_dir,
            start_seconds=300.0,
            extra=("--enforce_eager",),
        ) as (replica,):
            yield replica
    finally:
        del os.environ["OPD_SERVER_TOKEN"]


@pytest.fixture(scope="module")
def client(replica):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(
        base_url=replica.url, headers=headers, timeout=SECONDS, trust_env=False
    ) as client:
        yield client


# A cold engine as a synchronous trainer has it, in a process of its own: other tests' engines need
# theirs for themselves.
IN_PROCESS = """
import dataclasses, json, sys
from opd import distributed
from opd.engines.vllm_engine import GeneratorEngine
job = json.load(open(sys.argv[1]))
with distributed.exit_together():
    distributed.init()
    of_engine = {"dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.03, "seed": 0}
    engine = GeneratorEngine(job["model"], trust_remote_code=False, enforce_eager=True, **of_engine)
    samples = [engine.generate(job["prompts"], job["seeds"], job["stop_ids"], **options) for options in job["options"]]
    with open(sys.argv[2], "w") as answer:
        json.dump([[dataclasses.asdict(s) for s in part] for part in samples], answer)
"""  # noqa: E501


def generate(client, **question) -> dict:
    answer = client.post("/generate", json=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(client) -> dict[str, float]:
    lines = [
        line.split()
        for line in client.get("/metrics").text.splitlines()
        if not line.startswith("#")
    ]
    return {name.removeprefix("opd_").removesuffix("_total"): float(value) for name, value in lines}


def wait_for(what, seconds=SECONDS) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def under_way(client, **question):
    """(future of the answer, after the engine has worked on it for 60 steps)."""
    steps = counted(client)["engine_steps"]
    pool = ThreadPoolExecutor(1)
    future = pool.submit(generate, client, **question)
    pool.shutdown(wait=False)
    wait_for(lambda: counted(client)["engine_steps"] > steps + 60)
    return future


def push_to(versions, replica, version, **options):
    facts = {"version": version, "fence": versions.fence, "token": TOKEN}
    push = Push(**facts, lease_s=20.0, deadline_s=SECONDS, **options)
    return push_to_servers([replica.url], push)


# ---- One server's life ---------------------------------------------------------------------------


def test_a_server_without_a_push_serves_nothing(client, replica):
    answer = client.post("/generate", json={**LONG, "max_tokens": 1})
    assert (answer.status_code, answer.json()) == (503, {"error": "stale"})
    facts = {
        "version": "1",
        "protocol": "opd-rollout-1",
        "weights": None,
        "state": "stale",
        "fence": 0,
    }
    assert client.get("/version").json() == facts | {"max_model_len": 512}
    children = psutil.Process(replica.process.pid).children(recursive=True)
    for pid in (replica.process.pid, *(child.pid for child in children)):
        assert listening_addresses(pid) <= LOOPBACK


def test_only_our_routes_are_open_and_only_with_the_token(client, replica):
    for path in (
        "/collective_rpc",
        "/reload_weights",
        "/sleep",
        "/reset_prefix_cache",
        "/v1/completions",
        "/docs",
    ):
        assert client.post(path, json={}).status_code == 404, path
    with httpx.Client(base_url=replica.url, trust_env=False) as stranger:
        assert stranger.get("/health").status_code == 200
        for path in ("/generate", "/pause", "/update_weights", "/resume", "/lease"):
            assert stranger.post(path, json={"fence": 9, "lease_s": 9}).status_code == 401
        assert stranger.get("/version").status_code == stranger.get("/metrics").status_code == 401


def test_a_push_replaces_weights_and_cached_prefixes(client, replica, versions):
    # two blocks of the prefix cache, on a CPU of 128 tokens each
    prompt_ids = [2 + i % 38 for i in range(300)]
    for version in (1, 2):
        versions.publish(version)
        report = push_to(versions, replica, version)
        assert not report.failed and report.replicas[0].pause_s <= report.replicas[0].seconds
        print(f"push: {report.replicas[0].seconds:.3f} s, pause {report.replicas[0].pause_s:.3f} s")
        for _ in range(2):  # the second one finds the prompt in the cache
            answer = generate(client, prompt_ids=prompt_ids, seed=1, max_tokens=20)
            expected = versions.logprobs(version, prompt_ids, answer["token_ids"])
            torch.testing.assert_close(
                torch.tensor(answer["logprobs"]), expected, atol=1e-5, rtol=0
            )
            assert answer["spans"] == [[version, 0, 20]]


def test_tokens_are_those_of_a_cold_in_process_engine(client, versions, tiny, tmp_path):
    shutil.copytree(tiny.student, tmp_path / "model")
    versions.models[2].save_pretrained(tmp_path / "model")
    options = [
        {"temperature": 1.0, "max_tokens": 40},
        {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12},
        {"temperature": 1.3, "top_k": 5, "max_tokens": 12},
        {"temperature": 0.0, "max_tokens": 12},
    ]
    prompts, seeds = [[3, 4, 5], [6, 7], [8, 9, 10, 11]] * 4, list(range(12))
    job = {
        "model": str(tmp_path / "model"),
        "prompts": prompts,
        "seeds": seeds,
        "stop_ids": [EOS, 17],
        "options": options,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-c", IN_PROCESS, tmp_path / "job.json", tmp_path / "samples.json"]
    subprocess.run(command, env=worker_environment(), check=True, timeout=300)
    for part, expected in zip(
        options, json.loads((tmp_path / "samples.json").read_text()), strict=True
    ):
        ask = [
            {"prompt_ids": p, "seed": s, "stop_ids": [EOS, 17], **part}
            for p, s in zip(prompts, seeds, strict=True)
        ]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda question: generate(client, **question), ask))
        for answer, sample in zip(answers, expected, strict=True):
            assert answer["token_ids"] == sample["token_ids"]
            assert answer["finish_reason"] == ("stop" if sample["stopped"] else "length")
            torch.testing.assert_close(answer["logprobs"], sample["logprobs"], atol=1e-5, rtol=0)
    assert generate(client, **{**LONG, "max_tokens": 3}, with_logprobs=False)["logprobs"] is None


def test_a_push_in_the_middle_of_a_response(client, replica, versions):
    versions.publish(3)
    future = under_way(client, **LONG)
    assert not push_to(versions, replica, 3, mode="keep").failed
    answer = future.result(timeout=SECONDS)
    (old, start, cut), (new, again, end) = answer["spans"]
    assert (old, start, new, end) == (2, 0, 3, 480) and 0 < cut == again < 480
    assert answer["finish_reason"] == "length"
    got = torch.tensor(answer["logprobs"])
    expected = {
        version: versions.logprobs(version, LONG["prompt_ids"], answer["token_ids"])
        for version in (2, 3)
    }
    torch.testing.assert_close(got[:cut], expected[2][:cut], atol=2e-5, rtol=0)
    torch.testing.assert_close(got[cut:], expected[3][cut:], atol=2e-5, rtol=0)
    # at the very token: its neighbours are not explained by the other weights
    assert (
        abs(got[cut] - expected[2][cut]) > 1e-3 and abs(got[cut - 1] - expected[3][cut - 1]) > 1e-3
    )


def test_abort_ends_what_is_under_way(client, replica, versions):
    versions.publish(2)
    future = under_way(client, **LONG)
    assert not push_to(versions, replica, 2, mode="abort").failed
    answer = future.result(timeout=SECONDS)
    assert answer["finish_reason"] == "aborted" and len(answer["token_ids"]) < 480
    assert answer["spans"] == [[3, 0, len(answer["token_ids"])]]
    assert generate(client, **{**LONG, "max_tokens": 2})["spans"] == [[2, 0, 2]]


def test_a_client_that_goes_takes_its_request_along(client, replica):
    before = counted(client)
    impatient = httpx.Client(base_url=replica.url, headers=client.headers, trust_env=False)
    with impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/generate", json=LONG, timeout=0.3)
    wait_for(lambda: counted(client)["running"] + counted(client)["waiting"] == 0)
    after = counted(client)
    assert (
        after["requests"] == before["requests"]
        and after["engine_steps"] < before["engine_steps"] + 480
    )


def test_a_killed_pushers_lease_ends_the_pause(client, replica, versions):
    versions.publish(3)
    code = (
        "from opd.weights.push import Push, push_to_servers; push = Push(version=3, fence=1, "
        f"token={TOKEN!r}, lease_s=2.0); push_to_servers([{replica.url!r}], push)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code], env=worker_environment(OPD_FAULT="push.paused:kill")
    )
    future = under_way(client, **LONG)
    wait_for(lambda: client.get("/version").json()["state"] == "paused")
    assert killed.wait(timeout=SECONDS) == -signal.SIGKILL
    answer = future.result(timeout=SECONDS)
    assert answer["spans"] == [[2, 0, 480]] and answer["finish_reason"] == "length"
    assert client.get("/version").json()["weights"] == 2


def test_a_half_loaded_server_is_stale_until_the_next_push(client, replica, versions):
    versions.publish(3, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)})
    future = under_way(client, **LONG)
    with pytest.raises(PushFailed, match="half loaded"):
        push_to(versions, replica, 3)
    assert future.result(timeout=SECONDS)["finish_reason"] == "aborted"
    assert client.get("/version").json()["state"] == "stale"
    answer = client.post("/generate", json={**LONG, "max_tokens": 1})
    assert (answer.status_code, answer.json()) == (503, {"error": "stale"})
    versions.publish(3)
    push_to(versions, replica, 3)
    answer = generate(client, **{**LONG, "max_tokens": 50})
    expected = versions.logprobs(3, LONG["prompt_ids"], answer["token_ids"])
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, atol=1e-5, rtol=0)


def test_one_dead_replica_is_reported_and_the_other_serves(client, replica, versions):
    versions.publish(2)
    push = Push(version=2, fence=versions.fence, token=TOKEN)
    report = push_to_servers(["http://127.0.0.1:9", replica.url], push)
    assert [(r.url, r.ok) for r in report.replicas] == [
        ("http://127.0.0.1:9", False),
        (replica.url, True),
    ]
    assert "ConnectError" in report.failed[0].error
    (versions.root / "v3" / "model-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(PushFailed, match="not what was published"):
        push_to(versions, replica, 3)
    # resumed with what it had
    assert generate(client, **{**LONG, "max_tokens": 2})["spans"] == [[2, 0, 2]]


def test_pushes_under_load_never_mix_versions(client, replica, versions):
    stop, answers = threading.Event(), []

    def ask(seed):
        while not stop.is_set():
            question = {"prompt_ids": [3, 4, 5 + seed], "seed": seed, "max_tokens": 60}
            answers.append(question | generate(client, **question))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, seed) for seed in range(4)]
        try:
            for version in (1, 2, 1, 2):
                versions.publish(version)
                before = len(answers)
                push_to(versions, replica, version)
                wait_for(lambda before=before: len(answers) > before + 2)
        finally:
            stop.set()
        [future.result(timeout=SECONDS) for future in asking]
    assert any(len(answer["spans"]) > 1 for answer in answers)
    for answer in answers:
        assert answer["finish_reason"] == "length"
        assert [s for _, s, _ in answer["spans"]] + [60] == [0] + [e for _, _, e in answer["spans"]]
        got = torch.tensor(answer["logprobs"])
        for version, start, end in answer["spans"]:
            expected = versions.logprobs(version, answer["prompt_ids"], answer["token_ids"])
            torch.testing.assert_close(got[start:end], expected[start:end], atol=2e-5, rtol=0)


def test_a_zombie_is_refused(client, replica, versions):
    versions.fence = 2
    versions.publish(3)
    push_to(versions, replica, 3)
    with pytest.raises(PushFailed, match=r"409.*fence 2"):
        push_to_servers([replica.url], Push(version=3, fence=1, token=TOKEN))
    expected = {"weights": 3, "state": "ready", "fence": 2}
    assert client.get("/version").json() | expected == client.get("/version").json()


def test_it_ends_with_what_it_has_started(client, replica):
    future = under_way(client, **LONG)
    # or it may be answered on a slow machine
    held = client.post("/pause", json={"fence": 2, "lease_s": 60, "mode": "keep"})
    assert held.status_code == 200 and not future.done()
    start = time.monotonic()
    replica.process.send_signal(signal.SIGTERM)
    assert replica.process.wait(timeout=10) == 0
    wait_for(lambda: not processes.members(replica.process.pid), 10 - (time.monotonic() - start))
    print(f"end: {time.monotonic() - start:.2f} s")
    assert future.exception(timeout=SECONDS) is not None


def test_a_server_whose_engine_died_ends(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("OPD_SERVER_TOKEN", raising=False)
    with (
        serving(
            str(tiny.student),
            protocol="rollout",
            weights_dir=tmp_path / "root",
            kv_cache_gib=KV_GIB,
            log_dir=tmp_path,
            start_seconds=300.0,
            extra=("--enforce_eager", "--serve_initial"),
        ) as (replica,),
        httpx.Client(base_url=replica.url, timeout=SECONDS, trust_env=False) as client,
    ):
        assert generate(client, **{**LONG, "max_tokens": 2})["spans"] == [[0, 0, 2]]
        # no token, no control
        assert client.post("/pause", json={"fence": 1, "lease_s": 9}).status_code == 403
        (engine,) = [
            child
            for child in psutil.Process(replica.process.pid).children()
            if "Engine" in child.name()
        ]
        future = under_way(client, **LONG)
        engine.kill()
        assert future.exception(timeout=SECONDS) is not None
        wait_for(lambda: replica.process.poll() is not None, 10)


@pytest.mark.long
def test_each_process_of_a_server_reads_its_part_of_a_push(tiny, versions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_SERVER_TOKEN", TOKEN)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(
            str(tiny.student),
            protocol="rollout",
            weights_dir=versions.root,
            tensor_parallel=2,
            kv_cache_gib=KV_GIB,
            dtype="float32",
            log_dir=tmp_path,
            start_seconds=300.0,
            extra=("--enforce_eager",),
        ) as (replica,),
        httpx.Client(
            base_url=replica.url, headers=headers, timeout=SECONDS, trust_env=False
        ) as client,
    ):
        for version in (1, 2):
            versions.publish(version)
            push_to(versions, replica, version)
            answer = generate(client, prompt_ids=[3, 4, 5], seed=version, max_tokens=30)
            expected = versions.logprobs(version, [3, 4, 5], answer["token_ids"])
            got = torch.tensor(answer["logprobs"])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
            assert answer["spans"] == [[version, 0, 30]]


# ---- Questions that make no sense ----------------------------------------------------------------


RIGHT = {"request_id": "r", "prompt_ids": [1, 2], "seed": 1, "max_tokens": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": []},
        {"prompt_ids": [40]},
        {"prompt_ids": [-1]},
        {"prompt_ids": [True]},
        {"prompt_ids": "12"},
        {"seed": None},
        {"seed": 1.5},
        {"seed": 1 << 63},
        {"max_tokens": 0},
        {"max_tokens": 511},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop_ids": [99]},
        {"with_logprobs": 1},
        {"request_id": 5},
        {"lora": "x"},
    ],
)
def test_a_question_that_makes_no_sense(change):
    read_sampling(RIGHT, vocab_size=VOCAB, max_model_len=CONTEXT)
    with pytest.raises(ValueError, match=next(iter(change))):
        read_sampling(RIGHT | change, vocab_size=VOCAB, max_model_len=CONTEXT)
