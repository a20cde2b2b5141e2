"""Log-prob servers: real processes whose weights change under load, against forwards of this
process.

The tests of a file run in its order: the first needs servers that have no weights yet, the last
kills one.
"""

import asyncio
import copy
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from opd.clients import wire
from opd.clients.health import Limits
from opd.clients.logprob_servers import LogprobServers
from opd.clients.protocols import LOGPROB
from opd.clients.wire import LogprobQuestion, decode_logprobs, encode_logprobs
from opd.padding import collate
from opd.servers.control import Control, WeightsGate
from opd.servers.logprob_engine import LogprobScorer, load_model
from opd.servers.logprob_server import EngineHolder, LogprobService
from opd.servers.scoring_engine import BatchLimits, ScoringThread
from opd.servers.server_processes import ServerOptions, serving, start_replica, stop_all
from opd.student import LossSettings, _ModelWithLoss
from opd.types import Prompt, Rollout, TeacherScores
from opd.weights.store import publish

TOKEN = "a-token-of-more-than-16-characters"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
# one, since each makes a context of its own for TLS
HTTP = httpx.Client(headers=HEADERS, timeout=120.0)
VOCAB, CONTEXT = 40, 512
DEADLINE, TOLERANCE = 120.0, 1e-5
APART = 1e-2  # versions of these weights differ by more, in nearly every response
FENCES = itertools.count(1)  # each test is a successor of those before


