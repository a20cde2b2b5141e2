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
TWO_RANKS = (
    LoraCase(name="whole"),
    LoraCase(name="zero2", stage=2, micro_batch_size=3),
    LoraCase(name="zero3", stage=3, micro_batch_size=3, gradient_checkpointing=True),
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
    return run(ONE_RANK, 1)


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
    pairs = [
        (name, name.replace("lora_A", "lora_B")) for name in adapter if ".lora_A." in name
    ]
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
        worst = (found[name].float() - tensor.float()).abs().max() / tensor.abs().max()
        assert worst <= tolerance, (name, float(worst))


@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
def test_a_step_is_that_of_full_training_restricted_to_the_adapter(case, one_rank, run):
    found = one_rank[case.name]
    expected, losses, norms = reference(run.models[case.model], found.start, case.steps)
    assert found.losses == pytest.approx(losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(norms, rel=10 * TOLERANCE)
    assert_close(found.end, expected, 10 * TOLERANCE)
