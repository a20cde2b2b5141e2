"""The student's states leave the GPU and come back: what may leave, and that nothing else changes.

Real DeepSpeed engines on one and two ranks. On a CPU the moves are from host memory to host memory;
that they are made at all, and undone, is the same code.
"""

import json

import pytest
import torch

from opd.engines.deepspeed_engine import what_leaves
from opd.engines.host_memory import HostCopy
from opd.inputs.validation import load_ds_config
from tests.support.processes import ROOT
from tests.support.ranks import run_ranks

WORKER = ROOT / "tests" / "support" / "workers" / "offload_worker.py"
DEADLINE = 600  # seconds for all cases of one launch
CASES = {
    "zero3_float32": {"ds_config": "zero3", "dtype": "float32", "offloads": ["states"]},
    "zero3_bfloat16": {"ds_config": "zero3", "dtype": "bfloat16", "offloads": ["states"]},
    "zero3_parameters": {
        "ds_config": "zero3",
        "dtype": "bfloat16",
        "offloads": ["states", "parameters"],
    },
    "zero2_bfloat16": {"ds_config": "zero2", "dtype": "bfloat16", "offloads": ["states"]},
    "zero1_float32": {"ds_config": "zero1", "dtype": "float32", "offloads": ["states"]},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def records(request, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("offload")
    job = out / "job.json"
    job.write_text(json.dumps({"model": str(tiny.student), "out": str(out), "cases": CASES}))
    run_ranks(WORKER, str(job), num_ranks=request.param, timeout_s=DEADLINE)
    return request.param, {name: json.loads((out / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_bit_for_bit(records, name):
    ranks, found = records
    record = found[name]
    assert record["difference"] == 0.0
    assert record["lost"] == 0.0, "a checkpoint of states that are away is whole"
    # masters and two moments, 4 bytes each; the others move by DeepSpeed's own hand
    if name.startswith("zero3"):
        share = record["numel"] // ranks
        assert all(12 * share <= left <= 12.2 * share + 4096 for left in record["left"]), record


def test_a_host_copy_is_made_once_and_reused():
    tensors = [torch.arange(5.0), torch.ones(3, 2)]
    copy = HostCopy(lambda: tensors, torch.device("cpu"))
    before, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    assert copy.out() == 4 * 11 and copy.out() == 0
    assert [t.data_ptr() for t in tensors] == places, "nothing has left before `settle`"
    copy.settle()
    hosts = [t.data_ptr() for t in tensors]
    assert not set(hosts) & set(places)
    copy.back()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert not {t.data_ptr() for t in tensors} & set(hosts), (
        "what is back does not write to the host's copy"
    )
    tensors[0] += 1
    copy.out()
    copy.settle()
    assert [t.data_ptr() for t in tensors] == hosts, "the same buffers"
    assert tensors[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("ds_config", "asked", "dtype", "leaves", "why"),
    [
        ("zero3", "states", "float32", {"states"}, ""),
        ("zero3", "all", "bfloat16", {"states", "parameters"}, ""),
        ("zero3", "all", "float32", {"states"}, "only bfloat16 ones move"),
        ("zero3", "none", "bfloat16", set(), ""),
        ("zero2", "all", "bfloat16", {"states"}, "only stage 3"),
        ("zero1", "states", "bfloat16", {"states"}, ""),
        ("zero0", "states", "bfloat16", set(), "ZeRO stage 0"),
        ("zero3_offload", "states", "bfloat16", set(), "offload_optimizer keeps"),
    ],
)
def test_what_leaves(ds_config, asked, dtype, leaves, why):
    config = load_ds_config(str(ROOT / "ds_configs" / f"{ds_config}.json"))
    found, reason = what_leaves(config, asked, dtype=getattr(torch, dtype), use_cuda=True)
    assert found == leaves
    assert why in reason and bool(why) == bool(reason)
    assert what_leaves(config, asked, dtype=getattr(torch, dtype), use_cuda=False) == (
        frozenset(),
        "",
    )


def test_offloaded_parameters_stay_where_they_are():
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    found, reason = what_leaves(config, "all", dtype=torch.bfloat16, use_cuda=True)
    assert found == frozenset() and "offload_param" in reason
    none = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}
    assert what_leaves(none, "states", dtype=torch.bfloat16, use_cuda=True) == ({"states"}, "")
