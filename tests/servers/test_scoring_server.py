"""The scoring server: real processes, asked over HTTP, against the engines of this process and
against whoever attacks it.
"""

import asyncio
import pickle
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch

from opd import processes
from opd.clients import wire
from opd.config import LossConfig, TeacherSpec
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.inputs.content import content_hash
from opd.ops.heads import load_head
from opd.servers import scoring_engine
from opd.servers.http_service import check_host
from opd.servers.scoring_server import ModelInfo, ScoringService
from opd.servers.server_processes import ServerOptions, start_replica, stop_all
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import Prompt, Rollout
from tests.support.models import PADDED_VOCAB
from tests.support.processes import LOOPBACK, leave_vllm, listening_addresses, worker_environment
from tests.support.turns import one_after_another

SHARED_VOCAB, HIDDEN, CONTEXT, K = 40, 96, 512, 5
TOKEN = "a-token-of-more-than-16-characters"
BACKENDS = ("hf", "vllm")
PAYLOADS = ("sampled", "topk", "hidden", "topk+hidden")
DEADLINE = 120.0
TOLERANCE = 2e-5


def question(
    payload="topk", lengths=(5, 7), *, seed=0, vocab=SHARED_VOCAB, temperature=1.0
) -> wire.Question:
    rng = random.Random(seed)
    prompt_ids, response_ids = (
        [rng.randrange(2, SHARED_VOCAB) for _ in range(length)] for length in lengths
    )
    k = K if "topk" in payload else 0
    return wire.Question(prompt_ids, response_ids, payload, k, vocab, temperature, HIDDEN)


def query(asked: wire.Question) -> dict:
    return {
        "prompt_length": len(asked.prompt_ids),
        "payload": asked.payload,
        "support_k": asked.support_k,
        "temperature": asked.temperature,
        "vocab": asked.vocab,
    }


def body_of(asked: wire.Question) -> bytes:
    return wire.encode_ids([*asked.prompt_ids, *asked.response_ids])


def ask(url: str, asked: wire.Question) -> dict[str, torch.Tensor]:
    answer = httpx.post(
        f"{url}/score", params=query(asked), content=body_of(asked), timeout=DEADLINE
    )
    assert answer.status_code == 200, answer.text
    return wire.decode_scores(answer.content, asked)


def metric(url: str, name: str, **options) -> int:
    lines = httpx.get(f"{url}/metrics", timeout=DEADLINE, **options).text.splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


@pytest.fixture(scope="module")
def replicas(tiny, tmp_path_factory):
    """One server of the padded model per backend, and a slow one behind a token."""
    logs = tmp_path_factory.mktemp("scoring")
    extra = {backend: ["--backend", backend] for backend in BACKENDS}
    extra["closed"] = ["--backend", "hf", "--batch_wait_ms", "1500", "--max_waiting", "2"]
    found = {}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.callback(lambda: stop_all(list(found.values())))
        for name, flags in extra.items():
            if name == "closed":
                patch.setenv("OPD_SERVER_TOKEN", TOKEN)
            options = ServerOptions(
                model=str(tiny.padded), name="math", kv_cache_gib=0.05, extra=flags
            )
            found[name] = start_replica(options, logs / f"{name}.log")
        found["closed"].wait_until_ready(DEADLINE)
        patch.delenv("OPD_SERVER_TOKEN")
        for backend in BACKENDS:
            found[backend].wait_until_ready(DEADLINE)
        yield found


@pytest.fixture(scope="module")
def urls(replicas):
    return {name: replica.url for name, replica in replicas.items()}


@pytest.fixture(scope="module")
def engines(tiny, device):
    """The same engines in this process."""
    options = {"dtype": "float32", "trust_remote_code": False}
    model = str(tiny.padded)
    vllm = {"tokenizer": model, "max_model_len": CONTEXT, "kv_cache_gib": 0.05, "residency": "gpu"}
    yield {
        "hf": HFEngine("math", model, residency="gpu", **options),
        "vllm": HiddenStateEngine("math", model, **vllm, **options),
    }
    leave_vllm()


# ---- What it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vocab", "temperature"), [(SHARED_VOCAB, 1.0), (PADDED_VOCAB, 0.7)])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_it_says_what_a_colocated_teacher_says(
    urls, engines, tiny, backend, payload, vocab, temperature
):
    asked = question(payload, vocab=vocab, temperature=temperature)
    spec = TeacherSpec(name="math", model=str(tiny.padded), domains=("any",))
    members = [ColocatedTeacher(spec, engines[backend], load_head(spec.model))]
    pool = TeacherPool(
        members,
        {"any": (("math", 1.0),)},
        LossConfig(support_k=K, loss_temperature=temperature),
        payload=payload,
        cache_bytes=1 << 30,
        shared_vocab=vocab,
        device=torch.device("cpu"),
        turns=one_after_another(members),
    )
    prompt = Prompt(prompt_id=0, domain="any", token_ids=asked.prompt_ids)
    rollout = Rollout(
        sample_id="0/0/0",
        prompt=prompt,
        source="student",
        response_ids=asked.response_ids,
        rollout_logprobs=None,
        finish_reason="stop",
        policy_version=0,
    )
    ((expected,),) = pool.score([rollout])
    answer = ask(urls[backend], asked)
    assert answer.keys() == asked.shapes.keys()
    for name, value in answer.items():
        torch.testing.assert_close(value, getattr(expected, name), atol=TOLERANCE, rtol=TOLERANCE)


