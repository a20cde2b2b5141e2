"""What is wrong with a configuration, before anything else is read: one ValueError names flag,
value and remedy.

Pure but for `load_ds_config`, which reads one file. What needs models or data is in
`opd/inputs/models.py`.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opd.config import LossConfig, RolloutConfig, TeacherConfig, TeacherSpec, pairs, to_dict


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def validate_common(config) -> None:
    """What both scripts check before anything is read but the configuration itself."""
    for group, flag in (
        (config.model, "student_model"),
        (config.run, "output_dir"),
        (config.data, "data"),
    ):
        _require(bool(getattr(group, flag)), f"--{flag} is required")
    validate_teachers(config.teachers, config.teacher)
    minimum = {
        "support_k": 1,
        "prompts_per_step": 1,
        "num_generations": 1,
        "max_prompt_tokens": 1,
        "max_response_tokens": 1,
        "micro_batch_size": 1,
        "keep_checkpoints": 1,
        "loss_chunk_bytes": 1,
        "inner_updates": 1,
        "rollout_tensor_parallel_size": 1,
        "teacher_max_inflight": 1,
        "max_inflight": 1,
        "sync_every": 1,
        "rollout_replicas": 1,
        "logprob_replicas": 1,
        "max_staleness": 0,
        "num_steps": 0,
        "seed": 0,
        "eval_every": 0,
        "save_every": 0,
        "parity_every": 0,
        "eval_max_prompts": 0,
        "rollout_every": 0,
        "rollout_samples": 0,
        "warmup_steps": 0,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "min_lr_ratio": 0,
        "top_k": 0,
        "reward_weight": 0,
        "overlap_k": 0,
        "max_tokens_per_micro_batch": 0,
        "teacher_cache_bytes": 0,
    }
    above_zero = {
        "temperature",
        "loss_temperature",
        "rollout_kv_cache_gib",
        "teacher_kv_cache_gib",
        "advantage_clip",
        "clip_low",
        "clip_high",
        "is_low",
        "is_high",
        "reject_low",
        "reject_high",
        "adam_eps",
        "top_p",
        "teacher_wait_s",
        "teacher_timeout_s",
        "rollout_timeout_s",
        "rollout_wait_s",
    }
    inside_unit = {"jsd_beta", "skew_alpha"}
    for name, value in to_dict(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            _require(math.isfinite(value), f"--{name} {value}: must be finite")
            _require(
                name not in minimum or value >= minimum[name],
                f"--{name} {value}: must be at least {minimum.get(name)}",
            )
            _require(name not in above_zero or value > 0, f"--{name} {value}: must be above 0")
            _require(
                name not in inside_unit or 0 < value < 1,
                f"--{name} {value}: must lie inside (0, 1)"
                + (
                    "; for the limits use --loss forward_kl or reverse_kl"
                    if name == "jsd_beta"
                    else ""
                ),
            )
    _require(
        config.optim.min_lr_ratio <= 1,
        f"--min_lr_ratio {config.optim.min_lr_ratio}: must be at most 1",
    )
    _require(config.rollout.top_p <= 1, f"--top_p {config.rollout.top_p}: must be at most 1")
    for name in ("adam_beta1", "adam_beta2"):
        _require(
            0 <= getattr(config.optim, name) < 1,
            f"--{name} {getattr(config.optim, name)}: must lie in [0, 1)",
        )
    pairs("domain_weights", config.data.domain_weights)
    _validate_loss(config.loss, config.rollout)
    _validate_correction(config.loss)
    is_async = getattr(getattr(config, "ahead", None), "mode", "sync") == "async"
    _require(
        config.loss.old_logprobs != "server" or is_async,
        "--old_logprobs server: log-prob servers get the weights of "
        "--mode async only; use --old_logprobs recompute",
    )
    _validate_batch(config)


def _validate_loss(loss: LossConfig, rollout: RolloutConfig) -> None:
    is_pg = loss.loss == "reverse_kl_pg"
    if is_pg:
        _require(
            loss.support in ("auto", "sampled"),
            f"--support {loss.support}: reverse_kl_pg uses the sampled token only; "
            "use --loss reverse_kl for a wider support",
        )
        _require(
            loss.estimator in ("auto", "k1"), f"--estimator {loss.estimator}: reverse_kl_pg uses k1"
        )
        _require(
            loss.loss_temperature == rollout.temperature,
            f"--loss_temperature {loss.loss_temperature}: a policy gradient "
            f"needs the sampling temperature, --temperature {rollout.temperature}",
        )
    else:
        _require(
            loss.estimator != "k1",
            "--estimator k1: its gradient has no teacher in it outside a policy gradient; "
            "use k3, or --loss reverse_kl_pg",
        )
        _require(
            loss.estimator == "auto" or loss.support == "sampled",
            f"--estimator {loss.estimator}: only --support sampled estimates; the other supports "
            f"are exact",
        )
        _require(
            loss.support != "sampled" or loss.loss == "reverse_kl",
            f"--support sampled: {loss.loss} has no estimator at the sampled token; use --loss "
            f"reverse_kl or --support full",
        )
        for name in ("advantage_clip", "clip_low", "clip_high", "dual_clip"):
            _require(
                getattr(loss, name) is None or loss.reward_weight > 0,
                f"--{name} {getattr(loss, name)}: only a policy gradient clips; use --loss "
                f"reverse_kl_pg",
            )
    _require(
        loss.clip_low is None or loss.clip_low < 1,
        f"--clip_low {loss.clip_low}: must be below 1; at 1 and above "
        "no ratio is ever clipped from below",
    )
    _require(loss.clip_high is None or loss.clip_low is not None, "--clip_high: needs --clip_low")
    _require(
        loss.dual_clip is None or (loss.dual_clip > 1 and loss.clip_low is not None),
        f"--dual_clip {loss.dual_clip}: must be above 1, with --clip_low",
    )
    _require(
        loss.reward_weight == 0 or rollout.num_generations > 1,
        f"--reward_weight {loss.reward_weight}: the advantage is relative to a group; set "
        f"--num_generations to 2 or more",
    )
    _require(
        loss.reward_weight == 0 or loss.loss_temperature == rollout.temperature,
        f"--loss_temperature {loss.loss_temperature}: the task reward's policy gradient needs "
        f"--temperature "
        f"{rollout.temperature}",
    )


def _validate_correction(loss: LossConfig) -> None:
    _require(
        loss.is_low <= loss.is_high,
        f"--is_low {loss.is_low}: must not be above --is_high {loss.is_high}",
    )
    _require(
        loss.reject_low <= 1,
        f"--reject_low {loss.reject_low}: must be at most 1, the ratio of a sequence on which "
        "trainer and sampler agree",
    )
    _require(
        loss.reject_high >= 1,
        f"--reject_high {loss.reject_high}: must be at least 1, the ratio of a sequence on which "
        "trainer and sampler agree",
    )
    reads_old = loss.clip_low is not None or loss.is_mode != "none" or loss.reject_level != "none"
    _require(
        loss.old_logprobs == "rollout" or reads_old,
        f"--old_logprobs {loss.old_logprobs}: nothing reads them; set "
        "--clip_low, --is_mode or --reject_level, or leave it at rollout",
    )


def validate_ahead(config) -> None:
    """What `train_mopd.py --mode async` needs beside what both scripts check."""
    ahead, loss = config.ahead, config.loss
    if ahead.mode == "sync":
        return
    _require(
        ahead.max_staleness >= ahead.sync_every - 1,
        f"--max_staleness {ahead.max_staleness}: with --sync_every "
        f"{ahead.sync_every} the step before a push is {ahead.sync_every - 1} versions behind; "
        f"allow as many",
    )
    every = config.run.eval_every
    _require(
        every % ahead.sync_every == 0,
        f"--eval_every {every}: the servers that are evaluated get weights every "
        f"--sync_every {ahead.sync_every} steps; take a multiple of that",
    )
    _require(bool(ahead.rollout_servers), "--rollout_servers: give URLs, or auto")
    everyone: dict[str, str] = {}
    for role in ("rollout", "logprob"):
        flag, urls = f"--{role}_servers", getattr(ahead, f"{role}_servers")
        _require(
            "auto" not in urls or urls == ["auto"], f"{flag}: auto stands alone; give URLs, or auto"
        )
        for url in (url.rstrip("/").lower() for url in urls if url != "auto"):
            _require(is_http(url), f"{flag} {url}: not an http(s) URL; write http://HOST:PORT")
            _require(
                url not in everyone,
                f"{flag} {url}: it stands there twice"
                if everyone.get(url) == flag
                else f"{flag} {url}: it is also one of {everyone.get(url)}; a server has one role",
            )
            everyone[url] = flag
        gpus, needed = getattr(ahead, f"{role}_gpus"), getattr(ahead, f"{role}_replicas")
        needed *= config.rollout.rollout_tensor_parallel_size if role == "rollout" else 1
        names = [name for name in gpus.split(",") if name]
        _require(
            not gpus or urls == ["auto"],
            f"--{role}_gpus {gpus}: only for servers that are started here, {flag} auto",
        )
        _require(
            not gpus or len(set(names)) == len(names) >= needed,
            f"--{role}_gpus {gpus}: {needed} GPUs are needed, each named once",
        )
    has_own = ahead.rollout_servers != ["auto"] or ahead.logprob_servers not in ([], ["auto"])
    _require(
        not has_own or bool(ahead.weights_dir),
        "--weights_dir is required with servers of your own: the folder that they were started "
        "with",
    )
    _require(
        (loss.old_logprobs == "server") == bool(ahead.logprob_servers),
        "--old_logprobs server and --logprob_servers need each other; give URLs, or auto",
    )
    is_pg = loss.loss == "reverse_kl_pg" or loss.reward_weight > 0
    if ahead.max_staleness > 0 and is_pg:
        flag = f"--max_staleness {ahead.max_staleness}"
        clips, weighs = loss.clip_low is not None, loss.is_mode != "none"
        _require(
            clips or weighs,
            f"{flag}: a policy gradient on stale responses is off-policy; set --is_mode truncate, "
            f"or "
            "--clip_low for a PPO ratio",
        )
        _require(
            clips or loss.old_logprobs != "server",
            f"{flag}: with --old_logprobs server --is_mode does not see what the "
            "student has learned since; set --clip_low for a PPO ratio",
        )
        _require(
            not (clips and weighs) or loss.old_logprobs != "rollout",
            f"{flag}: --clip_low and --is_mode would both weigh "
            "a token by its ratio to the sampler; keep one, or set --old_logprobs recompute or "
            "server",
        )


def _validate_batch(config) -> None:
    batch, loss = config.batch, config.loss
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    budget = batch.max_tokens_per_micro_batch
    _require(
        budget == 0 or budget >= longest,
        f"--max_tokens_per_micro_batch {budget}: one sequence can have {longest} "
        "tokens (--max_prompt_tokens + --max_response_tokens - 1); allow at least as many",
    )
    if batch.inner_updates > 1 and (loss.loss == "reverse_kl_pg" or loss.reward_weight > 0):
        clips, weighs, decoupled = (
            loss.clip_low is not None,
            loss.is_mode != "none",
            loss.old_logprobs != "rollout",
        )
        _require(
            clips or weighs,
            f"--inner_updates {batch.inner_updates}: after the first, a policy gradient is "
            f"off-policy; "
            "set --is_mode truncate, or --clip_low for a PPO ratio",
        )
        _require(
            clips or not decoupled,
            f"--inner_updates {batch.inner_updates}: with --old_logprobs {loss.old_logprobs} "
            "--is_mode does not see what the updates change; set --clip_low for a PPO ratio",
        )
        _require(
            not (clips and weighs) or decoupled,
            f"--inner_updates {batch.inner_updates}: --clip_low and --is_mode would "
            "both weigh a token by its ratio to the sampler; keep one, or set --old_logprobs "
            "recompute",
        )


# What a ds_config must not say, because a flag owns it.
_OWNED_BY_FLAGS = {
    "train_batch_size": "--prompts_per_step and --num_generations",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--micro_batch_size",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and the AdamW flags",
    "scheduler": "--lr_schedule and --warmup_steps",
    "fp16": "--dtype",
    "bf16": "--dtype",
    "bfloat16": "--dtype",
    "torch_autocast": "--dtype",
    "amp": "--dtype",
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
    stage = content.get("zero_optimization", {})
    if (
        not isinstance(stage, dict)
        or stage.get("stage", 0) not in (0, 1, 2, 3)
        or stage.get("stage") is True
    ):
        raise ValueError(f"--ds_config {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    return content


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def validate_teachers(teachers: Sequence[TeacherSpec], flags: TeacherConfig) -> None:
    """Checks every teacher, then what they claim together. ValueError with one line."""
    _require(
        bool(teachers),
        "no teacher: give --teacher NAME=PATH (or PATH), or `teachers` in the YAML file",
    )
    names = [spec.name for spec in teachers]
    for spec in teachers:
        where = f"teachers: {spec.name}"
        _require(
            names.count(spec.name) == 1,
            f"--teacher: two teachers are called {spec.name}; names must differ",
        )
        _require(
            0 <= spec.share < math.inf,
            f"{where}: weight {spec.weight}: must be finite and at least 0",
        )
        size = spec.tensor_parallel_size
        _require(size >= 1, f"{where}: tensor_parallel_size {size} must be at least 1")
        remedy = "give it to the server" if spec.is_served else "use backend vllm"
        _require(
            size == 1 or spec.backend == "vllm",
            f"{where}: tensor_parallel_size {size}: backend {spec.backend} cannot split a model "
            f"here; {remedy}",
        )
        if spec.is_served:
            _check_served(spec, where)
        else:
            given = "urls" if spec.urls else "api_key_env"
            _require(
                not spec.urls and not spec.api_key_env,
                f"{where}: {given} given for backend {spec.backend}; set `backend: server`, or "
                f"remove it",
            )
    _check_replicas_are_distinct(teachers)
    _check_claims(teachers)
    _require(
        flags.teacher_mode != "standalone" or any(spec.is_served for spec in teachers),
        "--teacher_mode standalone: no teacher is served; give one of them urls, or use "
        "--teacher_mode auto",
    )


def _check_served(spec: TeacherSpec, where: str) -> None:
    _require(
        bool(spec.urls), f"{where}: no replicas; give `urls`, a list like [http://127.0.0.1:8000]"
    )
    for place, url in enumerate(spec.urls):
        _check_url(url, f"{where}: urls[{place}]")
    variable = spec.api_key_env
    if variable:
        _require(
            re.fullmatch("[A-Z_][A-Z0-9_]*", variable) is not None,
            f"{where}: api_key_env must be the NAME of an environment variable, in capitals; "
            f"never the key itself",
        )
        _require(
            bool(os.environ.get(variable)),
            f"{where}: api_key_env {variable}: this variable is not set; export it",
        )


def _check_url(url: str, where: str) -> None:
    address, *rest = re.split("[?#]", url, maxsplit=1)
    _require(
        "@" not in address.partition("//")[2].partition("/")[0],
        f"{where}: user info in a URL; put the key into an environment variable and name it in "
        f"`api_key_env`",
    )
    _require(is_http(address), f"{where} {address!r}: not an http(s) URL; write http://HOST:PORT")
    _require(
        not rest,
        f"{where} {address!r}: a query or fragment does not belong to a server's address; a key "
        f"goes to `api_key_env`",
    )


def is_http(url: str) -> bool:
    """Whether it names a host, by http or https."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises where it is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)


