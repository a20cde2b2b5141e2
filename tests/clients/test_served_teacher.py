"""Teachers behind real vLLM servers: the same scores as from an engine in this process, whatever
happens on the way.

Two teachers with two replicas each, started once. L response length, K support.
"""

import dataclasses
import os
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch

import train_mopd
from opd.clients.health import Limits
from opd.clients.pool import Unanswered
from opd.clients.served_checks import check_served
from opd.clients.served_model import ServedModel, inspect_replicas, unshared_tokens
from opd.clients.served_teacher import ServedTeacher, write_with_servers
from opd.clients.transport import Rejected
from opd.config import LossConfig, TeacherSpec
from opd.engines.vllm_engine import HiddenStateEngine
from opd.inputs.arguments import parse
from opd.inputs.models import check_models, load_tokenizer
from opd.inputs.templates import added_tokens
from opd.ops.heads import load_head
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import Prompt, Rollout
from tests.support.fault_proxy import FAULTS, Fault, FaultProxy, is_scoring
from tests.support.processes import leave_vllm
from tests.support.turns import one_after_another

pytestmark = pytest.mark.alone

VOCAB, SUPPORT, CONTEXT = 40, 5, 512
TOLERANCE = 1e-4
START_S = 300.0  # the first request compiles
LOSS = LossConfig(support="teacher_topk", support_k=SUPPORT)
ROUTES = {"addition": (("addition", 1.0),), "reversal": (("reversal", 1.0),)}
# One request at a time: an engine that adds up in other batches may round otherwise, and equal is
# to mean equal.
ONE_BY_ONE = Limits(
    wait_s=30.0,
    timeout_s=2.0,
    max_inflight=1,
    probe_every_s=0.5,
    probe_timeout_s=2.0,
    shortest_out_s=0.2,
)


def rollouts_of(domains: list[str], longest: int = 24) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    lengths = torch.randint(1, longest + 1, (2 * len(domains),), generator=generator).tolist()
    return [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain=domain, token_ids=ids(lengths[2 * i])),
            source="dataset",
            response_ids=ids(lengths[2 * i + 1]),
            rollout_logprobs=None,
            finish_reason="length",
            policy_version=0,
        )
        for i, domain in enumerate(domains)
    ]


MIXED = rollouts_of(["addition", "reversal"] * 6)


@pytest.fixture(scope="module")
def models(served) -> dict[str, ServedModel]:
    """What the servers say of themselves."""
    return {
        name: inspect_replicas(
            f"--teacher {name}", [s.url for s in some], name, None, timeout_s=START_S
        )
        for name, some in served.items()
    }


@pytest.fixture(scope="module")
def colocated(device, tiny):
    """The same teachers in this process."""
    built = {}
    for name in ROUTES:
        path = str(getattr(tiny, name))
        engine = HiddenStateEngine(
            name,
            path,
            tokenizer=str(tiny.student),
            kv_cache_gib=0.03,
            dtype="float32",
            max_model_len=CONTEXT,
            trust_remote_code=False,
        )
        built[name] = ColocatedTeacher(TeacherSpec(name, path, (name,)), engine, load_head(path))
        built[name].sleep()
    yield built
    leave_vllm()


@contextmanager
def teacher(
    name: str,
    model: ServedModel,
    urls: list[str],
    limits: Limits = ONE_BY_ONE,
    cfg: LossConfig = LOSS,
):
    spec = TeacherSpec(name, name, (name,), backend="server", urls=tuple(urls))
    options = {"limits": limits, "api_key": None, "shared_vocab": VOCAB, "needs_head": False}
    built = ServedTeacher(spec, model, cfg, **options)
    try:
        yield built
    finally:
        built.close()


def pool_of(colocated=(), served=(), routes=ROUTES, payload="topk", streams=False) -> TeacherPool:
    colocated = list(colocated)
    return TeacherPool(
        colocated,
        routes,
        LOSS,
        payload=payload,
        cache_bytes=1 << 30,
        shared_vocab=VOCAB,
        device=torch.device("cpu"),
        turns=one_after_another(colocated),
        served=list(served),
        streams=streams,
    )


