"""How far sampler and trainer are apart: against numpy over all tokens at once, for any split and
on two ranks.

N tokens of all responses that the student wrote.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.config import LossConfig
from opd.mismatch import effective_share, log_mismatch, pearson
from opd.records.metrics import Metrics
from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.workers.mismatch_worker import CONFIGS, DOMAINS, SPLITS, micro_batches, responses

WORKER = ROOT / "tests" / "support" / "workers" / "mismatch_worker.py"
DEADLINE = 300  # seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ranks -> the directory with the metrics of every configuration and split."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = tmp_path_factory.mktemp(f"ranks_{ranks}")
        run_ranks(WORKER, str(found[ranks]), num_ranks=ranks, timeout_s=DEADLINE)
    return found


def expected(cfg: LossConfig) -> dict[str, float]:
    """Every key from its formula in docs/metrics.md."""
    own = [
        (r, np.array(r.rollout_logprobs), np.array(x))
        for r, x in responses()
        if r.source == "student"
    ]
    b_N, r_N = (np.concatenate([entry[i] for entry in own]) for i in (1, 2))
    whole = np.array([(r - b).sum() for _, b, r in own])
    mean = np.array([(r - b).mean() for _, b, r in own])
    length = [len(b) for _, b, _ in own]
    rho_N = np.exp(r_N - b_N)
    levels = {
        "token": rho_N,
        "sequence": np.exp(whole).repeat(length),
        "geometric": np.exp(mean).repeat(length),
    }
    ratio_N = levels[cfg.is_level]
    outside_N = (ratio_N < cfg.is_low) | (ratio_N > cfg.is_high)
    weights_N = {
        "none": ratio_N,
        "truncate": np.minimum(ratio_N, cfg.is_high),
        "mask": np.where(outside_N, 0, ratio_N),
    }[cfg.is_mode]
    row = {
        "mismatch/k1": (b_N - r_N).mean(),
        "mismatch/k3": (rho_N - (r_N - b_N) - 1).mean(),
        "mismatch/abs_mean": np.abs(r_N - b_N).mean(),
        "mismatch/abs_max": np.abs(r_N - b_N).max(),
        "mismatch/ppl_ratio": np.exp(-mean).mean(),
        "mismatch/chi2_token": (rho_N**2).mean() - 1,
        "mismatch/chi2_sequence": (np.exp(whole) ** 2).mean() - 1,
        "mismatch/prob_gap": np.abs(np.exp(r_N) - np.exp(b_N)).mean(),
        "mismatch/pearson": np.corrcoef(np.exp(r_N), np.exp(b_N))[0, 1],
        "mismatch/out_of_bounds": outside_N.mean(),
    }
    if cfg.reject_level != "none":
        ratio = np.exp(whole if cfg.reject_level == "sequence" else mean)
        rejected = (ratio < cfg.reject_low) | (ratio > cfg.reject_high)
        weights_N = np.where(rejected.repeat(length), 0, weights_N)
        row["mismatch/rejected"] = rejected.mean()
        for domain in DOMAINS:
            row[f"mismatch/rejected/{domain}"] = rejected[
                [r.prompt.domain == domain for r, _, _ in own]
            ].mean()
        assert 0 < rejected.sum() < len(rejected)
    assert 0 < outside_N.sum() < len(outside_N)
    row["mismatch/ess"] = weights_N.sum() ** 2 / (len(weights_N) * (weights_N**2).sum())
    return row


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_it_against_numpy(runs, name, size, ranks):
    (line,) = (runs[ranks] / f"{name}_{size}" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row.pop("step") == 1
    assert row == pytest.approx(expected(CONFIGS[name]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_split_changes_a_number(runs, name):
    """Sums of float64 are the same to 1e-12; k1, k3 and abs are sums of float32."""
    rows = [
        json.loads((runs[ranks] / f"{name}_{size}" / "metrics.jsonl").read_text())
        for ranks in runs
        for size in SPLITS
    ]
    for row in rows[1:]:
        assert row.keys() == rows[0].keys()
        for key, value in row.items():
            tolerance = (
                1e-6 if key in ("mismatch/k1", "mismatch/k3", "mismatch/abs_mean") else 1e-12
            )
            assert value == pytest.approx(rows[0][key], rel=tolerance, abs=tolerance), key


def flushed(tmp_path, trainer_of, cfg=CONFIGS["cut"]):
    metrics = Metrics(tmp_path, num_steps=1, domains=DOMAINS)
    batches = micro_batches([(r, trainer_of(r)) for r, _ in responses()], 4, at_least=3)
    log_mismatch(metrics, batches, cfg, domains=DOMAINS)
    return metrics.flush(1)


def test_policies_that_agree(tmp_path):
    row = flushed(tmp_path, lambda r: r.rollout_logprobs)
    for key in (
        "k1",
        "k3",
        "abs_mean",
        "abs_max",
        "chi2_token",
        "chi2_sequence",
        "prob_gap",
        "out_of_bounds",
        "rejected",
    ):
        assert row[f"mismatch/{key}"] == 0, key
    for key in ("ppl_ratio", "pearson", "ess"):
        assert row[f"mismatch/{key}"] == pytest.approx(1, abs=1e-12), key


def test_policies_that_disagree_about_everything_stay_finite(tmp_path):
    row = flushed(tmp_path, lambda r: [-1000.0] * len(r.response_ids))
    assert all(map(math.isfinite, row.values()))
    assert row["mismatch/rejected"] == row["mismatch/out_of_bounds"] == 1
    assert "mismatch/ess" not in row and "mismatch/pearson" not in row, (
        "nothing has weight, and one side does not vary"
    )


def test_a_step_without_own_responses_has_no_mismatch(tmp_path):
    metrics = Metrics(tmp_path, num_steps=1, domains=DOMAINS)
    foreign = [entry for entry in responses() if entry[0].source != "student"]
    log_mismatch(metrics, micro_batches(foreign, 1, at_least=2), CONFIGS["cut"], domains=DOMAINS)
    assert metrics.flush(1) == {}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_correlation_and_effective_sample_size_of_any_numbers(pairs):
    x, y = np.array(pairs).T
    value = pearson(len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())
    if min(x.std(), y.std()) > 1e-3:
        assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    elif min(x.std(), y.std()) == 0:
        assert value is None
    share = effective_share(len(x), x.sum(), (x * x).sum())
    assert share is None if (x * x).sum() == 0 else 0 < share <= 1 + 1e-12


def test_what_is_derived_is_derived_once_from_all_sums(tmp_path):
    """As a mean of micro-batches' correlations it would be 0; tensors and numbers mix."""
    metrics = Metrics(tmp_path, num_steps=2, domains=DOMAINS)
    for x, y in ((0.0, 0.0), (1.0, 2.0), (2.0, 4.0)):
        sums = torch.tensor([x, y, x * x, y * y, x * y], dtype=torch.float64).unbind()
        metrics.add_derived("mismatch/pearson", pearson, (1, *sums))
    assert metrics.flush(1) == {"mismatch/pearson": pytest.approx(1, abs=1e-12)}
    assert metrics.flush(2) == {}, "a flush empties the sums"
