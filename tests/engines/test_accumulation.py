"""Gradients in bfloat16 add up in float32, under every ZeRO stage, on one rank and on two."""

import json

import pytest

from opd.inputs.validation import load_ds_config
from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.workers.accumulation_worker import MORE, SIZE

WORKER = ROOT / "tests" / "support" / "workers" / "accumulation_worker.py"
DEADLINE = 300  # seconds for all cases of one launch
STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def norms(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("accumulation")
    cases = {}
    for stage in STAGES:
        cases[stage] = load_ds_config(str(ROOT / "ds_configs" / f"{stage}.json"))
        cases[f"{stage}_bf16"] = {**cases[stage], "data_types": {"grad_accum_dtype": "bf16"}}
    (out / "job.json").write_text(json.dumps({"out": str(out / "norms.json"), "cases": cases}))
    run_ranks(WORKER, str(out / "job.json"), num_ranks=request.param, timeout_s=DEADLINE)
    return json.loads((out / "norms.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_small_gradients_are_not_lost_beside_a_large_one(norms, stage):
    """Each of the SIZE x SIZE weights has the gradient 256 + MORE, so the norm is SIZE times that.

    DeepSpeed reduces over ranks in bfloat16: stage 0 and 1 the sum, which bfloat16 can hold, and
    stage 2 and 3 each micro-batch's part.
    """
    assert norms[stage] == pytest.approx([SIZE * (256.0 + MORE)] * 2, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_ds_config_may_ask_for_bfloat16(norms, stage):
    """It is what it says, and what the test above would find: every 1 is lost."""
    assert norms[f"{stage}_bf16"] == pytest.approx([SIZE * 256.0] * 2, rel=1e-6)