def score_in_one_step(served, name, models, urls, rollouts, limits=ONE_BY_ONE):
    """The scores of a step, and what it took."""
    with teacher(name, models[name], urls, limits) as one:
        scores = pool_of(served=[one]).score(rollouts)
        return scores, one.pool.take_stats()


FIELDS = ("sampled_logprobs", "topk_ids", "topk_logprobs")


def assert_same(found, expected, tolerance: float | None = None) -> None:
    """Bit for bit, or within a tolerance."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert [(s.teacher, s.weight) for s in mine] == [(s.teacher, s.weight) for s in theirs]
        for one, other in zip(mine, theirs, strict=True):
            for name in FIELDS:
                a, b = getattr(one, name), getattr(other, name)
                if a is None or b is None:
                    assert a is b
                elif tolerance is None or name == "topk_ids":
                    assert torch.equal(a, b), name
                else:
                    assert a.dtype == b.dtype and (a - b).abs().max() < tolerance, name


# ---- Scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", ["sampled", "topk"])
def test_served_scores_are_those_of_the_engine_in_this_process(served, models, colocated, payload):
    expected = pool_of(colocated.values(), payload=payload).score(MIXED)
    with ExitStack() as stack:
        some = [
            stack.enter_context(teacher(name, models[name], [s.url for s in servers], Limits()))
            for name, servers in served.items()
        ]
        pool = pool_of(served=some, payload=payload)
        assert_same(pool.score(MIXED), expected, TOLERANCE)
        stats = {one.name: one.pool.take_stats() for one in some}
        replicas = {one.name: one.pool.replicas for one in some}
        assert pool.score([]) == []
        assert set(pool.waited_s) == set(ROUTES) and not pool._under_way
    for name, servers in served.items():
        assert stats[name].requests == 6
        assert {r.url for r in replicas[name] if r.sent} == {s.url for s in servers}
        assert stats[name].tokens == sum(
            len(r.prompt.token_ids) + len(r.response_ids) for r in MIXED if r.prompt.domain == name
        )


@pytest.mark.parametrize("streams", [False, True])
def test_one_served_and_one_colocated_with_mixture_weights_streamed_or_not(
    served, models, colocated, streams
):
    routes = {
        "addition": (("addition", 0.75), ("reversal", 0.25)),
        "reversal": (("reversal", 1.0),),
    }
    expected = pool_of(colocated.values(), routes=routes).score(MIXED)
    with teacher("reversal", models["reversal"], [s.url for s in served["reversal"]]) as one:
        pool = pool_of([colocated["addition"]], [one], routes, streams=streams)
        if streams:
            for rollout in MIXED[::-1]:  # as they finish
                pool.hear(rollout)
            end = time.monotonic() + 60
            while not all(asked.future.done() for asked in pool._under_way.values()):
                assert time.monotonic() < end
                time.sleep(0.01)
        else:
            assert pool.hear is None
        assert_same(pool.score(MIXED), expected, TOLERANCE)
        assert one.pool.take_stats().requests == 12, "each once, heard of or not"


def test_a_served_teacher_writes_what_it_was_asked_to(served, models):
    prompts = [rollout.prompt for rollout in MIXED[:4]]
    spec = TeacherSpec(
        "addition",
        "",
        ("addition",),
        backend="server",
        urls=tuple(s.url for s in served["addition"]),
    )
    options = {
        "limits": Limits(),
        "api_key": None,
        "seeds": range(4),
        "eos_ids": (1,),
        "max_tokens": 6,
        "vocab": VOCAB,
    }
    for temperature in (0.0, 1.0):
        first, again = (
            write_with_servers(
                spec, models["addition"], prompts, temperature=temperature, **options
            )
            for _ in range(2)
        )
        assert [s.token_ids for s in first] == [s.token_ids for s in again]
        assert all(1 <= len(s.token_ids) <= 6 for s in first)


# The servers of one teacher, under the name of the other.
RENAMED = {b'"model": "addition"': b'"model": "reversal"', b'"id":"reversal"': b'"id":"addition"'}


# ---- Asked at start ------------------------------------------------------------------------------


def test_what_servers_say(served, models):
    assert all(
        m.protocol == "json" and m.name == name and m.context == CONTEXT
        for name, m in models.items()
    )
    assert (
        models["addition"].tokens == models["reversal"].tokens
        and models["addition"].canary != models["reversal"].canary
    )


def test_replicas_that_do_not_fit_together(served, models):
    (a, _), (c,) = served["addition"], served["reversal"]
    with pytest.raises(
        ValueError, match=r"^F: http://127.0.0.1:9 cannot be reached: cannot connect: .*"
    ):
        inspect_replicas("F", [a.url, "http://127.0.0.1:9"], "", None)
    with pytest.raises(
        ValueError, match=r"^F: the replicas differ in their model: addition at .*, reversal at .*"
    ):
        inspect_replicas("F", [a.url, c.url], "", None)
    with FaultProxy(c.url) as renamed:  # another model under the same name
        renamed.rewrite = RENAMED
        with pytest.raises(
            ValueError, match=f"^F: {renamed.url} has another model than {a.url}: .*canary"
        ):
            inspect_replicas("F", [a.url, renamed.url], "", None)
    with FaultProxy(a.url) as shorter:
        shorter.rewrite = {b'"max_model_len":512': b'"max_model_len":256'}
        with pytest.raises(
            ValueError, match=r"^F: the replicas differ in their context length: 512 at .*, 256 at"
        ):
            inspect_replicas("F", [a.url, shorter.url], "", None)
    with FaultProxy(a.url) as other:
        other.rewrite = {b'"tokens":[': b'"tokens":[3,'}
        with pytest.raises(ValueError, match=r"^F: the replicas differ in their tokenizer"):
            inspect_replicas("F", [a.url, other.url], "", None)


def checked(tiny, served, *flags: str, urls: list[str] | None = None):
    urls = urls or [server.url for server in served["addition"]]
    required = {
        "--student_model": str(tiny.student),
        "--teacher": f"addition={','.join(urls)}",
        "--data": str(tiny.train),
        "--output_dir": "unused",
        "--support": "teacher_topk",
        "--support_k": "5",
        "--max_prompt_tokens": "64",
        "--max_response_tokens": "32",
    }
    required |= dict(zip(flags[::2], flags[1::2], strict=True))
    config = parse(train_mopd.Config, [word for pair in required.items() for word in pair])
    tokenizer = load_tokenizer(str(tiny.student))
    return check_served(config, tokenizer, check_models(config, tokenizer))


def test_a_run_that_fits(tiny, served, models):
    facts, found = checked(tiny, served)
    assert found == {
        "addition": dataclasses.replace(models["addition"], canary=found["addition"].canary)
    }
    assert found["addition"].canary == pytest.approx(models["addition"].canary, abs=TOLERANCE)
    assert facts.shared_vocab == VOCAB


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--max_prompt_tokens", "480"),
            r"--max_prompt_tokens 480 \+ --max_response_tokens 32 \+ 1: over the context of",
        ),
        (
            ("--support", "full"),
            "--support full: --teacher addition is served by vLLM .* sends no hidden states",
        ),
        (
            ("--loss_temperature", "1.5"),
            "--loss_temperature 1.5: --teacher addition is served by vLLM",
        ),
    ],
)
def test_a_run_that_does_not_fit(tiny, served, models, flags, message):
    with pytest.raises(ValueError, match=message):
        checked(tiny, served, *flags)


def test_the_longest_that_fits_is_scored(tiny, served, models):
    """prompt + response + 1 is the context; one more is refused by the server itself."""
    (rollout,) = rollouts_of(["addition"])
    fits = dataclasses.replace(
        rollout, response_ids=[5] * (CONTEXT - 1 - len(rollout.prompt.token_ids))
    )
    with teacher("addition", models["addition"], [served["addition"][0].url], Limits()) as one:
        pool = pool_of(served=[one])
        ((score,),) = pool.score([fits])
        assert len(score.sampled_logprobs) == len(fits.response_ids)
        with pytest.raises(Rejected, match=r"teacher addition: .*HTTP 400"):
            pool.score([dataclasses.replace(fits, response_ids=[*fits.response_ids, 5])])


def test_another_tokenizer_is_found_out(tiny, served, models):
    with FaultProxy(served["addition"][0].url) as other:
        other.rewrite = {b'"tokens":[': b'"tokens":[3,'}
        with pytest.raises(
            ValueError,
            match=r"its tokenizer is not the student's: .* the first to differ is number 0",
        ):
            checked(tiny, served, urls=[other.url])


def test_added_tokens_that_a_server_does_not_have(tiny, served, models):
    """Of more tokens than one question holds."""
    tokenizer = load_tokenizer(str(tiny.student))
    known = list(added_tokens(tokenizer))
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(40)])

    def unshared(*tokens: str) -> list[str]:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        urls = [server.url for server in served["addition"]]
        return unshared_tokens("F", urls, models["addition"], tokens, encode, None)

    assert known and unshared(*known) == []
    extra = [token for token in added_tokens(tokenizer) if token not in known]
    assert unshared(*known, *extra) == extra


def test_a_server_that_gives_fewer_candidates_is_found_out(tiny, served, models):
    with FaultProxy(served["addition"][0].url) as fewer:
        fewer.fault = Fault(
            "limit_4",
            only=lambda r: r.path == "/v1/completions" and b'"prompt_logprobs": 5' in r.body,
        )
        with pytest.raises(
            ValueError,
            match=r"^--support_k: --teacher addition: .* not give 5 candidates .* --max-logprobs 5",
        ):
            checked(tiny, served, urls=[fewer.url])


# ---- Faults on the way ---------------------------------------------------------------------------

SHORT_FAULTS = [kind for kind in FAULTS if kind not in ("delay", "limit_4")]
TWELVE = rollouts_of(["addition"] * 12)


@pytest.fixture(scope="module")
def fault_free(served, models):
    urls = [server.url for server in served["addition"]]
    first, again = (
        score_in_one_step(served, "addition", models, urls, TWELVE)[0] for _ in range(2)
    )
    assert_same(first, again)
    return first


@contextmanager
def proxies(served):
    with ExitStack() as stack:
        yield [stack.enter_context(FaultProxy(server.url)) for server in served["addition"]]


@pytest.mark.parametrize("everything", [False, True], ids=["scoring", "probes-too"])
@pytest.mark.parametrize("kind", SHORT_FAULTS)
def test_a_fault_of_one_replica_changes_no_bit(served, models, fault_free, kind, everything):
    """For good, at one of two."""
    with proxies(served) as (bad, good):
        bad.fault = Fault(
            kind,
            location=good.url + "/v1/completions",
            **({} if everything else {"only": is_scoring}),
        )
        scores, stats = score_in_one_step(served, "addition", models, [bad.url, good.url], TWELVE)
        answered_by_good = sum(map(is_scoring, good.requests))
    assert_same(scores, fault_free)
    assert bad.fault.struck and stats.requests == 12 <= answered_by_good
    assert stats.retries + stats.failovers > 0


@pytest.mark.parametrize("kind", SHORT_FAULTS)
def test_a_fault_of_the_only_replica_that_passes_changes_no_bit(served, models, fault_free, kind):
    with proxies(served) as (alone, other):
        alone.fault = Fault(kind, first=2, only=is_scoring, location=other.url + "/v1/completions")
        scores, stats = score_in_one_step(served, "addition", models, [alone.url], TWELVE)
        assert not other.requests, "a redirect was followed"
    assert_same(scores, fault_free)
    assert alone.fault.struck == 2 and sum(stats.failures.values()) + stats.ejections >= 1


@pytest.mark.parametrize("kind", SHORT_FAULTS)
def test_a_fault_that_never_ends_is_an_error_with_teacher_url_and_cause(
    served, models, fault_free, kind
):
    limits = dataclasses.replace(ONE_BY_ONE, wait_s=1.0, timeout_s=0.5)
    with proxies(served) as (alone, other):
        alone.fault = Fault(kind, only=is_scoring, location=other.url + "/v1/completions")
        start = time.monotonic()
        with pytest.raises(
            Unanswered, match=f"teacher addition: no answer for . s; last errors: {alone.url}: .."
        ) as caught:
            score_in_one_step(served, "addition", models, [alone.url], TWELVE, limits)
        assert time.monotonic() - start < 6.0 and "no error" not in str(caught.value)
        assert not other.requests
    print(kind, caught.value)


def test_a_replica_that_restarts_in_between_changes_no_bit(served, models, fault_free):
    with proxies(served) as (a, b), teacher("addition", models["addition"], [a.url, b.url]) as one:
        pool = pool_of(served=[one])
        a.fault = Fault("delay", seconds=0.5, only=is_scoring)
        for rollout in TWELVE:
            pool._submit(rollout)
        while not a.inflight:
            time.sleep(0.001)
        a.refuse()
        scores = pool.score(TWELVE)
        a.fault = None
        a.open()
        assert_same(scores, fault_free)
        end = time.monotonic() + 30
        while not all(replica.in_rotation for replica in one.pool.replicas):
            assert time.monotonic() < end
            time.sleep(0.01)
        before = [sum(map(is_scoring, proxy.requests)) for proxy in (a, b)]
        assert_same(pool.score(TWELVE), fault_free)
        after = [sum(map(is_scoring, proxy.requests)) for proxy in (a, b)]
        assert all(now > then for now, then in zip(after, before, strict=True))


def test_another_model_behind_a_url_is_out_before_it_is_believed(served, models):
    """The servers of the other teacher, under this one's name."""
    with FaultProxy(served["reversal"][0].url) as other:
        other.rewrite = RENAMED
        urls = [other.url, served["addition"][0].url]
        with teacher("addition", models["addition"], urls, ONE_BY_ONE) as one:
            end = time.monotonic() + 10
            while one.pool.replicas[0].in_rotation:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert "another model: its canary" in one.pool.replicas[0].last_error