class Weights:
    """Versions of a model in this process: published, and asked what they say."""

    def __init__(self, path, root):
        self.root, self.model = (
            root,
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        )
        self.versions = {0: self.model}

    def publish(self, version: int, fence: int) -> None:
        model = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.versions[version] = model
        publish(self.root, model.named_parameters(), version, fence)

    @torch.no_grad()
    def say(self, version: int, asked: LogprobQuestion) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of a plain forward of one text."""
        ids = torch.tensor([[*asked.prompt_ids, *asked.response_ids]])
        logits = (
            self.versions[version](ids).logits[0, len(asked.prompt_ids) - 1 : -1].float()
            / asked.temperature
        )
        logprobs = logits.log_softmax(-1)
        at_labels = logprobs.gather(
            -1, torch.tensor(asked.response_ids, dtype=torch.long)[:, None]
        ).squeeze(-1)
        return at_labels, -(logprobs.exp() * logprobs).sum(-1)


def question(seed=0, lengths=(5, 7), temperature=1.0) -> LogprobQuestion:
    rng = random.Random(seed)
    prompt_ids, response_ids = (
        [rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths
    )
    return LogprobQuestion(prompt_ids, response_ids, temperature)


def rollout_of(asked: LogprobQuestion, place=0) -> Rollout:
    prompt = Prompt(prompt_id=place, domain="any", token_ids=list(asked.prompt_ids))
    return Rollout(
        sample_id=f"0/{place}/0",
        prompt=prompt,
        source="student",
        response_ids=list(asked.response_ids),
        rollout_logprobs=None,
        finish_reason="stop",
        policy_version=0,
    )


def assert_says(answer, expected) -> None:
    torch.testing.assert_close(answer[0], expected[0], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(answer[1], expected[1], atol=TOLERANCE, rtol=TOLERANCE)


def post(url: str, path: str, **body) -> httpx.Response:
    return HTTP.post(f"{url}/{path}", json=body)


def raw(url: str, asked: LogprobQuestion) -> httpx.Response:
    return HTTP.post(url + asked.path, content=asked.body)


def ask(url: str, asked: LogprobQuestion):
    answer = raw(url, asked)
    assert answer.status_code == 200, answer.text
    said = decode_logprobs(answer.content, asked)
    assert answer.headers["X-Weights-Version"] == str(said.version)
    return said


def state(url: str) -> dict:
    return HTTP.get(f"{url}/version").json()


def metrics(url: str) -> dict[str, int]:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return {
        name: int(value)
        for name, value in (line.split() for line in lines if not line.startswith("#"))
    }


def until(condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def push(url: str, version: int, fence: int) -> float:
    """Seconds of the pause."""
    start = time.monotonic()
    for path, body in (
        ("pause", {"lease_s": 60.0}),
        ("update_weights", {"version": version}),
        ("resume", {}),
    ):
        answer = post(url, path, fence=fence, **body)
        assert answer.status_code == 200, answer.text
    assert answer.json() == {"version": version, "state": "ready"}
    return time.monotonic() - start


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory) -> Weights:
    return Weights(tiny.student, tmp_path_factory.mktemp("weights") / "root")


@pytest.fixture(scope="module")
def servers(tiny, weights, tmp_path_factory):
    """Two replicas, and a slow one that serves its initial weights."""
    logs = tmp_path_factory.mktemp("logprob")
    common = {"protocol": "logprob", "weights_dir": weights.root, "dtype": "float32"}
    slow_flags = ["--serve_initial", "--batch_wait_ms", "4000", "--max_waiting", "2"]
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("OPD_SERVER_TOKEN", TOKEN)
        options = ServerOptions(model=str(tiny.student), name="slow", extra=slow_flags, **common)
        slow = start_replica(options, logs / "slow.log")
        stack.callback(lambda: stop_all([slow]))
        pair = stack.enter_context(
            serving(str(tiny.student), replicas=2, log_dir=logs, start_seconds=DEADLINE, **common)
        )
        slow.wait_until_ready(DEADLINE)
        yield {"pair": pair, "slow": slow}


@pytest.fixture(scope="module")
def pair(servers) -> list[str]:
    """URLs."""
    return [replica.url for replica in servers["pair"]]


@pytest.fixture(scope="module")
def slow(servers) -> str:
    """A URL."""
    return servers["slow"].url


@pytest.fixture
def fresh(pair, weights) -> tuple[list[str], int, int]:
    """URLs that all serve a version that no test has had before: (urls, version, fence)."""
    version = fence = 1000 * next(FENCES)
    weights.publish(version, fence)
    for url in pair:
        push(url, version, fence)
    return pair, version, fence


# ---- What it says --------------------------------------------------------------------------------


def test_it_serves_nothing_before_the_first_push(pair):
    facts = {"version": "1", "protocol": LOGPROB, "weights": None, "state": "stale", "fence": 0}
    assert state(pair[0]) == facts | {"max_model_len": 512}
    answer = raw(pair[0], question())
    assert (answer.status_code, answer.json()) == (503, {"error": "stale"})
    assert metrics(pair[0])["opd_weights_version"] == -1
    assert httpx.get(f"{pair[0]}/health").status_code == 200


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_says_what_a_plain_forward_says(fresh, weights, temperature):
    (url, _), version, _ = fresh
    for lengths in ((1, 1), (5, 7), (1, 90), (300, 212), (4, 0)):
        asked = question(sum(lengths), lengths, temperature)
        answer = ask(url, asked)
        assert answer.version == version and len(answer.logprobs_L) == lengths[1]
        assert_says(answer, weights.say(version, asked))


def test_many_at_once_share_forwards_and_are_answered_each_for_itself(fresh, weights):
    (url, _), version, _ = fresh
    rng = random.Random(1)
    asked = [
        question(i, (rng.randint(1, 60), rng.randint(0, 90)), (1.0, 0.7)[i % 2]) for i in range(48)
    ]
    before = metrics(url)

    async def all_at_once():
        async with httpx.AsyncClient(headers=HEADERS, timeout=DEADLINE) as client:
            return await asyncio.gather(
                *(client.post(url + one.path, content=one.body) for one in asked)
            )

    answers = asyncio.run(all_at_once())
    after = metrics(url)
    assert after["opd_requests_total"] - before["opd_requests_total"] == len(asked)
    assert after["opd_tokens_total"] - before["opd_tokens_total"] == sum(
        one.num_tokens for one in asked
    )
    assert after["opd_batches_total"] - before["opd_batches_total"] < len(asked) / 2
    assert (after["opd_waiting"], after["opd_weights_version"], after["opd_paused"]) == (
        0,
        version,
        0,
    )
    for one, answer in zip(asked, answers, strict=True):
        assert_says(decode_logprobs(answer.content, one), weights.say(version, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_the_trainers_to_the_bit(tiny, dtype):
    """The same rows in the same order: what the student's own forward says of a micro-batch."""
    asked = [question(i, (3 + i, 20 + i), 0.7) for i in range(4)]
    model = load_model(
        str(tiny.student), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    scorer = LogprobScorer(model, version=0, tokens_per_batch=8192)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny.student, dtype=dtype, attn_implementation="sdpa"
    ).train()
    nothing = (TeacherScores(teacher="nobody", weight=1.0),)
    micro_batch = collate([(rollout_of(one), nothing) for one in asked], pad_id=1, domains=["any"])
    with torch.no_grad():
        expected_N = _ModelWithLoss(theirs, LossSettings())(micro_batch, None, 0.7, {})
    assert torch.equal(
        torch.cat([answer["logprobs"] for answer in scorer.score(asked)]), expected_N
    )


