"""What is wrong with a configuration, before anything else is read: one ValueError names flag,
value and remedy.

Pure but for `load_ds_config`, which reads one file. The rules of teachers are in
`teacher_rules.py`, those of asynchronous rollouts in `async_rules.py`; what needs models or data is
in `models.py`.
"""

import difflib
import importlib.util
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_type_hints

from annotated_types import Ge, Gt, Interval, Le

from opd.config import LossConfig, RolloutConfig, is_async
from opd.inputs.arguments import pairs, trackers_of
from opd.inputs.identity import allowed_changes
from opd.inputs.lora_rules import validate_lora
from opd.inputs.teacher_prompts import own_prompts
from opd.inputs.teacher_rules import validate_teachers
from opd.inputs.template_flags import read_template_flags
from opd.options import options_of


def validate_common(config) -> None:
    """What both scripts check before anything is read but the configuration itself."""
    for group, flag in (
        (config.model, "student_model"),
        (config.run, "output_dir"),
        (config.data, "data"),
    ):
        if not getattr(group, flag):
            raise ValueError(f"--{flag} is required")
    validate_teachers(config.teachers, config.teacher)
    check_bounds(config)
    validate_lora(config)
    own_prompts(config)
    pairs("domain_weights", config.data.domain_weights)
    read_template_flags(config.data)
    allowed_changes(config)
    trackers_of(config.run.report_to)
    _validate_loss(config.loss, config.rollout)
    _validate_correction(config.loss)
    if config.loss.old_logprobs == "server" and not is_async(config):
        raise ValueError(
            "--old_logprobs server: log-prob servers get the weights of --mode async only; use "
            "--old_logprobs recompute"
        )
    _validate_batch(config)


def check_wandb(report_to: str) -> None:
    """Where wandb is asked for, it is installed: a folder `wandb`, such as it leaves behind, is no
    package.
    """
    if "wandb" in trackers_of(report_to):
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:
            raise ValueError(
                f"--report_to {report_to}: wandb is not installed; pip install wandb, or leave it "
                "out"
            )


def check_bounds(config) -> None:
    """Every number is finite, and within the bounds in the type of its field."""
    for group, field, value in options_of(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"--{field.name} {value}: must be finite")
        hint = get_type_hints(type(getattr(config, group)), include_extras=True)[field.name]
        for bound in getattr(hint, "__metadata__", ()):
            holds, must = _judged(bound, value)
            if not holds:
                remedy = field.metadata.get("remedy", "")
                raise ValueError(f"--{field.name} {value}: must {must}{remedy}")


def _judged(bound: Ge | Gt | Le | Interval, value: float) -> tuple[bool, str]:
    """(whether the bound holds, what a value must do)."""
    match bound:
        case Ge(limit):
            return value >= limit, f"be at least {limit}"
        case Gt(limit):
            return value > limit, f"be above {limit}"
        case Le(limit):
            return value <= limit, f"be at most {limit}"
        case Interval(gt=low, lt=high) if low is not None and high is not None:
            return low < value < high, f"lie inside ({low}, {high})"
        case Interval(ge=low, lt=high) if high is not None:
            return low <= value < high, f"lie in [{low}, {high})"
        case Interval(ge=low, le=high):
            return low <= value <= high, f"lie in [{low}, {high}]"


def _validate_loss(loss: LossConfig, rollout: RolloutConfig) -> None:
    if loss.loss == "reverse_kl_pg":
        _validate_policy_gradient(loss, rollout)
    else:
        _validate_divergence(loss)

    if loss.clip_low is not None and loss.clip_low >= 1:
        raise ValueError(
            f"--clip_low {loss.clip_low}: must be below 1; at 1 and above no ratio is ever clipped "
            "from below"
        )
    if loss.clip_high is not None and loss.clip_low is None:
        raise ValueError("--clip_high: needs --clip_low")
    if loss.dual_clip is not None and (loss.dual_clip <= 1 or loss.clip_low is None):
        raise ValueError(f"--dual_clip {loss.dual_clip}: must be above 1, with --clip_low")

    if loss.reward_weight > 0 and rollout.num_generations == 1:
        raise ValueError(
            f"--reward_weight {loss.reward_weight}: the advantage is relative to a group; set "
            "--num_generations to 2 or more"
        )
    if loss.reward_weight > 0 and loss.loss_temperature != rollout.temperature:
        raise ValueError(
            f"--loss_temperature {loss.loss_temperature}: the task reward's policy gradient needs "
            f"--temperature {rollout.temperature}"
        )


def _validate_policy_gradient(loss: LossConfig, rollout: RolloutConfig) -> None:
    """Of the reverse KL: an estimate at the sampled token, under the sampler's temperature."""
    if loss.support not in ("auto", "sampled"):
        raise ValueError(
            f"--support {loss.support}: reverse_kl_pg uses the sampled token only; use --loss "
            "reverse_kl for a wider support"
        )
    if loss.estimator not in ("auto", "k1"):
        raise ValueError(f"--estimator {loss.estimator}: reverse_kl_pg uses k1")
    if loss.loss_temperature != rollout.temperature:
        raise ValueError(
            f"--loss_temperature {loss.loss_temperature}: a policy gradient needs the sampling "
            f"temperature, --temperature {rollout.temperature}"
        )


