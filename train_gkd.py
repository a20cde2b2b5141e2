"""Generalized Knowledge Distillation (GKD).

One teacher q, one student p. At each step a coin that all ranks share decides who wrote the
responses: with probability `lmbda` the student itself (on-policy), else the data set, or the
teacher when `--seq_kd` is given. On those responses

    L = 1/N  sum_y sum_t  [ D(p(.|x, y_<t), q(.|x, y_<t))
                            -  sft_alpha * 1[y not the student's] * log p(y_t) ]

N counts the response tokens of all ranks. D is any divergence of `opd/losses.py`: forward KL,
reverse KL, JSD or their skewed forms, exact over the full vocabulary from cached teacher hidden
states, or on a support.

Papers: GKD (arXiv 2306.13649, Algorithm 1); sequence-level distillation (arXiv 1606.07947).

    accelerate launch --config_file ds_configs/accelerate.yaml train_gkd.py --student_model S
    --teacher T \\
        --data train.jsonl --loss jsd --lmbda 0.5 --output_dir runs/gkd

B sequences, S padded length, N loss tokens of a micro-batch, C tokens of a chunk of them, V
vocabulary.
"""

import functools
import json
from dataclasses import dataclass, field, replace
from typing import Annotated

from annotated_types import Ge, Interval
from torch import Tensor

from opd import config, distributed
from opd.distillation import compare
from opd.inputs.arguments import parse
from opd.inputs.validation import validate_common
from opd.log import say
from opd.lora_config import LoraConfig
from opd.ops.logits import LogitsChunk
from opd.padding import count_loss_tokens
from opd.privilege import PrivilegeConfig
from opd.records.files import replace_text
from opd.run.context import Run
from opd.run.loop import start
from opd.run.prepare import prepare, user_errors
from opd.student import learning_rate_at
from opd.teachers import TeacherPool
from opd.types import MicroBatch

# ---- Config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GkdConfig:
    lmbda: Annotated[float, Interval(ge=0, le=1)] = config.option(
        0.5, "Probability that a step trains on the student's own responses."
    )
    seq_kd: bool = config.option(
        False,
        "The off-policy responses are written by the teacher, once, and kept in "
        "output_dir/seq_kd.json.",
    )
    seq_kd_temperature: Annotated[float, Ge(0)] = config.option(
        1.0, "Sampling temperature of the teacher's responses; 0 is greedy."
    )
    sft_alpha: Annotated[float, Ge(0)] = config.option(
        0.0, "Weight of the cross-entropy on responses that the student did not write."
    )


