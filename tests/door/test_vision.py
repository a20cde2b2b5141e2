"""A student that sees, on one rank and on two, where one rank's micro-batch has an image and the
other's has none.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from opd.ops.pixels import Pixels
from opd.padding import collate
from opd.types import TeacherScores
from tests.support import vision
from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.workers.vision_worker import UNSCORED, rollouts_of

WORKER = ROOT / "tests" / "support" / "workers" / "vision_worker.py"
DEADLINE = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sees")
    torch.manual_seed(0)
    vision.idefics3(path)
    return path


@pytest.fixture(scope="module")
def rollouts(model):
    return rollouts_of(Pixels(str(model)))


def test_any_number_of_ranks_and_stage_train_the_same_student(model, tmp_path):
    found = {}
    for stage, ranks in ((0, 1), (1, 1), (2, 1), (3, 1), ("3_offload", 1), (0, 2), (2, 2), (3, 2)):
        out = tmp_path / f"{stage}_{ranks}.safetensors"
        job = tmp_path / "job.json"
        job.write_text(json.dumps({"model": str(model), "out": str(out), "stage": stage}))
        run_ranks(WORKER, str(job), num_ranks=ranks, timeout_s=DEADLINE)
        found[stage, ranks] = load_file(out)
    whole = found.pop((0, 1))
    before = load_file(model / "model.safetensors")
    changed = [name for name in whole if not torch.equal(whole[name], before[name])]
    assert any("vision_model" in name for name in changed)
    for case, parameters in found.items():
        for name, value in parameters.items():
            largest = (whole[name] - before[name]).abs().max()
            assert (value - whole[name]).abs().max() <= 1e-5 * largest + 1e-7, (case, name)


def test_a_step_without_images_in_bfloat16(model, tmp_path):
    """Under stage 0 gradients are float32 beside bfloat16 weights, also of what was not used."""
    job, out = tmp_path / "job.json", tmp_path / "out.safetensors"
    said = {"model": str(model), "out": str(out), "stage": 0, "dtype": "bfloat16"}
    job.write_text(json.dumps(said))
    run_ranks(WORKER, str(job), num_ranks=1, timeout_s=DEADLINE)
    before, found = load_file(model / "model.safetensors"), load_file(out)
    changed = [name for name in found if not torch.equal(found[name], before[name].bfloat16())]
    assert any("vision_model" in name for name in changed)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(
    ("source", "shared_vocab", "learned"),
    [("student", None, 1), ("dataset", None, 0), ("student", 6, 1), ("student", 5, 0)],
)
def test_a_placeholder_at_the_end(rollouts, source, shared_vocab, learned):
    """The student's own is learned, in the mask as for each teacher. One in data is not, nor is one
    that a teacher does not have.
    """
    texts = ([3, 4, 5], [5], [3, 2])

    def scored_of(index, ids):
        logprobs = [-float(index + 1)] * len(ids)
        rollout = dataclasses.replace(
            rollouts[min(index, 1)], source=source, response_ids=ids, rollout_logprobs=logprobs
        )
        sampled_L = torch.arange(float(len(ids)))
        return rollout, (TeacherScores(teacher="t", weight=1.0, sampled_logprobs=sampled_L),)

    scored = [scored_of(index, ids) for index, ids in enumerate(texts)]
    mb = collate(scored, pad_id=0, domains=["d"], placeholder_ids=(5,), shared_vocab=shared_vocab)
    kept = [ids[: len(ids) - (5 in ids and not learned)] for ids in texts]
    assert mb.at_loss_tokens(mb.labels_BS).tolist() == [token for ids in kept for token in ids]
    logprobs = [-float(index + 1) for index, ids in enumerate(kept) for _ in ids]
    assert mb.at_loss_tokens(mb.rollout_logprobs_BS).tolist() == logprobs
    assert float(mb.rollout_logprobs_BS.sum()) == sum(logprobs), "0 off the mask"
    (part,) = mb.teacher_slices
    assert part.token_index_M.tolist() == list(range(4 + 2 * learned))
    assert part.sampled_logprobs_M.tolist() == [float(t) for ids in kept for t in range(len(ids))]


def test_a_micro_batch_without_loss_tokens(rollouts):
    """All its responses end at once, at a token that nobody learns."""
    only = dataclasses.replace(
        rollouts[1], response_ids=[5], rollout_logprobs=[-2.0], source="dataset"
    )
    score = TeacherScores(teacher="t", weight=1.0, sampled_logprobs=torch.zeros(1))
    mb = collate([(only, (score,))], pad_id=0, domains=["d"], placeholder_ids=(5,))
    assert mb.num_loss_tokens == 0 and mb.teachers_per_token == 1


def test_a_filler_is_masked_and_has_the_image(rollouts):
    filler = rollouts[0].prompt
    mb = collate([(rollouts[1], UNSCORED)], pad_id=0, domains=["d"], filler=filler)
    assert mb.images == (None, filler.images) and not mb.loss_mask_BS[1].any()
    length = len(filler.token_ids)
    assert mb.input_ids_BS[1, :length].tolist() == filler.token_ids
    assert mb.attention_mask_BS[1].sum() == length and mb.domain_ids_B.tolist() == [0, -1]
    empty = collate([], pad_id=0, domains=["d"], filler=filler)
    assert empty.images == (filler.images,) and empty.num_loss_tokens == 0
    assert collate([(rollouts[1], UNSCORED)], pad_id=0, domains=["d"]).images == ()