def _validate_divergence(loss: LossConfig) -> None:
    """Exact on its support; only the reverse KL has an estimate at the sampled token."""
    if loss.estimator == "k1":
        raise ValueError(
            "--estimator k1: its gradient has no teacher in it outside a policy gradient; use k3, "
            "or --loss reverse_kl_pg"
        )
    if loss.estimator != "auto" and loss.support != "sampled":
        raise ValueError(
            f"--estimator {loss.estimator}: only --support sampled estimates; the other supports "
            "are exact"
        )
    if loss.support == "sampled" and loss.loss != "reverse_kl":
        raise ValueError(
            f"--support sampled: {loss.loss} has no estimator at the sampled token; use --loss "
            "reverse_kl or --support full"
        )
    for name in ("advantage_clip", "clip_low", "clip_high", "dual_clip"):
        if getattr(loss, name) is not None and loss.reward_weight == 0:
            raise ValueError(
                f"--{name} {getattr(loss, name)}: only a policy gradient clips; use --loss "
                "reverse_kl_pg"
            )


def _validate_correction(loss: LossConfig) -> None:
    if loss.is_low > loss.is_high:
        raise ValueError(f"--is_low {loss.is_low}: must not be above --is_high {loss.is_high}")

    one = "the ratio of a sequence on which trainer and sampler agree"
    if loss.reject_low > 1:
        raise ValueError(f"--reject_low {loss.reject_low}: must be at most 1, {one}")
    if loss.reject_high < 1:
        raise ValueError(f"--reject_high {loss.reject_high}: must be at least 1, {one}")

    reads_old = loss.clip_low is not None or loss.is_mode != "none" or loss.reject_level != "none"
    # those of a server cost the trainer nothing, and say how far its sampler is from it
    if loss.old_logprobs == "recompute" and not reads_old:
        raise ValueError(
            "--old_logprobs recompute: nothing reads them; set --clip_low, --is_mode or "
            "--reject_level, or leave it at rollout (--parity_every 1 logs mismatch/* each step)"
        )


def _validate_batch(config) -> None:
    batch = config.batch
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    if 0 < batch.max_tokens_per_micro_batch < longest:
        raise ValueError(
            f"--max_tokens_per_micro_batch {batch.max_tokens_per_micro_batch}: one sequence can "
            f"have {longest} tokens (--max_prompt_tokens + --max_response_tokens - 1); allow at "
            "least as many"
        )
    if batch.inner_updates > 1:
        check_off_policy(
            config.loss,
            f"--inner_updates {batch.inner_updates}",
            why="after the first, a policy gradient is off-policy",
            unseen="what the updates change",
            unseen_by=("recompute", "server"),
            others="recompute",
        )


def check_off_policy(
    loss: LossConfig, flag: str, *, why: str, unseen: str, unseen_by: Collection[str], others: str
) -> None:
    """A policy gradient on tokens of an older student needs one ratio that sees how far it has
    come since, and not two.

    `unseen_by` are the old policies that are already younger than the sampler: a correction
    against them does not see `unseen`.
    """
    if loss.loss != "reverse_kl_pg" and loss.reward_weight == 0:
        return
    clips, weighs = loss.clip_low is not None, loss.is_mode != "none"
    if not clips and not weighs:
        raise ValueError(f"{flag}: {why}; set --is_mode truncate, or --clip_low for a PPO ratio")
    if not clips and loss.old_logprobs in unseen_by:
        raise ValueError(
            f"{flag}: with --old_logprobs {loss.old_logprobs} --is_mode does not see {unseen}; set "
            "--clip_low for a PPO ratio"
        )
    if clips and weighs and loss.old_logprobs == "rollout":
        raise ValueError(
            f"{flag}: --clip_low and --is_mode would both weigh a token by its ratio to the "
            f"sampler; keep one, or set --old_logprobs {others}"
        )


# What a ds_config must not say, because a flag owns it.
_OWNED_BY_FLAGS = {
    "train_batch_size": "--prompts_per_step and --num_generations",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--micro_batch_size",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and the AdamW flags",
    "scheduler": "--lr_schedule and --warmup_steps",
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "torch_autocast", "amp"), "--dtype"),
}


def load_ds_config(path: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration that holds sharding, offload and communication only."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"--ds_config {path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--ds_config {path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--ds_config {path}: expected a JSON object")
    for key in content:
        if key in _OWNED_BY_FLAGS:
            raise ValueError(f"--ds_config {path}: remove `{key}`; use {_OWNED_BY_FLAGS[key]}")
        typo = difflib.get_close_matches(key, ["zero_optimization"], n=1, cutoff=0.8)
        if typo and key != typo[0]:
            raise ValueError(f"--ds_config {path}: unknown key `{key}`; did you mean {typo[0]}?")
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"--ds_config {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    return content