# ---- Weights -------------------------------------------------------------------------------------


@pytest.fixture
def scorer(tiny) -> LogprobScorer:
    model = load_model(
        str(tiny.student), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    return LogprobScorer(model, version=0, tokens_per_batch=8192)


@pytest.mark.parametrize("names", ["once", "twice"])
def test_tied_weights_are_loaded_under_any_of_their_names(tiny_tied, tmp_path, names):
    theirs = Weights(tiny_tied, tmp_path / "root")
    theirs.publish(3, 1)
    if names == "twice":
        parameters = theirs.versions[3].named_parameters(remove_duplicate=False)
        publish(theirs.root, parameters, 3, 2)
    model = load_model(
        str(tiny_tied), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    scorer = LogprobScorer(model, version=None, tokens_per_batch=8192)
    scorer.load(theirs.root / "v3", 3)
    (answer,) = scorer.score([question()])
    assert_says((answer["logprobs"], answer["entropy"]), theirs.say(3, question()))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_that_differ_are_refused(tiny_tied, tmp_path):
    model = load_model(
        str(tiny_tied), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    scorer = LogprobScorer(model, version=0, tokens_per_batch=8192)
    tensors = {
        name: value.detach().clone()
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    tensors["lm_head.weight"] += 1
    publish(tmp_path / "root", tensors.items(), 1, 1)
    with pytest.raises(ValueError, match="is tied"):
        scorer.load(tmp_path / "root" / "v1", 1)
    assert scorer.version is None


BROKEN = {
    "missing": (
        lambda tensors: tensors.pop("model.norm.weight"),
        "1 parameters of the model were not published",
    ),
    "unknown": (
        lambda tensors: tensors.update(other=torch.zeros(1)),
        "1 published tensors are none of the model's",
    ),
    "shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}),
        r"model.norm.weight: .*\(63,\)",
    ),
    "dtype": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).bfloat16()}),
        "bfloat16",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_other_weights_are_refused_and_the_model_serves_nothing(scorer, tmp_path, what):
    change, says = BROKEN[what]
    tensors = {name: value.clone() for name, value in scorer.model.named_parameters()}
    change(tensors)
    publish(tmp_path / "root", tensors.items(), 1, 1)
    with pytest.raises(ValueError, match=says):
        scorer.load(tmp_path / "root" / "v1", 1)
    with pytest.raises(RuntimeError, match="stale"):
        scorer.score([question()])


def test_a_half_loaded_server_is_stale_until_a_whole_push(fresh, weights):
    (url, _), version, fence = fresh
    tensors = {name: value.detach() for name, value in weights.versions[version].named_parameters()}
    publish(
        weights.root, (tensors | {"model.norm.weight": torch.zeros(63)}).items(), version + 1, fence
    )
    assert post(url, "pause", fence=fence, lease_s=60.0).status_code == 200
    refused = post(url, "update_weights", fence=fence, version=version + 1)
    assert refused.status_code == 500 and "half loaded" in refused.json()["error"]
    assert post(url, "resume", fence=fence).status_code == 503
    assert (state(url)["state"], raw(url, question()).status_code) == ("stale", 503)
    weights.publish(version + 2, fence)
    push(url, version + 2, fence)
    assert_says(ask(url, question()), weights.say(version + 2, question()))


def test_what_is_in_flight_is_answered_by_the_old_weights(slow, weights):
    """The question waits for others to share its forward when the pause comes."""
    fence = 1000 * next(FENCES)
    weights.publish(fence, fence)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, slow, question())
        # one that waits, but is not read yet, is not in flight
        until(lambda: metrics(slow)["opd_queued"] == 1 or answer.done())
        push(slow, fence, fence)
        said = answer.result(DEADLINE)
    assert said.version == 0
    assert_says(said, weights.say(0, question()))
    assert state(slow)["weights"] == fence


