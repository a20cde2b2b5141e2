"""The launcher of servers: what it prints, what it refuses, who is started again, and that nothing
is left when it ends.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import yaml
from transformers import Qwen3ForCausalLM

import train_mopd
from opd import processes
from opd.clients import wire
from opd.inputs.arguments import parse
from opd.servers import launch
from opd.servers.server_processes import StartError, serving
from opd.weights import store
from opd.weights.push import Push, push_to_servers
from tests.support.processes import LOOPBACK, ROOT, listening_addresses, worker_environment

DEADLINE = 300.0
GONE_SECONDS = 10.0
SMALL = ["--max_logprobs", "40", "--kv_cache_gib", "0.05"]
TOKEN = "a-token-of-more-than-16-characters"
TEACHER = (sys.executable, "-m", "opd.servers.launch", "teacher")


def wait_until(done, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


@contextmanager
def launched(tmp_path, *arguments: str, command: tuple[str, ...] = TEACHER, **environment: str):
    """(process, its stdout, its stderr) of the launcher; killed at the end if it still runs."""
    out, err = tmp_path / "out", tmp_path / "err"
    at = arguments.index("--") if "--" in arguments else len(arguments)
    words = [*command, *arguments[:at], "--log_dir", str(tmp_path / "logs"), *arguments[at:]]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            words, stdout=stdout, stderr=stderr, env=worker_environment(**environment), cwd=ROOT
        )
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
    assert process.poll() is None, out.with_name("err").read_text()


def ended(process, signum: int, groups: list[int]) -> None:
    """The launcher, by a signal, and all that it has started."""
    assert groups and all(processes.members(group) for group in groups)
    process.send_signal(signum)
    assert process.wait(GONE_SECONDS) == 0
    assert not any(processes.members(group) for group in groups)


# ---- Process groups ------------------------------------------------------------------------------

FAMILY = "sleep 300 & trap '' TERM; sleep 300; true"  # a leader that ignores SIGTERM, with children


def start_family(tmp_path) -> subprocess.Popen:
    process = processes.spawn(["bash", "-c", FAMILY], log=tmp_path / "log", env=dict(os.environ))
    wait_until(lambda: len(processes.members(process.pid)) == 3, DEADLINE, "the family")
    return process


def test_a_leader_that_is_killed_takes_its_group_along(tmp_path):
    process = start_family(tmp_path)
    process.kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    wait_until(lambda: not processes.members(process.pid), GONE_SECONDS, "the guard")


def test_a_group_that_ignores_sigterm_is_ended_by_force(tmp_path):
    process = start_family(tmp_path)
    processes.end(process.pid, 0.3)
    assert process.wait(DEADLINE) == -signal.SIGKILL
    assert not processes.members(process.pid)
    processes.end(process.pid)  # what has ended is no error


def test_a_parent_that_is_killed_leaves_nothing(tmp_path):
    program = (
        "import os, sys, time, pathlib; from opd import processes\n"
        f"p = processes.spawn(['bash', '-c', {FAMILY!r}], log=pathlib.Path(sys.argv[1]), "
        f"env=dict(os.environ))\n"
        "print(p.pid, flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=worker_environment()
    ) as parent:
        group = int(parent.stdout.readline())
        wait_until(lambda: len(processes.members(group)) == 3, DEADLINE, "the family")
        parent.kill()
    wait_until(lambda: not processes.members(group), GONE_SECONDS, "the guard")
    assert parent.returncode == -signal.SIGKILL


# ---- Mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "no role": ([], "expected teacher, rollout, logprob first"),
    "an unknown role": (["MODEL"], "expected teacher, rollout, logprob first"),
    "no model": (["teacher"], "model"),
    "not a model": (["teacher", "/nowhere/at/all"], "no such model directory"),
    "a host": (["rollout", "MODEL", "--host", "0.0.0.0"], "ssh -L"),
    "a host for the server": (["teacher", "MODEL", "--", "--host=0.0.0.0"], "ssh -L"),
    "no replicas": (["teacher", "MODEL", "--replicas", "0"], "--replicas 0"),
    "no context": (
        ["rollout", "MODEL", "--weights_dir", "NEW", "--max_model_len", "0"],
        "--max_model_len 0",
    ),
    "an unknown protocol": (["teacher", "MODEL", "--protocol", "pickle"], "pickle"),
    "an unknown flag": (["teacher", "MODEL", "--replica", "2"], "--replica"),
    "a flag of another role": (
        ["logprob", "MODEL", "--weights_dir", "NEW", "--kv_cache_gib", "1"],
        "--kv_cache_gib",
    ),
    "tensor parallel hidden states": (
        ["teacher", "MODEL", "--tensor_parallel", "2"],
        "use --protocol json",
    ),
    "a GPU twice": (["teacher", "MODEL", "--gpus", "0,0"], "twice"),
    "too few GPUs": (["teacher", "MODEL", "--gpus", "0,1", "--replicas", "3"], "needs 3 GPUs"),
    "too few GPUs to sample": (
        ["rollout", "MODEL", "--weights_dir", "NEW", "--tensor_parallel", "3"],
        "needs 3 GPUs",
    ),
    "no folder of weights": (["rollout", "MODEL"], "--weights_dir"),
    "a folder for all": (
        ["logprob", "MODEL", "--weights_dir", "OPEN"],
        "--weights_dir .*open: must belong.*chmod",
    ),
    "a link": (
        ["rollout", "MODEL", "--weights_dir", "LINK"],
        "--weights_dir .*link: not a directory, or a link",
    ),
    "a file": (
        ["logprob", "MODEL", "--weights_dir", "FILE"],
        "--weights_dir .*file: not a directory, or a link",
    ),
}


@pytest.fixture
def words(tiny, tmp_path):
    """What stands for paths in the arguments of a mistake."""
    paths = {word: tmp_path / word.lower() for word in ("NEW", "OPEN", "LINK", "FILE")}
    paths["OPEN"].mkdir()
    paths["OPEN"].chmod(0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    paths["LINK"].symlink_to(tmp_path / "own")
    paths["FILE"].touch()
    return paths | {"MODEL": tiny.addition}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_value_error_of_one_line(words, monkeypatch, mistake):
    arguments, says = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("OPD_SERVER_TOKEN", TOKEN)
    with pytest.raises(ValueError, match=says) as error:
        launch.launch_arguments([str(words.get(word, word)) for word in arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("token", "says"), [(None, "openssl rand"), ("short", "take at least 16")])
@pytest.mark.parametrize("role", ["rollout", "logprob"])
def test_weights_are_pushed_with_a_token_only(words, monkeypatch, role, token, says):
    arguments = [role, str(words["MODEL"]), "--weights_dir", str(words["NEW"])]
    monkeypatch.delenv("OPD_SERVER_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("OPD_SERVER_TOKEN", token)
    with pytest.raises(ValueError, match=says):
        launch.launch_arguments(arguments)
    assert not words["NEW"].exists()
    monkeypatch.setenv("OPD_SERVER_TOKEN", TOKEN)
    assert launch.launch_arguments(arguments).weights_dir == words["NEW"]
    assert words["NEW"].stat().st_mode & 0o777 == 0o700


LAST_WORDS = {
    "teacher": (["--gpus", "0"], "error: --gpus 0: no GPU is visible here"),
    "logprob": (["--weights_dir", "NEW"], "error: OPD_SERVER_TOKEN is not set: "),
}


@pytest.mark.parametrize("role", LAST_WORDS)
def test_a_mistake_ends_the_script_with_status_2(words, role):
    flags, says = LAST_WORDS[role]
    environment = worker_environment()
    environment.pop("OPD_SERVER_TOKEN", None)
    run = subprocess.run(
        [
            "bash",
            "scripts/serve.sh",
            role,
            *(str(words.get(word, word)) for word in ("MODEL", *flags)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.splitlines()[-1].startswith(says)


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.deal_gpus(None, 2) == ["0", "1"]
    assert launch.deal_gpus("3,1", 2) == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert launch.deal_gpus(None, 2) == ["5", "6"]


URL = "http://127.0.0.1:1"


@pytest.mark.parametrize("name", ["math", "true", "7", "a: b", 'quo"te', "ä", "-x"])
def test_the_entry_is_yaml_that_says_the_same(tiny, name):
    args = launch.launch_arguments(["teacher", str(tiny.addition), f"--name={name}"])
    expected = {"name": name, "model": str(tiny.addition), "backend": "server", "urls": [URL]}
    assert yaml.safe_load(launch.entry(args, [URL])) == {"teachers": [expected]}


def test_a_server_that_does_not_come_up_says_why(tiny, tmp_path):
    with (
        pytest.raises(StartError, match=r"status 2 before it was ready.*\n.*--max_model_len 9999"),
        serving(str(tiny.addition), log_dir=tmp_path, extra=["--max_model_len", "9999"]),
    ):
        pass


# ---- Servers -------------------------------------------------------------------------------------


def test_two_replicas_are_served_and_watched(tiny, tmp_path):
    """The whole life of a launcher: the entry, one replica dies, then the other."""
    arguments = (
        str(tiny.addition),
        "--replicas",
        "2",
        "--name",
        "sums",
        *SMALL,
        "--",
        "--backend",
        "hf",
    )
    with launched(tmp_path, *arguments) as (process, out, err):
        ready(process, out)
        text = out.read_text()
        (entry,) = yaml.safe_load(text)["teachers"]
        urls = ", ".join(f'"{url}"' for url in entry["urls"])
        assert (
            text == f"teachers:\n  - "
            f"{{name: sums, model: {tiny.addition}, backend: server, urls: [{urls}]}}\n"
        )
        assert len(set(entry["urls"])) == 2
        for url in entry["urls"]:
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "sums"
            assert httpx.get(f"{url}/info").json()["max_support_k"] == 40
        first, second = sorted(pid for pid in children_of(process.pid))
        os.kill(first, signal.SIGKILL)
        wait_until(
            lambda: "died with status -9, 1 left" in err.read_text(), DEADLINE, "word of the death"
        )
        assert process.poll() is None
        os.kill(second, signal.SIGKILL)
        assert process.wait(DEADLINE) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_servers_that_are_starting(tiny, tmp_path, signum):
    arguments = (str(tiny.addition), "--replicas", "2", *SMALL, "--", "--backend", "hf")
    with launched(tmp_path, *arguments) as (process, out, _):
        wait_until(lambda: len(children_of(process.pid)) == 2, DEADLINE, "the servers")
        ended(process, signum, children_of(process.pid))
        assert not out.read_text(), "it names servers that are not there"


def test_rollout_servers_are_served(tiny, tmp_path):
    weights = tmp_path / "a folder" / "weights"
    arguments = (
        str(tiny.student),
        "--weights_dir",
        str(weights),
        "--max_model_len",
        "64",
        "--kv_cache_gib",
        "0.03",
    )
    command = ("bash", "scripts/serve.sh", "rollout")
    with launched(
        tmp_path, *arguments, "--", "--enforce_eager", command=command, OPD_SERVER_TOKEN=TOKEN
    ) as (process, out, _):
        ready(process, out)
        (url,) = yaml.safe_load(out.read_text())["rollout_servers"]
        assert out.read_text() == f'rollout_servers: ["{url}"]\nweights_dir: "{weights}"\n'
        required = "student_model: s\ndata: [d.jsonl]\noutput_dir: o\n"
        (tmp_path / "run.yaml").write_text(required + out.read_text())
        ahead = parse(train_mopd.Config, ["--config", str(tmp_path / "run.yaml")]).ahead
        assert (ahead.rollout_servers, ahead.weights_dir) == ([url], str(weights))
        assert weights.stat().st_mode & 0o777 == 0o700
        asked = {"url": f"{url}/version", "timeout": DEADLINE, "trust_env": False}
        assert httpx.get(**asked).status_code == 401
        said = httpx.get(**asked, headers={"Authorization": f"Bearer {TOKEN}"}).json()
        assert (said["protocol"], said["state"]) == ("opd-rollout-1", "stale")
        groups = children_of(process.pid)
        assert len(processes.members(*groups)) > 1  # the engine has processes of its own
        ended(process, signal.SIGTERM, groups)


# ---- Started again -------------------------------------------------------------------------------


def test_early_deaths_are_counted_and_late_ones_forgiven():
    restarts = launch.Restarts(ready_at=100.0)
    assert restarts.died(100.0 + launch.EARLY_SECONDS) == 1.0  # late
    assert restarts.died(200.0) == 1.0  # it has not been ready
    restarts.ready_at = 300.0
    assert restarts.died(301.0) == 2.0
    restarts.ready_at = 400.0
    assert restarts.died(400.0 + launch.EARLY_SECONDS) == 1.0  # the count begins again
    assert [restarts.died(500.0) for _ in range(launch.EARLY_DEATHS)] == [1.0, 2.0, None]


def kill_and_wait_for_its_successor(process, err, url: str) -> None:
    (leader,) = children_of(process.pid)
    back = err.read_text().count("is back")
    os.kill(leader, signal.SIGKILL)
    wait_until(
        lambda: err.read_text().count("is back") > back or process.poll() is not None,
        DEADLINE,
        "the next one",
    )
    assert process.poll() is None, err.read_text()
    (successor,) = children_of(process.pid)
    assert successor != leader and not processes.members(leader)
    assert f"{url} is back: process {successor}\n" in err.read_text()


@pytest.mark.long
def test_a_log_prob_server_comes_back_stale_and_takes_a_push(tiny, tmp_path):
    weights, headers = tmp_path / "weights", {"Authorization": f"Bearer {TOKEN}"}
    arguments = (
        str(tiny.student),
        "--weights_dir",
        str(weights),
        "--dtype",
        "float32",
        "--restart",
    )
    command = ("bash", "scripts/serve.sh", "logprob")
    with launched(tmp_path, *arguments, command=command, OPD_SERVER_TOKEN=TOKEN) as (
        process,
        out,
        err,
    ):
        ready(process, out)
        (url,) = yaml.safe_load(out.read_text())["logprob_servers"]
        assert out.read_text() == f'logprob_servers: ["{url}"]\n'
        store.publish(
            weights, Qwen3ForCausalLM.from_pretrained(tiny.student).named_parameters(), 7, 1
        )
        for last in (False, True):
            said = httpx.get(
                f"{url}/version", headers=headers, timeout=DEADLINE, trust_env=False
            ).json()
            assert (said["protocol"], said["state"]) == ("opd-logprob-1", "stale")
            assert not push_to_servers([url], Push(version=7, fence=1, token=TOKEN)).failed
            if not last:
                kill_and_wait_for_its_successor(process, err, url)
        ended(process, signal.SIGTERM, children_of(process.pid))


@pytest.mark.long
def test_a_teacher_that_cannot_start_again_is_given_up(tiny, tmp_path):
    """The first death is made good; then the model is gone."""
    model = shutil.copytree(tiny.addition, tmp_path / "model")
    with launched(tmp_path, str(model), "--restart", *SMALL, "--", "--backend", "hf") as (
        process,
        out,
        err,
    ):
        ready(process, out)
        (url,) = yaml.safe_load(out.read_text())["teachers"][0]["urls"]
        kill_and_wait_for_its_successor(process, err, url)
        assert (
            httpx.get(f"{url}/info", timeout=DEADLINE, trust_env=False).json()["max_support_k"]
            == 40
        )
        shutil.rmtree(model)
        os.kill(*children_of(process.pid), signal.SIGKILL)
        assert process.wait(DEADLINE) == 1
        assert (
            "died with status 2, 0 left; given up: its last 3 deaths came early" in err.read_text()
        )


@pytest.fixture(scope="module")
def json_launcher(tiny, tmp_path_factory):
    arguments = (str(tiny.addition), "--protocol", "json", *SMALL, "--", "--enforce-eager")
    with launched(tmp_path_factory.mktemp("json"), *arguments) as (process, out, _):
        ready(process, out)
        (entry,) = yaml.safe_load(out.read_text())["teachers"]
        yield process, entry["urls"][0]


@pytest.fixture(scope="module")
def binary(tiny, tmp_path_factory):
    logs = tmp_path_factory.mktemp("binary")
    # an earlier run's: nobody is there
    (logs / "server_0.log").write_text("serving addition at http://127.0.0.1:1\n")
    with serving(
        str(tiny.addition), extra=["--backend", "hf"], log_dir=logs, start_seconds=DEADLINE
    ) as (replica,):
        yield replica


@pytest.mark.parametrize("payload", ["sampled", "topk"])
def test_both_protocols_say_the_same(json_launcher, binary, payload):
    asked = wire.Question(
        [5, 6, 7], [8, 9, 10, 11, 3], payload, 6 if payload == "topk" else 0, vocab=40
    )
    body = wire.completion_request(asked, "addition")
    from_json = httpx.post(f"{json_launcher[1]}/v1/completions", json=body, timeout=DEADLINE)
    params = {"prompt_length": 3, "payload": payload, "support_k": asked.support_k}
    ids = wire.encode_ids([*asked.prompt_ids, *asked.response_ids])
    from_binary = httpx.post(f"{binary.url}/score", params=params, content=ids, timeout=DEADLINE)
    expected = wire.decode_scores(from_binary.content, asked)
    found = wire.decode_completion(from_json.content, asked)
    assert set(found) == {"sampled_logprobs"} | (
        {"topk_ids", "topk_logprobs"} if payload == "topk" else set()
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)


def test_a_replica_starts_again_at_its_port(binary):
    url, process = binary.url, binary.process
    binary.restart()  # it lives, and is ended first
    assert process.poll() is not None and binary.process.pid != process.pid
    assert not binary.is_ready() and "serving" not in binary.last_lines(), (
        "what its predecessor wrote counts as its own"
    )
    binary.wait_until_ready(DEADLINE)
    assert binary.url == url and binary.is_ready()


def test_vllms_server_has_no_control_routes_and_no_open_socket(json_launcher):
    process, url = json_launcher
    for route in ("/collective_rpc", "/sleep", "/pause", "/update_weights", "/reset_prefix_cache"):
        assert httpx.post(url + route).status_code == 404
    (leader,) = children_of(process.pid)
    members = processes.members(leader)
    assert len(members) > 2  # the engine has processes of its own
    found = set().union(*(listening_addresses(pid) for pid in members))
    assert found and found <= LOOPBACK


def test_nothing_is_left_after_a_sigkill_of_the_launcher(json_launcher):
    """The last test of this file. vLLM's engine would live on: it does not notice that its API
    server is gone.
    """
    process, _ = json_launcher
    (leader,) = children_of(process.pid)
    assert len(processes.members(leader)) > 2
    process.kill()
    process.wait(DEADLINE)
    wait_until(lambda: not processes.members(leader), GONE_SECONDS, "the servers")
