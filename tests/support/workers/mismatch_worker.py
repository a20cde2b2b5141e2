"""The mismatch metrics of one step: `mismatch_worker.py OUT`, by one rank or by one of a
launcher's.

Nine responses are cut into micro-batches and dealt to the ranks in several ways; rank 0 writes
`OUT/NAME/metrics.jsonl` of each. The policies are made up, and the third response was written by
somebody else than the student.
"""

import random
import sys
from pathlib import Path

import torch

from opd import distributed
from opd.config import LossConfig
from opd.mismatch import log_mismatch
from opd.padding import collate
from opd.records.metrics import Metrics
from opd.types import Prompt, Rollout, TeacherScores

DOMAINS = ["math", "code"]
BOUNDS = {"is_low": 0.8, "is_high": 1.3, "reject_low": 0.9, "reject_high": 1.2}
CONFIGS = {
    "parity": LossConfig(**BOUNDS),
    "masked": LossConfig(is_mode="mask", is_level="geometric", reject_level="sequence", **BOUNDS),
    "cut": LossConfig(is_mode="truncate", reject_level="geometric", **BOUNDS),
}
SPLITS = (1, 2, 9)  # responses of a micro-batch


def responses() -> list[tuple[Rollout, list[float]]]:
    """Responses of 1 to 9 tokens with the sampler's log-probabilities, and the trainer's."""
    found = []
    for i in range(9):
        rng = random.Random(i)
        sampler = [-rng.expovariate(1.0) for _ in range(1 + i)]
        trainer = [min(0.0, x + rng.gauss(0, 0.4)) for x in sampler]
        rollout = Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain=DOMAINS[i % 2], token_ids=[1, 2]),
            source="dataset" if i == 2 else "student",
            response_ids=[3] * (1 + i),
            rollout_logprobs=sampler,
            finish_reason="stop",
            policy_version=0,
        )
        found.append((rollout, trainer))
    return found


def micro_batches(mine: list[tuple[Rollout, list[float]]], size: int, at_least: int) -> list:
    """As many on every rank: fillers where there are no more responses."""
    batches = []
    for start in range(0, at_least * size, size):
        part = mine[start : start + size]
        scored = [
            (r, (TeacherScores(teacher="t", weight=1.0, hidden=torch.zeros(len(x), 1)),))
            for r, x in part
        ]
        mb = collate(scored, pad_id=0, domains=DOMAINS)
        batches.append(
            mb.with_old_logprobs(torch.tensor([x for _, trainer in part for x in trainer]))
        )
    return batches


def main() -> None:
    distributed.init()
    rank, world_size = distributed.rank(), distributed.world_size()
    everything = responses()
    for name, cfg in CONFIGS.items():
        for size in SPLITS:
            metrics = Metrics(Path(sys.argv[1]) / f"{name}_{size}", num_steps=1, domains=DOMAINS)
            metrics.run_dir.mkdir(parents=True, exist_ok=True)
            # The second of two ranks has the last two responses only, so it runs out of them first.
            mine = everything if world_size == 1 else (everything[:7], everything[7:])[rank]
            batches = micro_batches(mine, size, at_least=9)
            log_mismatch(metrics, batches, cfg, domains=DOMAINS)
            metrics.flush(1)
            metrics.close()


if __name__ == "__main__":
    with distributed.exit_together():
        main()