def test_what_comes_while_it_is_paused_is_answered_by_the_new_weights(fresh, weights):
    (url, _), version, fence = fresh
    weights.publish(version + 1, fence)
    assert post(url, "pause", fence=fence, lease_s=60.0).json() == {
        "version": version,
        "state": "paused",
    }
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, url, question(seed)) for seed in range(4)]
        until(lambda: metrics(url)["opd_waiting"] == 4)
        assert metrics(url)["opd_paused"] == 1 and not any(answer.done() for answer in answers)
        post(url, "update_weights", fence=fence, version=version + 1)
        assert not any(answer.done() for answer in answers)
        post(url, "resume", fence=fence)
        said = [answer.result(DEADLINE) for answer in answers]
    for seed, one in enumerate(said):
        assert one.version == version + 1
        assert_says(one, weights.say(version + 1, question(seed)))


def test_a_trainer_that_dies_leaves_a_server_that_goes_on(fresh, weights):
    (url, _), version, fence = fresh
    post(url, "pause", fence=fence, lease_s=0.5)
    assert_says(ask(url, question()), weights.say(version, question()))
    assert state(url)["state"] == "ready"
    assert post(url, "lease", fence=fence, lease_s=60.0).status_code == 409
    assert post(url, "update_weights", fence=fence, version=version).status_code == 409


def test_a_trainer_with_a_successor_is_refused(fresh):
    (url, _), version, fence = fresh
    for path, body in (
        ("pause", {"lease_s": 1.0}),
        ("update_weights", {"version": 1}),
        ("resume", {}),
    ):
        answer = post(url, path, fence=fence - 1, **body)
        assert answer.status_code == 409 and f"fence {fence}" in answer.json()["error"]
    assert (state(url)["weights"], state(url)["state"]) == (version, "ready")


# ---- Under load ----------------------------------------------------------------------------------


@contextmanager
def log_prob_servers(*of, **options):
    client = LogprobServers(*of, **options)
    with client.pool:
        yield client


def load_until(
    done, client: LogprobServers, most: int = 32
) -> list[tuple[LogprobQuestion, object]]:
    """(question, future) of whatever was asked until `done()`: `most` at a time, all with an answer
    in the end.
    """
    rng, asked, end = random.Random(0), [], time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end
        if sum(not answer.done() for _, answer in asked[-2 * most :]) >= most:
            time.sleep(0.001)
            continue
        one = question(len(asked), (rng.randint(1, 30), rng.randint(1, 40)), client.temperature)
        asked.append((one, client.submit(rollout_of(one, len(asked)))))
    client.pool.collect([answer for _, answer in asked])
    return asked