# ---- Many at once --------------------------------------------------------------------------------


def rate(served, models, urls: list[str], count: int) -> tuple[float, dict[str, int]]:
    """Requests per second, and who was asked how many."""
    rollouts = rollouts_of(["addition"] * count)
    with teacher("addition", models["addition"], urls, Limits()) as one:
        start = time.monotonic()
        pool_of(served=[one]).score(rollouts)
        seconds = time.monotonic() - start
        return count / seconds, {replica.url: replica.sent for replica in one.pool.replicas}


def test_two_replicas_are_faster_than_one_or_do_half_the_work_each(served, models):
    urls = [server.url for server in served["addition"]]
    rate(served, models, urls, 20)
    one, _ = rate(served, models, urls[:1], 200)
    two, by_replica = rate(served, models, urls, 200)
    print(f"{one:.0f} requests/s with one replica, {two:.0f} with two: {by_replica}")
    assert min(by_replica.values()) > 0.3 * 200
    if (os.cpu_count() or 1) >= 4:
        assert two > 1.2 * one


def test_a_replica_killed_in_the_middle_loses_nothing(served, models):
    """The last test: there is one replica less after it."""
    rollouts = rollouts_of(["addition"] * 200)
    killed, left = served["addition"]
    expected, _ = score_in_one_step(served, "addition", models, [left.url], rollouts, Limits())
    with teacher(
        "addition", models["addition"], [killed.url, left.url], Limits(max_inflight=8)
    ) as one:
        pool = pool_of(served=[one])
        for rollout in rollouts:
            pool._submit(rollout)
        end, first = time.monotonic() + 60, one.pool.replicas[0]
        while first.sent - len(first.inflight) < 5:
            assert time.monotonic() < end
            time.sleep(0.001)
        killed.kill()
        scores, stats = pool.score(rollouts), one.pool.take_stats()
    assert_same(scores, expected, TOLERANCE)
    assert stats.requests == 200 and stats.ejections == 1 and stats.failovers + stats.retries > 0, (
        stats
    )
    print(f"{stats.failovers} failovers, {stats.retries} retries, {stats.failures}")
