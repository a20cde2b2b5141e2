"""Four optimizer steps of a student that sees, on four fixed responses dealt to the ranks.

`vision_worker.py JOB`, a JSON file with `model`, `out` (a file), `stage` and `dtype` (float32 if it
is absent). Micro-batches are single responses, so on two ranks one of them may have an image where
the other has none. Rank 0 writes the parameters.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from opd import distributed
from opd.config import ModelConfig, OptimConfig
from opd.inputs.validation import load_ds_config
from opd.padding import count_loss_tokens, make_micro_batches
from opd.student import LossSettings, Student
from opd.types import Prompt, Rollout, TeacherScores
from tests.support import vision
from tests.support.processes import ROOT

UNSCORED = (TeacherScores(teacher="", weight=1.0),)


def rollouts_of(pixels) -> list[Rollout]:
    """Images in the first, the third and the fourth, which is shorter than the others."""
    shown = [
        vision.prompt_images(pixels, "1{}2=", vision.picture(1)),
        (vision.some_text(0, 6), None),
        vision.prompt_images(pixels, "{}a{}", vision.picture(2, 30, 20), vision.picture(3)),
        (vision.some_text(1, 3), None),
    ]
    return [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain="d", token_ids=ids, images=images),
            source="student",
            response_ids=vision.some_text(10 + i, 3 + i),
            rollout_logprobs=None,
            finish_reason="length",
            policy_version=0,
        )
        for i, (ids, images) in enumerate(shown)
    ]


def negative_logprob(logits, rows, mb, logprobs_N):
    """Cross entropy of the labels."""
    return -logits.logprobs(mb.at_loss_tokens(mb.labels_BS)[rows]), {}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = distributed.init()
    student = Student(
        ModelConfig(student_model=job["model"], dtype=job.get("dtype", "float32")),
        OptimConfig(learning_rate=0.01, adam_eps=1.0),
        load_ds_config(str(ROOT / "ds_configs" / f"zero{job['stage']}.json")),
        settings=LossSettings(),
        device=device,
    )
    rollouts = rollouts_of(student.pixels)
    text = [rollout for rollout in rollouts if not rollout.prompt.images]
    # text comes first, then images, then there is text alone
    for step, order in ((rollouts, 1), (rollouts, -1), (text, 1), (rollouts, 1)):
        # this rank's: with images on one, without on the other
        mine = step[distributed.rank() :: distributed.world_size()]
        micro_batches = make_micro_batches(
            mine,
            [UNSCORED] * len(mine),
            micro_batch_size=1,
            pad_id=0,
            domains=["d"],
            placeholder_ids=(student.pixels.processor.image_token_id,),
            filler=rollouts[0].prompt,
        )
        micro_batches = micro_batches[::order]
        tokens = count_loss_tokens(micro_batches)
        for mb in micro_batches:
            out = student.loss(mb, negative_logprob)
            student.backward(
                out.loss_sum * distributed.world_size() / tokens, last=mb is micro_batches[-1]
            )
        student.step(0.01)
    found = {name: t.clone() for name, t in student.named_full_parameters()}
    if distributed.rank() == 0:
        save_file(found, job["out"])


if __name__ == "__main__":
    with distributed.exit_together():
        torch.set_num_threads(1)
        main()