def test_pushes_under_load_never_mix_versions(fresh, weights):
    urls, version, fence = fresh
    pauses = []

    def five_pushes():
        for number in range(1, 6):
            weights.publish(version + number, fence)
            for url in urls:
                pauses.append(push(url, version + number, fence))
            served = sum(metrics(url)["opd_requests_total"] for url in urls)
            until(
                lambda served=served: (
                    sum(metrics(url)["opd_requests_total"] for url in urls) >= served + 40
                )
            )

    start = time.monotonic()
    with log_prob_servers(urls, TOKEN, temperature=0.7) as client, ThreadPoolExecutor(1) as pool:
        pushes = pool.submit(five_pushes)
        asked = load_until(pushes.done, client)
        pushes.result(DEADLINE)
        stats = client.pool.take_stats()
        assert {state(url)["weights"] for url in urls} == {version + 5}
    print(
        f"{stats.requests / (time.monotonic() - start):.0f} requests/s, pauses up to "
        f"{max(pauses):.3f} s"
    )
    assert stats.ejections == 0 and not stats.failures
    assert all(replica.sent for replica in client.pool.replicas)
    assert len(asked) >= 200
    answers = [(one, answer.result(DEADLINE)) for one, answer in asked]
    assert {said.version for _, said in answers} == {version + number for number in range(6)}
    for one, said in answers:
        assert_says(said, weights.say(said.version, one))
    others = [weights.say(version + (said.version - version + 1) % 6, one) for one, said in answers]
    alike = [
        (said[1] - other[1]).abs().max() < APART
        for (_, said), other in zip(answers, others, strict=True)
    ]
    assert sum(alike) < len(answers) / 10  # or this test could not fail


def test_a_replica_that_is_paused_is_excused(fresh, weights):
    """Probes that wait at its gate are no strikes, however many; who asks meanwhile
    gets an answer.
    """
    urls, version, fence = fresh
    limits = Limits(probe_every_s=0.1, probe_timeout_s=0.2)
    with log_prob_servers(urls, TOKEN, limits) as client:
        post(urls[0], "pause", fence=fence, lease_s=60.0)
        end = time.monotonic() + 4.0
        asked = []
        while time.monotonic() < end:  # a dozen probes of 0.2 s and their answers
            assert all(replica.in_rotation for replica in client.pool.replicas)
            asked.append(client.submit(rollout_of(question())))
            time.sleep(0.05)
        assert not all(answer.done() for answer in asked)  # the rest waits at the gate
        post(urls[0], "resume", fence=fence)
        answers = client.pool.collect(asked)
        assert client.pool.take_stats().ejections == 0
    for said in answers:
        assert_says(said, weights.say(version, question()))


# ---- Mistakes ------------------------------------------------------------------------------------

IDS = wire.encode_ids([5, 6, 7, 8])
MISTAKES = {
    "no prompt length": ({"prompt_length": None}, IDS, 400, "prompt_length"),
    "no prompt": ({"prompt_length": 0}, IDS, 400, "prompt_length=0"),
    "a prompt that is longer": ({"prompt_length": 5}, IDS, 400, "prompt_length=5"),
    "no ids": ({}, b"", 400, "0 bytes"),
    "half an id": ({}, IDS[:-1], 400, "15 bytes"),
    "an id outside": ({}, wire.encode_ids([5, 6, 1 << 20]), 400, "outside the vocabulary"),
    "a negative id": ({}, wire.encode_ids([5, 6, -1]), 400, "outside the vocabulary"),
    "cold": ({"temperature": 0}, IDS, 400, "temperature"),
    "not a temperature": ({"temperature": "nan"}, IDS, 400, "temperature"),
    "longer than the context": ({}, wire.encode_ids([5] * (CONTEXT + 1)), 413, "bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(slow, mistake):
    changes, body, status, says = MISTAKES[mistake]
    params = {
        name: value for name, value in ({"prompt_length": 2} | changes).items() if value is not None
    }
    answer = HTTP.post(f"{slow}/logprobs", params=params, content=body)
    assert answer.status_code == status
    assert says in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "path", ["logprobs", "pause", "update_weights", "resume", "lease", "version", "metrics"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {TOKEN}x"}])
def test_every_route_wants_the_token(slow, path, headers):
    method = "GET" if path in ("version", "metrics") else "POST"
    assert httpx.request(method, f"{slow}/{path}", headers=headers).status_code == 401


def test_a_full_queue_is_429(slow):
    fence = 1000 * next(FENCES)
    post(slow, "pause", fence=fence, lease_s=60.0)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, slow, question(seed)) for seed in range(2)]
        until(lambda: metrics(slow)["opd_waiting"] == 2)
        refused = raw(slow, question())
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        post(slow, "resume", fence=fence)
        assert all(answer.result(DEADLINE) for answer in answers)


def test_without_a_token_nobody_changes_weights(scorer, tmp_path):
    engine = ScoringThread(lambda: scorer, BatchLimits())
    engine.ready.result(DEADLINE)
    control = Control(WeightsGate(0), EngineHolder(engine), tmp_path, protocol=LOGPROB, token=None)
    app = LogprobService(engine, control, max_model_len=CONTEXT, max_waiting=4).app(None)

    async def statuses():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://server"
        ) as client:
            paths = ("pause", "update_weights", "resume", "lease")
            changed = [
                (await client.post(f"/{path}", json={"fence": 1})).status_code for path in paths
            ]
            return changed, (
                await client.post(question().path, content=question().body)
            ).status_code

    assert asyncio.run(statuses()) == ([403] * 4, 200)


