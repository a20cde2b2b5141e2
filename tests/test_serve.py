"""The launcher of teacher servers: what it prints, what it refuses, and that nothing is left when it ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import yaml
from conftest import LOOPBACK, ROOT, listening_addresses, worker_environment

from opd import process_group, serve, wire
from opd.replicas import StartError, serving

DEADLINE = 180.0
GONE_SECONDS = 10.0
SMALL = ["--max_logprobs", "40", "--kv_cache_gib", "0.05"]


def wait_until(done, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


@contextmanager
def launched(tmp_path, *arguments: str):
    """(process, its stdout, its stderr) of the launcher; killed at the end if it still runs."""
    out, err = tmp_path / "out", tmp_path / "err"
    command = [sys.executable, "-m", "opd.serve", *arguments, "--log_dir", str(tmp_path / "logs")]
    if "--" in arguments:
        at = arguments.index("--")
        command = [*command[:3], *arguments[:at], "--log_dir", str(tmp_path / "logs"), *arguments[at:]]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=worker_environment(), cwd=ROOT)
    try:
        yield process, out, err
    finally:
        process.kill()
        process.wait(DEADLINE)


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def ready(process, out) -> None:
    wait_until(lambda: out.read_text() or process.poll() is not None, DEADLINE, "the entry")
    assert process.poll() is None


# ---- Process groups --------------------------------------------------------------------------------------------------

FAMILY = "sleep 300 & trap '' TERM; sleep 300; true"  # a leader that ignores SIGTERM, with children


def start_family(tmp_path) -> subprocess.Popen:
    process = process_group.start(["bash", "-c", FAMILY], log=tmp_path / "log", env=dict(os.environ))
    wait_until(lambda: len(process_group.members(process.pid)) == 3, DEADLINE, "the family")
    return process


def test_a_leader_that_is_killed_takes_its_group_along(tmp_path):
    process = start_family(tmp_path)
    process.kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    wait_until(lambda: not process_group.members(process.pid), GONE_SECONDS, "the guard")


def test_a_group_that_ignores_sigterm_is_ended_by_force(tmp_path):
    process = start_family(tmp_path)
    process_group.end(process.pid, 0.3)
    assert process.wait(DEADLINE) == -signal.SIGKILL
    assert not process_group.members(process.pid)
    process_group.end(process.pid)  # what has ended is no error


def test_a_parent_that_is_killed_leaves_nothing(tmp_path):
    program = (
        "import os, sys, time, pathlib; from opd import process_group\n"
        f"p = process_group.start(['bash', '-c', {FAMILY!r}], log=pathlib.Path(sys.argv[1]), env=dict(os.environ))\n"
        "print(p.pid, flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=worker_environment()) as parent:
        group = int(parent.stdout.readline())
        wait_until(lambda: len(process_group.members(group)) == 3, DEADLINE, "the family")
        parent.kill()
    wait_until(lambda: not process_group.members(group), GONE_SECONDS, "the guard")


# ---- Mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no model": ([], "model"),
    "not a model": (["/nowhere/at/all"], "no such model directory"),
    "a host": (["MODEL", "--host", "0.0.0.0"], "ssh -L"),
    "a host for the server": (["MODEL", "--", "--host=0.0.0.0"], "ssh -L"),
    "no replicas": (["MODEL", "--replicas", "0"], "--replicas 0"),
    "an unknown protocol": (["MODEL", "--protocol", "pickle"], "pickle"),
    "an unknown flag": (["MODEL", "--replica", "2"], "--replica"),
    "tensor parallel hidden states": (["MODEL", "--tensor_parallel", "2"], "use --protocol json"),
    "a GPU twice": (["MODEL", "--gpus", "0,0"], "twice"),
    "too few GPUs": (["MODEL", "--gpus", "0,1", "--replicas", "3"], "needs 3 GPUs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_value_error_of_one_line(tiny, monkeypatch, mistake):
    arguments, says = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=says) as error:
        serve.parse_arguments([str(tiny.addition) if word == "MODEL" else word for word in arguments])
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_script_with_status_2(tiny):
    command = ["bash", "scripts/serve_teacher.sh", str(tiny.addition), "--gpus", "0"]
    environment = worker_environment()
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: --gpus 0: no GPU is visible here")


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert serve.deal_gpus(None, 2) == ["0", "1"]
    assert serve.deal_gpus("3,1", 2) == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert serve.deal_gpus(None, 2) == ["5", "6"]


@pytest.mark.parametrize("name", ["math", "true", "7", "a: b", 'quo"te', "ä", "-x"])
def test_the_entry_is_yaml_that_says_the_same(name):
    entry = yaml.safe_load(serve.yaml_entry(name, "models/math", ["http://127.0.0.1:1"]))["teachers"]
    assert entry == [{"name": name, "model": "models/math", "backend": "server", "urls": ["http://127.0.0.1:1"]}]


def test_a_server_that_does_not_come_up_says_why(tiny, tmp_path):
    with (
        pytest.raises(StartError, match=r"status 2 before it was ready.*\n.*--max_model_len 9999"),
        serving(str(tiny.addition), log_dir=tmp_path, extra=["--max_model_len", "9999"]),
    ):
        pass


# ---- Servers ---------------------------------------------------------------------------------------------------------


def test_two_replicas_are_served_and_watched(tiny, tmp_path):
    """The whole life of a launcher: the entry, one replica dies, then the other."""
    arguments = (str(tiny.addition), "--replicas", "2", "--name", "sums", *SMALL, "--", "--backend", "hf")
    with launched(tmp_path, *arguments) as (process, out, err):
        ready(process, out)
        text = out.read_text()
        (entry,) = yaml.safe_load(text)["teachers"]
        urls = ", ".join(f'"{url}"' for url in entry["urls"])
        assert text == f"teachers:\n  - {{name: sums, model: {tiny.addition}, backend: server, urls: [{urls}]}}\n"
        assert len(set(entry["urls"])) == 2
        for url in entry["urls"]:
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "sums"
            assert httpx.get(f"{url}/info").json()["max_support_k"] == 40
        first, second = sorted(pid for pid in children_of(process.pid))
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: "died with status -9, 1 left" in err.read_text(), DEADLINE, "word of the death")
        assert process.poll() is None
        os.kill(second, signal.SIGKILL)
        assert process.wait(DEADLINE) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_servers_that_are_starting(tiny, tmp_path, signum):
    arguments = (str(tiny.addition), "--replicas", "2", *SMALL, "--", "--backend", "hf")
    with launched(tmp_path, *arguments) as (process, _, _):
        wait_until(lambda: len(children_of(process.pid)) == 2, DEADLINE, "the servers")
        groups = children_of(process.pid)
        process.send_signal(signum)
        assert process.wait(GONE_SECONDS) == 0
        assert not any(process_group.members(group) for group in groups)


@pytest.fixture(scope="module")
def json_launcher(tiny, tmp_path_factory):
    arguments = (str(tiny.addition), "--protocol", "json", *SMALL, "--", "--enforce-eager")
    with launched(tmp_path_factory.mktemp("json"), *arguments) as (process, out, _):
        ready(process, out)
        (entry,) = yaml.safe_load(out.read_text())["teachers"]
        yield process, entry["urls"][0]


@pytest.fixture(scope="module")
def binary(tiny):
    with serving(str(tiny.addition), extra=["--backend", "hf"]) as (replica,):
        yield replica


@pytest.mark.parametrize("payload", ["sampled", "topk"])
def test_both_protocols_say_the_same(json_launcher, binary, payload):
    asked = wire.Question([5, 6, 7], [8, 9, 10, 11, 3], payload, 6 if payload == "topk" else 0, vocab=40)
    body = wire.completion_request(asked, "addition")
    from_json = httpx.post(f"{json_launcher[1]}/v1/completions", json=body, timeout=DEADLINE)
    params = {"prompt_length": 3, "payload": payload, "support_k": asked.support_k}
    ids = wire.encode_ids([*asked.prompt_ids, *asked.response_ids])
    from_binary = httpx.post(f"{binary.url}/score", params=params, content=ids, timeout=DEADLINE)
    expected = wire.decode_scores(from_binary.content, asked)
    found = wire.decode_completion(from_json.content, asked)
    assert set(found) == {"sampled_logprobs"} | ({"topk_ids", "topk_logprobs"} if payload == "topk" else set())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)


def test_vllms_server_has_no_control_routes_and_no_open_socket(json_launcher):
    process, url = json_launcher
    for route in ("/collective_rpc", "/sleep", "/pause", "/update_weights", "/reset_prefix_cache"):
        assert httpx.post(url + route).status_code == 404
    (leader,) = children_of(process.pid)
    members = process_group.members(leader)
    assert len(members) > 2  # the engine has processes of its own
    found = set().union(*(listening_addresses(pid) for pid in members))
    assert found and found <= LOOPBACK


def test_nothing_is_left_after_a_sigkill_of_the_launcher(json_launcher):
    """The last test of this file. vLLM's engine would live on: it does not notice that its API server is gone."""
    process, _ = json_launcher
    (leader,) = children_of(process.pid)
    assert len(process_group.members(leader)) > 2
    process.kill()
    process.wait(DEADLINE)
    wait_until(lambda: not process_group.members(leader), GONE_SECONDS, "the servers")