@dataclass(frozen=True)
class Config:
    model: config.ModelConfig = field(default_factory=config.ModelConfig)
    teacher: config.TeacherConfig = field(default_factory=config.TeacherConfig)
    privilege: PrivilegeConfig = field(default_factory=PrivilegeConfig)
    data: config.DataConfig = field(default_factory=config.DataConfig)
    rollout: config.RolloutConfig = field(default_factory=config.RolloutConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    gkd: GkdConfig = field(default_factory=GkdConfig)
    batch: config.BatchConfig = field(default_factory=config.BatchConfig)
    optim: config.OptimConfig = field(default_factory=config.OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    run: config.RunConfig = field(default_factory=config.RunConfig)
    teachers: tuple[config.TeacherSpec, ...] = ()
    explicit: frozenset[str] = field(default=frozenset(), compare=False)  # flags that were given

    def validate(self) -> None:
        validate_common(self)
        if len(self.teachers) != 1:
            raise ValueError(
                f"--teacher: train_gkd.py takes one teacher, got {len(self.teachers)}; use "
                "train_mopd.py"
            )
        if self.loss.loss == "reverse_kl_pg":
            raise ValueError(
                "--loss reverse_kl_pg: train_gkd.py minimises a divergence; use train_mopd.py"
            )
        if self.loss.reward_weight > 0:
            raise ValueError(
                f"--reward_weight {self.loss.reward_weight}: no task reward here; use train_mopd.py"
            )
        for flag in ("is_mode", "reject_level"):
            if getattr(self.loss, flag) != "none":
                raise ValueError(
                    f"--{flag} {getattr(self.loss, flag)}: off-policy responses have no sampler; "
                    "use train_mopd.py"
                )
        if self.loss.support == "sampled" and self.gkd.lmbda < 1:
            raise ValueError(
                "--support sampled: an estimate needs tokens that the student sampled; set --lmbda "
                "1 or --support full"
            )


# ---- The algorithm -------------------------------------------------------------------------------


def token_loss(
    logits: LogitsChunk,
    rows: slice,
    mb: MicroBatch,
    logprobs_N: None,
    *,
    teachers: TeacherPool,
    cfg: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token of a chunk, [C], and what to log about it.

    `rows` are the chunk's tokens among the N.
    """
    seen = compare(logits, rows, mb, head_of=teachers.head, cfg=cfg.loss)
    stats = seen.stats
    loss_C = seen.divergence_C
    if cfg.gkd.sft_alpha > 0:
        off_policy_C = ~mb.at_loss_tokens(mb.on_policy_B)[rows]
        cross_entropy_C = -seen.student_logprobs_C * off_policy_C
        # the mean is over off-policy tokens
        stats["loss/sft"] = cross_entropy_C.detach().masked_fill(~off_policy_C, float("nan"))
        loss_C = loss_C + cfg.gkd.sft_alpha * cross_entropy_C
    stats["loss/total"] = loss_C.detach()
    return loss_C, stats


def is_on_policy(step: int, cfg: Config) -> bool:
    """The coin of a step: the same on every rank and after a resume."""
    return distributed.fold_seed(cfg.run.seed, step, "lmbda") / 2**63 < cfg.gkd.lmbda


def check_teacher_writes(run: Run) -> None:
    """ValueError where `--seq_kd` needs responses that the teacher cannot write."""
    cfg, spec = run.cfg, run.cfg.teachers[0]
    reason = run.why_silent(spec) if cfg.gkd.seq_kd and cfg.gkd.lmbda < 1 else None
    if reason:
        raise ValueError(f"--seq_kd: teacher {spec.name} cannot write: {reason}")


def with_teacher_responses(run: Run) -> Run:
    """The run with every prompt's response written by the teacher: once, each rank its share, kept
    under content hashes.
    """
    cfg, spec = run.cfg, run.cfg.teachers[0]
    path = run.run_dir / "seq_kd.json"
    made_from = {
        "teacher": run.hashes[spec.name],
        "data": run.train_set.content_hash,
        "seed": cfg.run.seed,
        "temperature": cfg.gkd.seq_kd_temperature,
        "max_response_tokens": cfg.rollout.max_response_tokens,
    }
    if run.facts.stop_ids:
        made_from["stop_ids"] = list(run.facts.stop_ids)
    kept = distributed.broadcast_object(json.loads(path.read_text()) if path.exists() else None)
    if kept is None or kept["made_from"] != made_from:
        say(f"teacher {spec.name} writes {len(run.train_set.prompts)} responses")
        with distributed.agree_on_error("writing the teacher's responses"):
            share = run.train_set.prompts[distributed.rank() :: distributed.world_size()]
            log = run.run_dir / "logs" / f"seq_kd_{distributed.rank()}.log"
            samples = run.write(spec, share, log, temperature=cfg.gkd.seq_kd_temperature)
            mine = {
                str(p.prompt_id): sample.token_ids for p, sample in zip(share, samples, strict=True)
            }
        kept = {
            "made_from": made_from,
            "responses": {
                k: v for part in distributed.gather_objects(mine) for k, v in part.items()
            },
        }
        if distributed.rank() == 0:
            replace_text(path, json.dumps(kept))
    prompts = tuple(
        replace(p, target_ids=kept["responses"][str(p.prompt_id)]) for p in run.train_set.prompts
    )
    return replace(run, train_set=replace(run.train_set, prompts=prompts))


# ---- Main ----------------------------------------------------------------------------------------


def main(run: Run) -> None:
    cfg, num_updates = run.cfg, run.cfg.batch.inner_updates
    if cfg.gkd.seq_kd and cfg.gkd.lmbda < 1:
        run = with_teacher_responses(run)
    loop = start(run)  # engines on this rank's GPU, each asleep until its phase; resumed
    student, teachers = loop.student, loop.teachers
    loss_of_token = functools.partial(token_loss, teachers=teachers, cfg=cfg)

    for step in range(loop.state.step, cfg.run.num_steps):
        with loop.step(step):
            prompts = run.prompt_batch(step)  # P prompts of this rank
            on_policy = is_on_policy(step, cfg)
            loop.metrics.add("distill/on_policy_share", float(on_policy))

            with loop.phase("rollout"):  # the student writes, or the data set has it written
                rollouts = loop.generate(prompts) if on_policy else loop.from_dataset(prompts)

            rollouts = loop.balance(rollouts)  # about equal work for every rank

            with loop.phase("score"):  # the teacher reads
                scores = teachers.score(rollouts)

            micro_batches = loop.micro_batches(rollouts, scores)
            del scores  # the micro-batches have copied the hidden states
            num_loss_tokens = count_loss_tokens(micro_batches)  # over all ranks, before a backward

            with loop.phase("train"):  # the student moves toward it
                micro_batches = loop.with_old_policy(micro_batches)
                for update in range(num_updates):  # scores stay, the student they meet does not
                    for mb in micro_batches:
                        out = student.loss(mb, loss_of_token)  # a sum over loss tokens
                        scale = distributed.world_size() / num_loss_tokens  # DeepSpeed averages
                        student.backward(out.loss_sum * scale, last=mb is micro_batches[-1])
                        loop.record(mb, out, update)
                    progress = step + update / num_updates
                    learning_rate = learning_rate_at(progress, cfg.run.num_steps, cfg.optim)
                    grad_norm = student.step(learning_rate)

            loop.trained(num_loss_tokens, learning_rate, grad_norm)
            with loop.phase("sync"):  # the sampler gets the new weights
                loop.push()
        loop.after_step()  # metrics; evaluation and checkpoint, when they are due
    loop.finish()


if __name__ == "__main__":
    with distributed.exit_together():
        with user_errors():  # one line and exit status 2, before a weight is loaded
            cfg = parse(Config)
            run = prepare(cfg, need_response=cfg.gkd.lmbda < 1 and not cfg.gkd.seq_kd)
            check_teacher_writes(run)
        main(run)