def test_an_answer_is_checked_before_it_is_believed():
    asked = question(lengths=(2, 3))
    good = {"logprobs": torch.tensor([-1.0, -2.0, 0.0]), "entropy": torch.tensor([1.0, 0.0, 2.0])}
    assert decode_logprobs(encode_logprobs(good, asked, 12), asked).version == 12
    bad = {
        "positive": good | {"logprobs": torch.tensor([-1.0, 0.1, -1.0])},
        "not finite": good | {"entropy": torch.tensor([1.0, float("nan"), 1.0])},
        "entropy below 0": good | {"entropy": torch.tensor([1.0, -0.1, 1.0])},
        "short": good | {"logprobs": torch.zeros(2)},
        "another dtype": good | {"logprobs": torch.zeros(3).double()},
        "a field more": good | {"other": torch.zeros(3)},
        "a field less": {"logprobs": good["logprobs"]},
    }
    for what, arrays in bad.items():
        with pytest.raises(wire.BadAnswer):
            decode_logprobs(safetensors.torch.save(arrays, {"version": "1"}), asked)
            pytest.fail(what)
    for metadata in (
        None,
        {},
        {"version": ""},
        {"version": "-1"},
        {"version": "1.5"},
        {"version": "9" * 30},
    ):
        with pytest.raises(wire.BadAnswer):
            decode_logprobs(safetensors.torch.save(good, metadata), asked)
    for body in (b"", b"{}", encode_logprobs(good, asked, 1)[:-1], b"\xff" * 64):
        with pytest.raises(wire.BadAnswer):
            decode_logprobs(body, asked)


# ---- The end -------------------------------------------------------------------------------------


def test_a_replica_that_is_killed_under_load_costs_no_answer(fresh, servers, weights):
    """The last test of this file: one of the pair is gone afterwards."""
    urls, version, _ = fresh
    with (
        log_prob_servers(urls, TOKEN, Limits(probe_every_s=0.2)) as client,
        ThreadPoolExecutor(1) as pool,
    ):

        def kill_and_wait():
            until(lambda: metrics(urls[1])["opd_waiting"] > 0)
            servers["pair"][1].kill()
            served = metrics(urls[0])["opd_requests_total"]
            until(lambda: metrics(urls[0])["opd_requests_total"] >= served + 100)

        killed = pool.submit(kill_and_wait)
        asked = load_until(killed.done, client)
        killed.result(DEADLINE)
        assert client.pool.take_stats().ejections >= 1
    for one, answer in asked:
        assert_says(answer.result(DEADLINE), weights.say(version, one))
