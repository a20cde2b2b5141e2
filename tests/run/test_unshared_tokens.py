"""Tokens of responses that a teacher of their domain does not have as the student has them."""

import dataclasses
from types import SimpleNamespace

import pytest

from opd.inputs.dialects import Dialect, Foreign
from opd.inputs.models import ModelFacts
from opd.records.metrics import Metrics
from opd.run.context import Inputs
from opd.run.step_log import UnsharedTokens
from opd.types import Prompt, Rollout


def inputs(tokenizer, shared_vocab: int = 99, **foreign: set[int]) -> Inputs:
    """Of two domains, the second with two teachers; the teachers' foreign ids by name."""
    dialects = tuple(
        Dialect(name, f"--teacher {name}", frozenset(), Foreign(frozenset(ids)), None)
        for name, ids in foreign.items()
    )
    routes = {"math": (("m", 1.0),), "code": (("c", 0.5), ("d", 0.5))}
    student, small = (SimpleNamespace(vocab_size=size) for size in (99, shared_vocab))
    teachers = {"m": student, "c": small}
    facts = ModelFacts(student, teachers, 0, 99, shared_vocab, dialects=dialects)
    values = dict.fromkeys(field.name for field in dataclasses.fields(Inputs))
    known = {"tokenizer": tokenizer, "facts": facts, "routes": routes, "served": {}}
    return Inputs(**values | known)


def rollout(domain: str, response_ids: list[int]) -> Rollout:
    return Rollout(
        sample_id=f"0/{domain}/0",
        prompt=Prompt(prompt_id=0, domain=domain, token_ids=[5]),
        source="student",
        response_ids=response_ids,
        rollout_logprobs=None,
        finish_reason="stop",
        policy_version=0,
    )


@pytest.fixture
def metrics(tmp_path):
    metrics = Metrics(tmp_path, num_steps=2, domains=("code", "math"))
    yield metrics
    metrics.close()


def test_their_share_is_counted_and_the_first_is_told_of(tokenizer, metrics, capsys):
    run = inputs(tokenizer, m=set(), c={7}, d={7, 8})
    assert run.unshared == {"code": {7: "c", 8: "d"}}
    unshared = UnsharedTokens(run)
    unshared.log(metrics, [rollout("math", [7, 8, 9])])
    unshared.log(metrics, [rollout("code", [9, 9, 9, 9])])
    assert not capsys.readouterr().err
    unshared.log(metrics, [rollout("code", [8, 9, 7, 9]), rollout("code", [7, 9])])
    (line,) = capsys.readouterr().err.splitlines()
    assert "sample 0/code/0" in line and "(8)" in line and "teacher d does not share" in line
    found = metrics.flush(1)
    assert found["rollout/unshared_tokens"] == found["rollout/unshared_tokens/code"] == 0.3
    assert "rollout/unshared_tokens/math" not in found


def test_teachers_that_share_all_have_no_such_metric(tokenizer, metrics):
    unshared = UnsharedTokens(inputs(tokenizer, m=set(), c=set(), d=set()))
    unshared.log(metrics, [rollout("math", [7]), rollout("code", [7])])
    assert not [key for key in metrics.flush(1) if "unshared" in key]


def test_what_no_loss_knows_is_counted_in_every_domain(tokenizer, metrics, capsys):
    """The smallest teacher has 39 tokens of the student's."""
    unshared = UnsharedTokens(inputs(tokenizer, 39, m=set(), c={7}, d=set()))
    unshared.log(metrics, [rollout("math", [7, 39]), rollout("code", [7, 38])])
    (line,) = capsys.readouterr().err.splitlines()
    assert "sample 0/math/0" in line and "(39)" in line and "teacher c does not share" in line
    found = metrics.flush(1)
    assert found["rollout/unshared_tokens/math"] == found["rollout/unshared_tokens/code"] == 0.5