def test_vocab_cuts_the_padding_off(urls):
    """The padded rows are random and large: they stand in the top-k unless they are cut off."""
    whole, cut = (
        ask(urls["hf"], question(vocab=vocab, lengths=(5, 40)))
        for vocab in (PADDED_VOCAB, SHARED_VOCAB)
    )
    assert int(whole["topk_ids"].max()) >= SHARED_VOCAB > int(cut["topk_ids"].max())
    assert (whole["logsumexp"] > cut["logsumexp"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_empty_response_has_empty_scores(urls, backend, payload):
    answer = ask(urls[backend], question(payload, lengths=(4, 0)))
    assert answer and all(len(value) == 0 for value in answer.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_at_once_are_batched_and_answered_each_for_itself(urls, backend):
    rng = random.Random(1)
    asked = [
        question(
            PAYLOADS[i % 4],
            (rng.randint(1, 60), rng.randint(0, 90)),
            seed=i,
            vocab=(40, 64)[i % 2],
            temperature=(1.0, 0.5, 2.0)[i % 3],
        )
        for i in range(48)
    ]
    alone = [ask(urls[backend], one) for one in asked]
    before = metric(urls[backend], "opd_batches_total")

    async def all_at_once():
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            posts = [
                client.post(f"{urls[backend]}/score", params=query(a), content=body_of(a))
                for a in asked
            ]
            return await asyncio.gather(*posts)

    answers = asyncio.run(all_at_once())
    assert metric(urls[backend], "opd_batches_total") - before < len(asked) / 2
    for one, answer, expected in zip(asked, answers, alone, strict=True):
        found = wire.decode_scores(answer.content, one)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_one_sequence_a_batch_the_bits_do_not_depend_on_the_others(engines, tiny, backend):
    scorer = scoring_engine.Scorer(engines[backend], load_head(str(tiny.padded)), torch.float32)
    asked = [question("topk+hidden", (3 + i, 40 - i), seed=i) for i in range(12)]
    alone = [scorer.score([one])[0] for one in asked]
    thread = scoring_engine.ScoringThread(lambda: scorer, scoring_engine.BatchLimits(sequences=1))
    bodies = [answer.result(DEADLINE) for answer in [thread.submit(one) for one in asked]]
    assert thread.batches == len(asked)
    for one, body, expected in zip(asked, bodies, alone, strict=True):
        answer = wire.decode_scores(body, one)
        assert all(torch.equal(answer[name], expected[name]) for name in answer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_introduces_itself(urls, tiny, tokenizer, backend):
    url = urls[backend]
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/version").json() == {"version": "1", "protocol": "opd-scoring-1"}
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == (
        "math",
        str(tiny.padded),
        CONTEXT,
    )
    assert httpx.get(f"{url}/info").json() == {
        "content": content_hash(str(tiny.padded)),
        "vocab_size": PADDED_VOCAB,
        "hidden_size": HIDDEN,
        "eos_ids": [tokenizer.eos_token_id],
        "max_support_k": PADDED_VOCAB,
        "max_model_len": CONTEXT,
        "dtype": "float32",
        "logit_scale": 1.0,
        "logit_softcap": None,
        "has_bias": False,
        "sees": False,
    }
    tokens = httpx.post(
        f"{url}/tokenize", json={"prompt": "12+30=", "add_special_tokens": False}
    ).json()["tokens"]
    assert tokens == tokenizer.encode("12+30=", add_special_tokens=False)


def test_the_head_is_that_of_the_checkpoint(urls, tiny):
    head = safetensors.torch.load(httpx.get(f"{urls['hf']}/head").content)
    assert head.keys() == {"weight_VH"}
    assert torch.equal(head["weight_VH"], load_head(str(tiny.padded)).weight_VH)


# ---- Mistakes ------------------------------------------------------------------------------------

IDS = wire.encode_ids([5, 6, 7, 8])
GOOD = {
    "prompt_length": 2,
    "payload": "topk",
    "support_k": 3,
    "temperature": 1.0,
    "vocab": SHARED_VOCAB,
}
MISTAKES = {
    "no payload": ({"payload": None}, IDS, "payload"),
    "unknown payload": ({"payload": "logits"}, IDS, "payload"),
    "no ids": ({}, b"", "0 bytes"),
    "half an id": ({}, IDS[:-1], "15 bytes"),
    "an id outside": ({}, wire.encode_ids([5, 6, PADDED_VOCAB]), "outside the vocabulary"),
    "a negative id": ({}, wire.encode_ids([5, 6, -1]), "outside the vocabulary"),
    "a response beyond vocab": ({}, wire.encode_ids([5, 6, SHARED_VOCAB]), "outside the 40"),
    "no prompt": ({"prompt_length": 0}, IDS, "prompt_length=0"),
    "a prompt that is longer": ({"prompt_length": 5}, IDS, "prompt_length=5"),
    "a prompt that is no number": ({"prompt_length": "x"}, IDS, "prompt_length"),
    "no support": ({"support_k": 0}, IDS, "support_k=0"),
    "a support beyond vocab": ({"support_k": 41}, IDS, "must be 1 to 40"),
    "a support for nothing": ({"payload": "hidden"}, IDS, "has no support"),
    "cold": ({"temperature": 0}, IDS, "temperature"),
    "not a temperature": ({"temperature": "nan"}, IDS, "temperature"),
    "an infinite temperature": ({"temperature": "inf"}, IDS, "temperature"),
    "a vocabulary beyond the head": ({"vocab": 65}, IDS, "vocab=65"),
    "no vocabulary": ({"vocab": 0}, IDS, "vocab=0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_400_with_one_line(urls, mistake):
    changes, body, says = MISTAKES[mistake]
    params = {name: value for name, value in (GOOD | changes).items() if value is not None}
    answer = httpx.post(f"{urls['hf']}/score", params=params, content=body, timeout=DEADLINE)
    assert answer.status_code == 400
    assert says in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "add_special_tokens": "no"}']
)
def test_a_text_that_is_none_is_400(urls, content):
    assert httpx.post(f"{urls['hf']}/tokenize", content=content).status_code == 400


def test_what_is_not_there_is_404_and_documents_nothing(urls):
    for path in ("/docs", "/redoc", "/openapi.json", "/collective_rpc", "/sleep", "/nothing"):
        assert httpx.get(urls["hf"] + path).status_code == 404


def test_an_engine_that_fails_costs_these_questions_and_no_others(tiny):
    """A sleeping engine refuses to work, and works again when it is awake."""
    engine = HFEngine(
        "math", str(tiny.padded), dtype="float32", trust_remote_code=False, residency="disk"
    )
    scorer = scoring_engine.Scorer(engine, load_head(str(tiny.padded)), torch.float32)
    thread = scoring_engine.ScoringThread(lambda: scorer, scoring_engine.BatchLimits())
    served = ModelInfo("math", str(tiny.padded), "hash", (1,), CONTEXT, PADDED_VOCAB)
    app = ScoringService(served, thread, None, max_waiting=4).app(None)

    async def statuses():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", timeout=DEADLINE
        ) as client:
            for change in (engine.sleep, engine.wake):
                change()
                yield await client.post(
                    "/score", params=query(question()), content=body_of(question())
                )

    async def collected():
        return [answer async for answer in statuses()]

    failed, answered = asyncio.run(collected())
    assert failed.status_code == 500 and "weights asleep" in failed.json()["error"]
    assert answered.status_code == 200


def test_a_question_that_is_taken_back_is_not_computed(engines, tiny):
    scorer = scoring_engine.Scorer(engines["hf"], load_head(str(tiny.padded)), torch.float32)
    thread = scoring_engine.ScoringThread(
        lambda: scorer, scoring_engine.BatchLimits(wait_seconds=1.0)
    )
    first, second = (thread.submit(question(seed=seed)) for seed in range(2))
    assert first.cancel()
    assert wire.decode_scores(second.result(DEADLINE), question(seed=1))
    assert thread.requests == 1


def test_no_model_is_a_line_and_status_2(tmp_path):
    assert_refused(["--model", str(tmp_path / "none")], "no such model directory")


@pytest.mark.parametrize("server", ["scoring_server", "rollout_server", "logprob_server"])
def test_broken_weights_are_a_line_and_status_2(tiny, tmp_path, server):
    """For each of the servers, before one is loaded."""
    path = tmp_path / "m"
    shutil.copytree(tiny.padded, path)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    more = [] if server == "scoring_server" else ["--weights_dir", str(tmp_path / "weights")]
    assert_refused(
        ["--model", str(path), *more],
        f"--model {path}: model.safetensors is a git-lfs pointer",
        server,
    )


# ---- Attacks -------------------------------------------------------------------------------------


def assert_refused(flags: list[str], says: str, server: str = "scoring_server", **env: str) -> None:
    command = [sys.executable, "-m", f"opd.servers.{server}", *flags]
    environment = worker_environment(**env)
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert run.returncode == 2, run.stderr
    assert says in run.stderr and len(run.stderr.splitlines()) == 1


def test_it_does_not_leave_loopback_without_a_token(tiny):
    assert_refused(
        ["--model", str(tiny.padded), "--host", "0.0.0.0"], "--host 0.0.0.0: other machines"
    )


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org", ""]
)
def test_only_loopback_is_loopback(host):
    with pytest.raises(ValueError, match="other machines"):
        check_host(host, None)
    check_host(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    check_host(host, None)


def test_a_token_that_could_be_guessed_is_refused(tiny):
    assert_refused(["--model", str(tiny.padded)], "at least 16", OPD_SERVER_TOKEN="short")


@pytest.mark.parametrize("name", [*BACKENDS, "closed"])
def test_every_socket_is_on_loopback(replicas, name):
    found = set().union(
        *(listening_addresses(pid) for pid in processes.members(replicas[name].process.pid))
    )
    assert found and found <= LOOPBACK


ROUTES = [
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/head"),
    ("GET", "/nothing"),
    ("POST", "/tokenize"),
    ("POST", "/score"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Bearer {TOKEN}x", TOKEN, "Bearer \xff"])
def test_every_route_wants_the_token(urls, method, path, given):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    assert httpx.request(method, urls["closed"] + path, headers=headers).status_code == 401


def test_the_right_token_opens_and_health_needs_none(urls):
    assert httpx.get(f"{urls['closed']}/health").status_code == 200
    assert (
        httpx.get(
            f"{urls['closed']}/info", headers={"Authorization": f"Bearer {TOKEN}"}
        ).status_code
        == 200
    )


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_opened(urls, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    bomb += b"." * (-len(bomb) % 4)
    for path in ("/score", "/tokenize"):
        assert httpx.post(urls["hf"] + path, params=GOOD, content=bomb).status_code == 400
    assert not (tmp_path / "exploded").exists()


def raw(url: str, head: str, blocks=()) -> bytes:
    """What the server answers to bytes that no client library would send, until it closes the
    connection.
    """
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(head.encode())
        try:
            for block in blocks:
                connection.sendall(block)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while block := connection.recv(1 << 16):
                answer += block
        except ConnectionResetError:  # it has closed with bytes of ours unread
            pass
        return answer


@pytest.mark.parametrize("path", ["/score?prompt_length=1&payload=sampled", "/tokenize"])
def test_a_length_header_of_10_gb_is_413_and_nothing_is_read(urls, path):
    answer = raw(
        urls["hf"], f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {10 << 30}\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_read_to_its_bound_only(urls):
    head = (
        "POST /score?prompt_length=1&payload=sampled HTTP/1.1\r\nHost: "
        "x\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    sent = []

    def blocks():
        for _ in range(10_000):  # 640 MB
            sent.append(1)
            yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"

    raw(urls["hf"], head, blocks())
    assert len(sent) < 1000
    with pytest.raises(httpx.HTTPError):
        httpx.post(
            f"{urls['hf']}/score", params=GOOD, content=iter([bytes(1 << 16)] * 1000)
        ).raise_for_status()


@pytest.mark.parametrize(
    "path", ["/../../../etc/passwd", "/head/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"]
)
def test_a_path_leads_nowhere(urls, path):
    answer = raw(urls["hf"], f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404") and b"root:" not in answer


def test_a_full_queue_is_429_and_who_leaves_is_not_computed(urls):
    url, headers = urls["closed"], {"Authorization": f"Bearer {TOKEN}"}
    before = metric(url, "opd_requests_total", headers=headers)
    asked = question()

    async def scenario():
        async with httpx.AsyncClient(headers=headers, timeout=DEADLINE) as client:
            posts = [
                asyncio.ensure_future(
                    client.post(f"{url}/score", params=query(asked), content=body_of(asked))
                )
                for _ in range(2)
            ]
            while "opd_waiting 2" not in (await client.get(f"{url}/metrics")).text:
                assert not any(post.done() for post in posts)
            refused = await client.post(f"{url}/score", params=query(asked), content=body_of(asked))
            posts[0].cancel()
            return refused, await posts[1]

    refused, answered = asyncio.run(asyncio.wait_for(scenario(), DEADLINE))
    assert (refused.status_code, refused.headers["Retry-After"], answered.status_code) == (
        429,
        "1",
        200,
    )
    assert metric(url, "opd_requests_total", headers=headers) == before + 1


def test_a_signal_ends_it_in_order(replicas):
    """The last test of this file: the server is gone afterwards."""
    process, start = replicas["closed"].process, time.monotonic()
    process.terminate()
    assert process.wait(10) == 0 and time.monotonic() - start < 10
