"""A student with adapters under DeepSpeed against plain autograd: gradients, ranks, stages,
checkpoints; and that its own weights stay what they are.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.engines.shards import Shards
from opd.ops.lora import file_name
from tests.door.test_gradients import naive_loss
from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.workers.gradient_worker import ADAM_EPS, LOSSES
from tests.support.workers.lora_worker import ALPHA, LEARNING_RATE, LoraCase, R

WORKER = ROOT / "tests" / "support" / "workers" / "lora_worker.py"
DEADLINE = 300
TOLERANCE = 1e-6  # of the largest entry

ONE_RANK = (
    LoraCase(name="whole"),
    LoraCase(name="zero1", stage=1, micro_batch_size=3),
    LoraCase(name="zero2", stage=2, micro_batch_size=3),
    LoraCase(name="zero3", stage=3, micro_batch_size=3),
    LoraCase(name="recomputed", micro_batch_size=3, gradient_checkpointing=True),
    LoraCase(name="zero3_recomputed", stage=3, micro_batch_size=3, gradient_checkpointing=True),
    LoraCase(name="packed", micro_batch_size=3, packing=True),
    LoraCase(name="tied", model="tied", micro_batch_size=3),
)
# What the reference knows nothing of: compared with each other, or with what was loaded.
OTHERS = (
    LoraCase(name="bf16", dtype="bfloat16"),
    LoraCase(name="bf16_zero1", stage=1, dtype="bfloat16"),
    LoraCase(name="bf16_zero2", stage=2, dtype="bfloat16"),
    LoraCase(name="bf16_zero3", stage=3, dtype="bfloat16"),
    LoraCase(name="names", targets=("q_proj,down_proj",)),
    LoraCase(name="saved", saved=("lm_head", "model.norm")),
    LoraCase(name="zero3_saved", stage=3, saved=("lm_head,model.norm",)),
    LoraCase(name="partitioned", stage=3, threshold=0, gradient_checkpointing=True),
    LoraCase(name="long", stage=2, steps=20, learning_rate=0.02),
)
TWO_RANKS = (
    LoraCase(name="whole"),
    LoraCase(name="zero2", stage=2, micro_batch_size=3),
    LoraCase(name="zero3", stage=3, micro_batch_size=3, gradient_checkpointing=True),
    LoraCase(name="partitioned", stage=3, threshold=0, gradient_checkpointing=True),
    LoraCase(name="zero3_only_fillers", stage=3, deal=(8, 0), micro_batch_size=3),
)


@pytest.fixture(scope="module")
def run(tiny, tiny_tied, tmp_path_factory):
    models = {"student": str(tiny.student), "tied": str(tiny_tied)}

    def run(cases, num_ranks):
        out = tmp_path_factory.mktemp("lora")
        job = {"models": models, "out": str(out), "cases": [dataclasses.asdict(c) for c in cases]}
        (out / "job.json").write_text(json.dumps(job))
        run_ranks(WORKER, str(out / "job.json"), num_ranks=num_ranks, timeout_s=DEADLINE)
        found = {}
        for case in cases:
            parts = {"start": {}, "end": {}, "merged": {}}
            for name, tensor in load_file(out / f"{case.name}.safetensors").items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            record = json.loads((out / f"{case.name}.json").read_text())
            found[case.name] = SimpleNamespace(**parts, **record)
        return found

    run.models = models
    return run


@pytest.fixture(scope="module")
def one_rank(run):
    return run((*ONE_RANK, *OTHERS), 1)


@pytest.fixture(scope="module")
def two_ranks(run):
    return run(TWO_RANKS, 2)


def weight_name(adapter_name: str) -> str:
    return adapter_name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"


def reference(path: str, start: dict, steps: int) -> tuple[dict, list[float], list[float]]:
    """Full fine-tuning's gradient of each adapted weight, by the chain rule one of A and of B, and
    AdamW on these.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = {name: t.clone().requires_grad_() for name, t in start.items()}
    adam = torch.optim.AdamW(
        adapter.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS, weight_decay=0.0
    )
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in adapter if ".lora_A." in name]
    losses, norms = [], []
    for _ in range(steps):
        model.zero_grad()
        with torch.no_grad():
            for a, b in pairs:
                weight = model.get_parameter(weight_name(a))
                weight.copy_(base[weight_name(a)] + ALPHA / R * adapter[b] @ adapter[a])
        loss = naive_loss(model, LOSSES["full"])
        loss.backward()
        for a, b in pairs:
            full_OI = model.get_parameter(weight_name(a)).grad
            adapter[a].grad = ALPHA / R * adapter[b].detach().T @ full_OI
            adapter[b].grad = ALPHA / R * full_OI @ adapter[a].detach().T
        norms.append(float(torch.nn.utils.get_total_norm([t.grad for t in adapter.values()])))
        losses.append(loss.item())
        adam.step()
    return {name: t.detach() for name, t in adapter.items()}, losses, norms


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        worst = (found[name].float() - tensor.float()).abs().max()
        assert worst <= tolerance * tensor.abs().max(), (name, float(worst))