def _check_replicas_are_distinct(teachers: Sequence[TeacherSpec]) -> None:
    """One server may serve several models: its URL may stand at several teachers if `model` tells
    them apart.
    """
    seen: dict[tuple[str, str], str] = {}
    for spec in teachers:
        places = [url.replace("//localhost", "//127.0.0.1") for url in spec.urls]
        for url in places:
            _require(
                places.count(url) == 1,
                f"teachers: {spec.name}: duplicate URL {url}; list each replica once",
            )
            first = seen.setdefault((url, spec.model), spec.name)
            _require(
                first == spec.name,
                f"teachers: {spec.name}: duplicate URL {url}, teacher {first} has it too; give "
                f"each its own `model` as the "
                "server names it, or one teacher both domains",
            )


def _check_claims(teachers: Sequence[TeacherSpec]) -> None:
    """Two teachers of one domain are a mixture only if each says how much it counts."""
    claims: dict[str, list[TeacherSpec]] = {}
    for spec in teachers:
        for domain in {"*"} if spec.domains == "*" else set(spec.domains):
            claims.setdefault(domain, []).append(spec)
    for domain, claimants in sorted(claims.items()):
        names = " and ".join(spec.name for spec in claimants)
        _require(
            len(claimants) == 1 or all(spec.weight is not None for spec in claimants),
            f"teachers: the domain {domain} is claimed by {names} without weights; give each a "
            f"`weight`, or {domain} to one",
        )
        _require(
            sum(spec.share for spec in claimants) > 0,
            f"teachers: the weights of the domain {domain} sum to 0 ({names}); give one of them a "
            f"weight above 0",
        )
