"""The student's states leave and come back between steps, and nothing else changes.

`offload_worker.py JOB`, a JSON file with `model`, `out` and `cases` (stage, dtype, offloads). Each
case trains three steps twice, once with the phases' moves and once without, and resumes from a
checkpoint that was written while the states were away; rank 0 writes the greatest differences of a
parameter, and how much was away.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from tests.support.processes import ROOT
from tests.support.workers.gradient_worker import DOMAINS, VOCAB, Case, my_micro_batches

STEPS = 3


def token_loss(logits, rows, mb, logprobs_N):
    return -logits.logprobs(mb.at_loss_tokens(mb.labels_BS)[rows]), {}


def build(case: dict, model: str, device: torch.device, offloads: frozenset[str]):
    from opd.config import ModelConfig, OptimConfig
    from opd.inputs.validation import load_ds_config
    from opd.student import LossSettings, Student

    student = Student(
        ModelConfig(student_model=model, dtype=case["dtype"]),
        OptimConfig(learning_rate=1e-2, max_grad_norm=1.0),
        load_ds_config(str(ROOT / "ds_configs" / f"{case['ds_config']}.json")),
        device=device,
        settings=LossSettings(shared_vocab=VOCAB, domains=DOMAINS),
    )
    student.sharded.offloads = offloads
    return student


def step(student) -> int:
    """One step's phases; returns the bytes that leave at its end."""
    student.place(states=False, parameters=False)  # rollout and score
    student.settle()
    assert student.place(states=False, parameters=False) == 0, "it has left"
    student.place(states=True, parameters=True)  # train
    micro_batches = my_micro_batches(Case(name="", micro_batch_size=3))
    for mb in micro_batches:
        loss = student.loss(mb, token_loss)
        student.backward(loss.loss_sum / 50, last=mb is micro_batches[-1])
    student.step(1e-2)
    return student.place(states=False, parameters=True)  # sync, while they leave


def parameters_of(student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.named_full_parameters()}


def train(
    case: dict,
    model: str,
    device: torch.device,
    offloads: frozenset[str],
    saved: Path | None = None,
):
    """Parameters after STEPS steps, one more if they are `saved` before it; and what left at each
    step's end.
    """
    student, left = build(case, model, device, offloads), []
    for _ in range(STEPS):
        left.append(step(student))
        parameters = parameters_of(student)
        student.settle()
    if saved is not None:  # as the trainers save: after `sync`, with the states away
        student.save_shards(saved)
        step(student)
        student.settle()
        parameters = parameters_of(student)
    student.place(states=True, parameters=True)
    student.engine.destroy()
    return parameters, left


def resume(case: dict, model: str, device: torch.device, offloads: frozenset[str], saved: Path):
    """Parameters after one step from a checkpoint."""
    student = build(case, model, device, offloads)
    student.load_shards(saved)
    step(student)
    student.settle()
    parameters = parameters_of(student)
    student.engine.destroy()
    return parameters


def main() -> None:
    from opd import distributed

    job = json.loads(Path(sys.argv[1]).read_text())
    device = distributed.init()
    for name, case in job["cases"].items():
        gc.collect()  # the last engine's Hugging Face hook would shard this one's model
        still, _ = train(case, job["model"], device, frozenset())
        gc.collect()
        offloads, saved = frozenset(case["offloads"]), Path(job["out"], name)
        moved, left = train(case, job["model"], device, offloads)
        difference = max(float((moved[key] - still[key]).abs().max()) for key in still)
        gc.collect()
        further, _ = train(case, job["model"], device, offloads, saved)
        gc.collect()
        resumed = resume(case, job["model"], device, offloads, saved)
        lost = max(float((further[key] - resumed[key]).abs().max()) for key in further)
        if distributed.rank() == 0:
            record = {
                "difference": difference,
                "lost": lost,
                "left": left,
                "numel": sum(v.numel() for v in still.values()),
            }
            Path(job["out"], f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    from opd import distributed

    with distributed.exit_together():
        main()
