"""One optimizer step of the real student on a fixed batch, many times over: one rank, or one of a
launcher's.

`gradient_worker.py JOB`, a JSON file with `models` (name -> directory), `out` (a directory) and
`cases`. A case says how the same eight responses are dealt to the ranks and cut into micro-batches,
and under which ZeRO stage; rank 0 writes `out/NAME.safetensors`, what the step added to each
parameter, and `out/NAME.json`.

B sequences, S padded length, L response length, N loss tokens, V vocabulary, H hidden size.
"""

import functools
import gc
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.config import LossConfig, TeacherSpec
from opd.types import Prompt, Rollout, TeacherScores
from tests.support.processes import ROOT

VOCAB = 40
DOMAINS = ["addition", "reversal", "both"]
MIXTURES = {"addition": [("A", 1.0)], "reversal": [("B", 1.0)], "both": [("A", 0.25), ("B", 0.75)]}
HIDDEN = {"A": 24, "B": 16}
LOSSES = {
    "full": LossConfig(),
    "task": LossConfig(reward_weight=0.5),
    "ppo": LossConfig(loss="reverse_kl_pg", reward_weight=0.5, clip_low=0.2, clip_high=0.3),
    "pg": LossConfig(
        loss="reverse_kl_pg",
        reward_weight=0.5,
        is_mode="truncate",
        is_level="geometric",
        is_high=1.2,
    ),
    "decoupled": LossConfig(
        loss="reverse_kl_pg",
        reward_weight=0.5,
        clip_low=0.05,
        clip_high=0.1,
        old_logprobs="recompute",
        is_mode="truncate",
        is_high=1.2,
        reject_level="geometric",
        reject_low=0.3,
        reject_high=1.6,
    ),
}
# With such an epsilon the first step of Adam is -lr * g / (|g| + 1): a smooth function of the
# gradient, not its sign.
ADAM_EPS, LEARNING_RATE = 1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str = "student"
    loss: str = "full"
    stage: int = 0
    micro_batch_size: int = 8
    pad_id: int = 0
    order: int | None = (
        None  # a seed: the responses are dealt and cut in this order, not sorted by length
    )
    deal: tuple[int, ...] | None = None  # responses per rank; default: in turn
    chunk_tokens: int = 1000  # loss tokens whose logits live at once
    gradient_checkpointing: bool = False
    max_grad_norm: float = 0.0
    packing: bool = False
    inner_updates: int = 1
    learning_rate: float = LEARNING_RATE
    dtype: str = "float32"
    balanced: bool = False  # the ranks deal their responses anew
    max_tokens: int = 0


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def heads() -> dict[str, torch.Tensor]:
    return {name: randn(VOCAB, size, seed=size, scale=0.5) for name, size in HIDDEN.items()}


def make_batch() -> list[tuple[Rollout, tuple[TeacherScores, ...]]]:
    """Eight responses of one to twelve tokens, in three domains, with every payload that a teacher
    may send.
    """
    batch = []
    for i, domain in enumerate(
        ["addition", "both", "reversal", "addition", "both", "reversal", "reversal", "addition"]
    ):
        rng = random.Random(i)
        length = (1, 12, 3, 7, 5, 2, 9, 4)[i]
        response_ids = [rng.randrange(VOCAB) for _ in range(length)]
        scores = []
        for name, weight in MIXTURES[domain]:
            hidden_LH = randn(length, HIDDEN[name], seed=100 + i)
            logprobs_LV = (hidden_LH @ heads()[name].T).log_softmax(-1)
            scores.append(
                TeacherScores(
                    teacher=name,
                    weight=weight,
                    hidden=hidden_LH,
                    entropy=-(logprobs_LV.exp() * logprobs_LV).sum(-1),
                    sampled_logprobs=logprobs_LV.gather(-1, torch.tensor(response_ids)[:, None])[
                        :, 0
                    ],
                )
            )
        rollout = Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(
                prompt_id=i, domain=domain, token_ids=[rng.randrange(VOCAB) for _ in range(2 + i)]
            ),
            source="student",
            response_ids=response_ids,
            rollout_logprobs=[-rng.uniform(2.0, 6.0) for _ in range(length)],
            finish_reason="stop",
            policy_version=0,
            task_advantage=rng.choice([-1.0, -0.5, 0.5, 1.5]),
        )
        batch.append((rollout, tuple(scores)))
    return batch