@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
def test_a_step_is_that_of_full_training_restricted_to_the_adapter(case, one_rank, run):
    found = one_rank[case.name]
    expected, losses, norms = reference(run.models[case.model], found.start, case.steps)
    assert found.losses == pytest.approx(losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(norms, rel=10 * TOLERANCE)
    assert_close(found.end, expected, 10 * TOLERANCE)


@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.name)
def test_ranks_and_stages_change_no_adapter(case, one_rank, two_ranks):
    found, expected = two_ranks[case.name], one_rank["whole"]
    assert_close(found.start, expected.start, 0.0)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert_close(found.end, expected.end, 10 * TOLERANCE)
    assert found.changed == [] and found.with_gradient == 0


@pytest.mark.parametrize("case", (*ONE_RANK, *OTHERS), ids=lambda case: case.name)
def test_what_is_frozen_stays_as_it_was_loaded(case, one_rank, run):
    """Bit for bit, in the type of the computation, without gradients or states of an optimizer."""
    found = one_rank[case.name]
    assert found.changed == [] and found.with_gradient == 0
    assert found.dtypes == [f"torch.{case.dtype}"]
    model = AutoModelForCausalLM.from_pretrained(run.models[case.model], dtype=torch.float32)
    frozen = {name.replace(".base_layer.", ".") for name in found.frozen}
    saved = {n for n, _ in model.named_parameters() if n.startswith(("lm_head", "model.norm"))}
    if case.saved:
        assert {n for n, _ in model.named_parameters()} - frozen == saved and len(saved) == 2
    trained = sum(tensor.numel() for tensor in found.end.values())
    assert 2 * trained <= found.moments <= 2 * trained + 16  # and what aligns partitions
    assert found.merged.keys() == {name for name, _ in model.named_parameters()}


def test_merged_weights_are_added_up_in_float32_and_rounded_once(one_rank, run):
    for name, dtype in (("zero3", torch.float32), ("bf16_zero3", torch.bfloat16)):
        found = one_rank[name]
        base = AutoModelForCausalLM.from_pretrained(run.models["student"], dtype=dtype)
        moved = 0
        for key, weight in base.named_parameters():
            a = found.end.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
            expected = weight
            if a is not None:
                b = found.end[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"]
                assert a.dtype == b.dtype == dtype
                expected = (weight.float() + ALPHA / R * (b.float() @ a.float())).to(dtype)
                moved += int((expected != weight).sum())
            assert found.merged[key].dtype == dtype
            assert (found.merged[key] - expected).abs().max() <= 1e-6 * expected.abs().max(), key
        assert moved > 10_000


def test_named_layers_alone_have_adapters(one_rank):
    layers = {name.split(".")[-3] for name in one_rank["names"].end}
    assert layers == {"q_proj", "down_proj"}
    assert {name.split(".")[-3] for name in one_rank["whole"].end} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_modules_to_save_are_trained_whole(one_rank):
    found, sharded = one_rank["saved"], one_rank["zero3_saved"]
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.norm.weight"):
        assert not torch.equal(found.start[name], found.end[name])
    assert_close(sharded.end, found.end, 10 * TOLERANCE)


def test_stages_agree_in_bfloat16(one_rank):
    """Of the length of all: as of whole models, tests/door/test_gradients.py."""
    flat = {
        name: torch.cat([t.float().flatten() for t in one_rank[name].end.values()])
        for name in ("bf16", "bf16_zero1", "bf16_zero2", "bf16_zero3", "whole")
    }
    for name, found in flat.items():
        assert (found - flat["whole"]).norm() < 0.02 * flat["whole"].norm(), name


@pytest.fixture(scope="module")
def resumed(run, tmp_path_factory):
    """Four steps at once; two, a checkpoint, and two more; of ZeRO-3 from one rank to two too."""
    root = tmp_path_factory.mktemp("resumed")
    found = {}
    for stage in (0, 2, 3):
        folder = str(root / f"zero{stage}")
        cases = (
            LoraCase(name=f"at_once{stage}", stage=stage, steps=4),
            LoraCase(name=f"first{stage}", stage=stage, steps=2, save_to=folder),
            LoraCase(name=f"then{stage}", stage=stage, steps=2, load_from=folder),
        )
        found |= run(cases, 1)
    cases = (
        LoraCase(name="divided_at_once", stage=3, steps=4),
        LoraCase(name="divided", stage=3, steps=2, load_from=str(root / "zero3")),
    )
    found |= run(cases, 2)
    found["root"] = root
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_adapter_is_the_same_to_the_bit(stage, resumed):
    at_once, then = resumed[f"at_once{stage}"], resumed[f"then{stage}"]
    assert_close(then.start, resumed[f"first{stage}"].end, 0.0)
    assert_close(then.end, at_once.end, 0.0)
    assert then.losses == at_once.losses[2:]
    assert_close(then.merged, at_once.merged, 0.0)


def test_another_number_of_ranks_takes_the_adapter_up(resumed):
    """In one sum over two ranks bits may differ, and do between the runs at once too."""
    assert_close(resumed["divided"].start, resumed["first3"].end, 0.0)
    assert_close(resumed["divided"].end, resumed["divided_at_once"].end, 10 * TOLERANCE)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_what_is_trained(stage, resumed):
    first = resumed[f"first{stage}"]
    shards = Shards(resumed["root"] / f"zero{stage}")
    assert shards.stage == stage
    found = {file_name(name.removeprefix("model.")): t for name, t in shards.parameters()}
    assert_close(found, first.end, 0.0)
    trained = sum(tensor.nbytes for tensor in first.end.values())
    assert first.saved_bytes < 8 * trained  # parameters, masters, two moments, names