def run_case(case: Case, models: dict[str, str], out: Path, device: torch.device) -> None:
    from safetensors.torch import save_file

    from opd import distributed
    from opd.config import ModelConfig, OptimConfig
    from opd.distillation import payload_of
    from opd.inputs.validation import load_ds_config
    from opd.ops.fused_linear import LIVE_BUFFERS
    from opd.ops.heads import OutputHead
    from opd.padding import count_loss_tokens
    from opd.student import LossSettings, Student
    from opd.teachers import ColocatedTeacher, TeacherPool
    from train_mopd import token_loss

    cfg = LOSSES[case.loss]
    student = Student(
        ModelConfig(
            student_model=models[case.model],
            dtype=case.dtype,
            gradient_checkpointing=case.gradient_checkpointing,
        ),
        OptimConfig(
            learning_rate=case.learning_rate, adam_eps=ADAM_EPS, max_grad_norm=case.max_grad_norm
        ),
        load_ds_config(str(ROOT / "ds_configs" / f"zero{case.stage}.json")),
        device=device,
        settings=LossSettings(
            shared_vocab=VOCAB,
            chunk_bytes=case.chunk_tokens * VOCAB * 4 * LIVE_BUFFERS,
            packing=case.packing,
            domains=DOMAINS,
            logprob_temperature=1.0
            if cfg.is_mode != "none" and cfg.old_logprobs == "rollout"
            else None,
        ),
    )
    teachers = [
        ColocatedTeacher(TeacherSpec(name, name, "*"), None, OutputHead(h))
        for name, h in heads().items()
    ]
    pool = TeacherPool(
        teachers,
        {},
        cfg,
        payload=payload_of(cfg),
        cache_bytes=1 << 30,
        shared_vocab=VOCAB,
        device=device,
        turns=iter,
    )
    before = weights_of(student)

    micro_batches = my_micro_batches(case)
    num_loss_tokens = count_loss_tokens(micro_batches)
    loss_of_token = functools.partial(token_loss, teachers=pool, cfg=cfg)
    losses, advantages = [0.0] * case.inner_updates, [0.0] * case.inner_updates
    if cfg.old_logprobs == "recompute":
        micro_batches = [mb.with_old_logprobs(student.logprobs(mb, 1.0)) for mb in micro_batches]
    for update in range(case.inner_updates):
        for mb in micro_batches:
            loss = student.loss(mb, loss_of_token)
            student.backward(
                loss.loss_sum * distributed.world_size() / num_loss_tokens,
                last=mb is micro_batches[-1],
            )
            losses[update] += loss.loss_sum.item()
            advantages[update] += loss.metrics["distill/advantage_abs"][0].item()
        grad_norm = student.step(case.learning_rate)

    delta = {name: value - before[name] for name, value in weights_of(student).items()}
    losses = [total / num_loss_tokens for total in distributed.all_reduce(losses)]
    advantages = [total / num_loss_tokens for total in distributed.all_reduce(advantages)]
    counts = distributed.gather_objects([mb.num_loss_tokens for mb in micro_batches])
    if distributed.rank() == 0:
        save_file(delta, out / f"{case.name}.safetensors")
        record = {
            "losses": losses,
            "advantages": advantages,
            "grad_norm": grad_norm,
            "loss_tokens": counts,
        }
        (out / f"{case.name}.json").write_text(json.dumps(record))
    student.engine.destroy()


def weights_of(student) -> dict[str, torch.Tensor]:
    """What AdamW steps on: the parameters, or their float32 masters."""
    if student.model.dtype == torch.float32:
        return {name: value.clone() for name, value in student.named_full_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(value).clone()
        for name, value in student.model.named_parameters()
    }


def my_micro_batches(case: Case):
    from opd import distributed
    from opd.balance import deal
    from opd.padding import collate, make_micro_batches

    batch, rank = make_batch(), distributed.rank()
    if case.order is not None:
        random.Random(case.order).shuffle(batch)
    if case.deal is None:
        mine = batch[rank :: distributed.world_size()]
    else:
        start = sum(case.deal[:rank])
        mine = batch[start : start + case.deal[rank]]
    options = {"pad_id": case.pad_id, "domains": DOMAINS}
    size = case.micro_batch_size
    if case.order is not None and case.deal is None:
        return [collate(mine[i : i + size], **options) for i in range(0, len(mine), size)]
    rollouts, scores = zip(*mine, strict=True) if mine else ((), ())
    if case.balanced:
        scores_of = {rollout.sample_id: scores for rollout, scores in batch}
        rollouts = deal(rollouts, lambda rollout: rollout.prompt.domain, hidden_size=32)
        scores = [scores_of[rollout.sample_id] for rollout in rollouts]
    options |= {"max_tokens": case.max_tokens, "packed": case.packing}
    return make_micro_batches(rollouts, scores, micro_batch_size=size, **options)


def main() -> None:
    from opd import distributed

    job = json.loads(Path(sys.argv[1]).read_text())
    device = distributed.init()
    with distributed.exit_together():
        for fields in job["cases"]:
            run_case(Case(**fields), job["models"], Path(job["out"]), device)
            gc.collect()


if __name__ == "__main__":
    main()
