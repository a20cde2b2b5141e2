"""Configuration: each field is a flag and a YAML key, and its help text is its documentation.

A script composes its Config from the groups below. `parse` reads `--config FILE` first and lets the
command line win. Nothing here imports torch, and nothing checks a value: `opd/inputs/validation.py`
does, by the bounds in the types of the fields and by its own rules.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le

from opd.async_config import AsyncConfig
from opd.hub_names import as_named
from opd.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, option

Auto = Literal["auto"]
CHUNK_BYTES = 320 << 20  # of the loss, on a CPU
LocalBackend = Literal["vllm", "hf"]
GIB = 1 << 30  # bytes
Backend = Literal["vllm", "hf", "server"]
Difference = Literal["eos", "template", "rendering"]  # of a teacher from the student
Residency = Literal["gpu", "host", "disk"]


@dataclass(frozen=True)
class ModelConfig:
    """The student, and what all models share."""

    student_model: str = option(
        "",
        "Student: a Hugging Face model directory, or a hub id, ORG/NAME or ORG/NAME@REVISION. "
        "Required.",
        identifies=True,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Computation type of student and engines; auto is bfloat16 on a GPU and float32 on a CPU.",
    )
    offload_student: Literal["none", "states", "all"] = option(
        "states",
        "What of the student leaves the GPU while others work: nothing; optimizer states, masters "
        "and gradients; or its parameters too.",
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: slower, less memory."
    )
    freeze_vision: bool = option(
        False,
        "Leave the part of the student that reads images as it is: its image encoder, and what "
        "brings its output to the width of the text model.",
    )
    attn_implementation: str = option(
        "auto",
        "Attention of the Hugging Face student; `auto` takes the fastest that leaves out nothing "
        "of the model: flash attention on a GPU in half precision, where flash-attn is installed.",
    )
    trust_remote_code: bool = option(
        False, "Run model code that ships with a checkpoint. Off: such models are refused."
    )


SELF = "self@"  # begins the model of a teacher that is the student as it was


@dataclass(frozen=True)
class TeacherConfig:
    """Teachers on the command line; `teachers` of the YAML file is the long form."""

    teacher: list[str] = option(
        [],
        "NAME=PATH: a teacher for the domain NAME; repeat for more. A bare PATH takes every "
        "domain. NAME=BASE+ADAPTER: a LoRA adapter on a model; teachers of one base share its "
        "engine. NAME=self@0: the student as it started; self@-K: K steps ago; self@ema:DECAY: a "
        "moving average of its weights. Instead of a path, the URLs of servers of one model: "
        "NAME=http://HOST:PORT,http://HOST:PORT. The YAML key `teachers` is the long form: a list "
        "of {name, model, adapter, domains: [..] or '*', weight, backend, tensor_parallel_size, "
        "urls, api_key_env, allow: [..]}.",
    )
    teacher_backend: LocalBackend = option(
        "vllm",
        "What runs a teacher whose entry names no backend: vllm, or hf for transformers: models "
        "vLLM does not know.",
    )
    teacher_residency: Residency = option(
        "host",
        "Where a teacher's weights are while it sleeps: gpu (it never sleeps), host (pinned "
        "memory), or disk (its files only).",
    )
    allow: list[str] = option(
        [],
        "Accept a teacher that differs from the student. eos: its responses end at other tokens; "
        "template: it has no chat template, or one that cannot write the run's prompts; rendering: "
        "its chat template writes them in another way. NAME=eos,template is for one teacher.",
    )
    teacher_mode: Literal["auto", "colocate", "standalone"] = option(
        "auto",
        "When teachers score. standalone: served ones score each response as soon as it is "
        "finished; colocate: all score when all are; auto is standalone where one is served.",
    )
    teacher_wait_s: PositiveFloat = option(
        30.0,
        "How long a step waits while no replica of a served teacher answers, before the run saves "
        "and stops, s.",
    )
    teacher_timeout_s: PositiveFloat = option(
        120.0, "How long one request to a served teacher may take, s."
    )
    teacher_max_inflight: PositiveInt = option(
        32, "Requests in flight to one replica of a served teacher, per rank."
    )
    teacher_kv_cache_gib: Annotated[float | Auto, Gt(0)] = option(
        "auto",
        "KV cache of each teacher engine per GPU, GiB; auto holds the tokens of one forward, or at "
        "least one sequence. A teacher never generates.",
    )
    teacher_cache_bytes: NonNegativeInt = option(
        16 << 30,
        "Host memory of a rank for the teachers' hidden states of a step, bytes; beyond it tokens "
        "are scored on support_k.",
        fingerprinted="rollout",
    )


@dataclass(frozen=True)
class TeacherSpec:
    """One entry of `teachers`. `domains` is "*" for every domain that no other teacher claims."""

    name: str
    # of a served teacher: its name at the server or a local directory of the same model, or ""
    model: str
    domains: tuple[str, ...] | Literal["*"]
    weight: float | None = None  # relative to the other teachers of a domain, if there are any
    backend: Backend = "vllm"
    tensor_parallel_size: int = 1  # GPUs that share one copy of its weights
    urls: tuple[str, ...] = ()  # of a served teacher: its replicas
    # of a served teacher: the environment variable that holds its API key; never the key itself
    api_key_env: str = ""
    allow: tuple[Difference, ...] = ()  # what it may have otherwise than the student
    teacher_prompt: str = ""  # this and the next two: as the flag; empty or 0 is what that says
    teacher_chat_template_kwargs: str = ""  # JSON
    max_teacher_prompt_tokens: int = 0
    adapter: str = ""  # a LoRA adapter on `model`; teachers of one model share its engine
    # of `self@0`, `self@-2` or `self@ema:.99`, what follows the @; `model` is then the student's
    past: str = ""

    @property
    def share(self) -> float:
        """The weight, 1 where none is given."""
        return 1.0 if self.weight is None else self.weight

    @property
    def has_local_model(self) -> bool:
        """Whether `model` is a directory here; a served teacher may have none."""
        return bool(self.model) and Path(self.model).is_dir()

    @property
    def named_model(self) -> str:
        """The model as a configuration names it."""
        return f"{SELF}{self.past}" if self.past else as_named(self.model)

    @property
    def follows(self) -> bool:
        """Whether its weights are the student's of before, and change with every step."""
        return self.past not in ("", "0")

    @property
    def identity(self) -> tuple[str | tuple[str, ...] | float, ...]:
        """What decides what it says in a run. What runs it, and where, does not."""
        own = (self.teacher_prompt, self.teacher_chat_template_kwargs, as_named(self.adapter))
        return self.name, self.named_model, self.domains, self.share, *own

    @property
    def is_served(self) -> bool:
        """Whether it runs elsewhere: no weights, head or configuration of it are read here."""
        return self.backend == "server"


@dataclass(frozen=True)
class DataConfig:
    """Prompt files and their columns."""

    data: list[str] = option(
        [],
        "Training prompts: JSONL or parquet files, directories or hub ids. Required.",
        identifies=True,
    )
    eval_data: list[str] = option(
        [], "Held-out prompts with answers. Without it there is no evaluation."
    )
    domain_key: str = option("data_source", "Column that names a row's domain.", identifies=True)
    prompt_key: str = option(
        "prompt",
        "Column with the prompt: text, or a list of chat messages. The columns `tools` and "
        "`chat_template_kwargs`, if there, reach the chat template too.",
    )
    chat_template_kwargs: list[str] = option(
        [],
        "Variables of the chat template, as a JSON object: '{\"enable_thinking\": false}' is for "
        "all rows, DOMAIN={...} for those of one domain. For each variable a row's column wins "
        "over its domain's, and that over the one for all. In YAML an object may be a mapping.",
        is_object=True,
    )
    system_prompt: list[str] = option(
        [],
        "System message for rows that have none: TEXT for all, or DOMAIN=TEXT for one domain, "
        "which has the last word there (`DOMAIN=` is none). A text that itself begins like "
        "`word=` is written `=word=...`.",
    )
    answer_key: str = option(
        "answer", "Column with the reference answer for rewards and evaluation; may be absent."
    )
    response_key: str = option(
        "response", "Column with a dataset response, for the off-policy share of train_gkd.py."
    )
    reward_fn: list[str] = option(
        ["exact_match"],
        "Task reward, for training and evaluation: exact_match, last_number, or "
        "module:function(prompt, text) -> float. DOMAIN=REWARD sets one domain's.",
        fingerprinted="loss",
    )
    domain_weights: list[str] = option(
        [],
        "NAME=WEIGHT pairs: share of each domain in a step. Default: rows decide.",
        fingerprinted=True,
    )
    images_key: str = option(
        "images",
        "Column with the images of a prompt, for a student that sees: one or a list of paths "
        "(relative to the file), bytes, or structs with either. `<image>` in the prompt, or a part "
        "of type image, says where each is shown; by default first. May be absent.",
    )
    bad_images: Literal["error", "drop"] = option(
        "error",
        "What happens to a row with an image that cannot be read: the run ends with file and line, "
        "or the row is dropped and counted.",
    )
    allow_urls: bool = option(False, "Download images that are given as URLs, at each start.")
    max_prompt_tokens: PositiveInt = option(
        1024,
        "Longest prompt, in tokens, after the chat template; an image counts as many as it has "
        "embeddings.",
    )
    overlong_prompts: Literal["drop", "truncate"] = option(
        "drop",
        "What happens to longer prompts: drop them, or cut their beginning; those with images are "
        "dropped either way. All are counted at start.",
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Prompts of a step, sampling of responses, and the engines' KV caches."""

    prompts_per_step: PositiveInt = option(64, "Prompts in one step, over all ranks.")
    num_generations: PositiveInt = option(1, "Responses per prompt.")
    max_response_tokens: PositiveInt = option(
        1024, "Longest response, in tokens; a longer one is truncated and counted."
    )
    temperature: PositiveFloat = option(1.0, "Sampling temperature.")
    top_p: Annotated[float, Gt(0), Le(1)] = option(
        1.0, "Nucleus sampling; below 1 the sampler is no longer the student."
    )
    top_k: NonNegativeInt = option(0, "Sample from the k likeliest tokens only; 0 is off.")
    stop_token_ids: list[str] = option(
        [],
        "Tokens that end a response beside the student's EOS: ids, or tokens such as <|im_end|>. "
        "For a base student whose chat template ends a turn in another way.",
        fingerprinted=False,  # `prepare` adds the ids: a token may be written in two ways
    )
    rollout_kv_cache_gib: Annotated[float | Auto, Gt(0)] = option(
        "auto",
        "KV cache of the rollout engine per GPU, GiB; auto holds all responses at full length, or "
        "what the plan has room for.",
        fingerprinted=False,
    )
    rollout_tensor_parallel_size: PositiveInt = option(
        1,
        "GPUs that share one rollout engine: rank r is in group r // size. For a student larger "
        "than one GPU.",
        fingerprinted=False,
    )
    enforce_eager: bool = option(
        False,
        "Sample without compiling and without CUDA graphs: slower, but starts sooner and takes "
        "less memory.",
        fingerprinted=False,
    )
    parity_every: NonNegativeInt = option(
        10,
        "Compare rollout engine and student in the first two steps and every n steps, and stop "
        "where they are not the same model; 0 is never.",
        fingerprinted=False,
    )


LossName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "reverse_kl_pg"
]


@dataclass(frozen=True)
class LossConfig:
    """The loss of a token."""

    loss: LossName = option(
        "reverse_kl",
        "Divergence from the teacher, or reverse_kl_pg: the policy gradient of the reverse KL.",
        identifies=True,
    )
    support: Literal["auto", "full", "union_topk", "teacher_topk", "sampled"] = option(
        "auto",
        "Tokens the loss sums over at each position; auto is full, and sampled for reverse_kl_pg.",
    )
    support_k: PositiveInt = option(
        64, "Tokens that each side brings to the supports teacher_topk and union_topk."
    )
    tail: Literal["bucket", "generalized", "renormalize", "truncate"] = option(
        "bucket", "What happens to the mass outside a top-k support."
    )
    estimator: Literal["auto", "k1", "k2", "k3"] = option(
        "auto",
        "Estimate of the reverse KL at the sampled token; auto is k3, and k1 for reverse_kl_pg.",
    )
    jsd_beta: Annotated[float, Interval(gt=0, lt=1)] = option(
        0.5,
        "Weight of the teacher in the mixture of jsd, in (0, 1).",
        remedy="; for the limits use --loss forward_kl or reverse_kl",
    )
    skew_alpha: Annotated[float, Interval(gt=0, lt=1)] = option(
        0.1, "Share of the other distribution in the skew divergences, in (0, 1)."
    )
    loss_temperature: PositiveFloat = option(
        1.0, "Divides the logits of student and teacher in the loss."
    )
    advantage_clip: Annotated[float | None, Gt(0)] = option(
        None, "Clip the distillation advantage of reverse_kl_pg to +- this, in nats."
    )
    clip_low: Annotated[float | None, Gt(0)] = option(
        None, "PPO clip below 1; without it reverse_kl_pg is REINFORCE."
    )
    clip_high: Annotated[float | None, Gt(0)] = option(None, "PPO clip above 1; default: clip_low.")
    dual_clip: float | None = option(
        None, "Bound, above 1, on the PPO ratio where the advantage is negative."
    )
    old_logprobs: Literal["rollout", "server", "recompute"] = option(
        "rollout",
        "The old policy, which the PPO ratio is against. rollout: the sampler, by its own "
        "log-probabilities; recompute: the student before the step's first update, at the price of "
        "one more forward; server: the weights of the last push when a response was finished, "
        "asked of --logprob_servers while others are still being written. With the latter two, "
        "is_mode and reject_level weigh the old policy against the sampler.",
    )
    is_mode: Literal["none", "truncate", "mask"] = option(
        "none",
        "Importance weights against the gap between trainer and sampler: cut at is_high, or zero "
        "outside.",
    )
    is_level: Literal["token", "sequence", "geometric"] = option(
        "token", "Ratio per token, sequence, or their mean."
    )
    is_low: PositiveFloat = option(0.5, "Lower bound of the mask mode.")
    is_high: PositiveFloat = option(5.0, "Upper bound of both modes.")
    reject_level: Literal["none", "sequence", "geometric"] = option(
        "none",
        "Give no weight to a whole response whose ratio of trainer to sampler, the product over "
        "its tokens or their geometric mean, lies outside reject_low and reject_high.",
    )
    reject_low: PositiveFloat = option(0.5, "Lower bound of reject_level, at most 1.")
    reject_high: PositiveFloat = option(
        2.0, "Upper bound of reject_level, at least 1; for geometric take one near 1."
    )
    reward_weight: NonNegativeFloat = option(
        0.0, "Weight of the group-relative task advantage; 0 is pure distillation."
    )
    overlap_k: NonNegativeInt = option(
        16,
        "Top tokens of both sides that the overlap diagnostics compare; 0 is off.",
        fingerprinted=False,
    )
    loss_chunk_bytes: Annotated[int | Auto, Ge(1)] = option(
        "auto",
        "Memory for the logits of one chunk of loss tokens, bytes; auto: 320 MiB, and with --plan "
        "auto a twentieth of a GPU's memory, 1 to 5 GiB, or what is left.",
        fingerprinted=False,
    )

    @property
    def chunk_bytes(self) -> int:
        """`loss_chunk_bytes`, on a CPU where nobody has chosen it."""
        return CHUNK_BYTES if self.loss_chunk_bytes == "auto" else self.loss_chunk_bytes


@dataclass(frozen=True)
class BatchConfig:
    """How a step is cut into micro-batches, and how often it is trained on."""

    micro_batch_size: PositiveInt = option(
        8, "Sequences in one forward and backward pass per rank."
    )
    max_tokens_per_micro_batch: NonNegativeInt = option(
        0, "Cut micro-batches by tokens, padding included, instead of sequences; 0 is off."
    )
    packing: bool = option(
        False,
        "Put a micro-batch's sequences end to end instead of padding them. --plan auto does, where "
        "the student's attention then computes each as if it were alone.",
    )
    inner_updates: PositiveInt = option(
        1,
        "Optimizer steps on each batch of rollouts; the teachers score it once.",
        fingerprinted=True,
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    learning_rate: NonNegativeFloat = option(
        1e-5,
        "Peak learning rate of AdamW. For models of some billions of parameters others take 1e-5 "
        "to 5e-5; policy gradients (reverse_kl_pg) want less, about 1e-6.",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "cosine", "Decay after the warm-up."
    )
    warmup_steps: NonNegativeInt = option(0, "Steps of linear warm-up.")
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = option(
        0.1, "Learning rate at the last step, as a share of the peak."
    )
    weight_decay: NonNegativeFloat = option(0.0, "AdamW weight decay; not on biases and norms.")
    adam_beta1: Annotated[float, Interval(ge=0, lt=1)] = option(0.9, "AdamW beta1.")
    adam_beta2: Annotated[float, Interval(ge=0, lt=1)] = option(0.95, "AdamW beta2.")
    adam_eps: PositiveFloat = option(1e-8, "AdamW epsilon.")
    max_grad_norm: NonNegativeFloat = option(1.0, "Gradient norm to clip at; 0 is off.")


@dataclass(frozen=True)
class RunConfig:
    """The run directory, and what happens how often."""

    output_dir: str = option("", "Run directory. Required.")
    num_steps: NonNegativeInt = option(
        100, "Steps: batches of rollouts, each trained on inner_updates times.", fingerprinted=True
    )
    seed: NonNegativeInt = option(
        0, "Seed of data order and sampling.", fingerprinted=True, identifies=True
    )
    ds_config: str = option(
        "ds_configs/zero3.json", "DeepSpeed: sharding, offload and communication only."
    )
    eval_every: NonNegativeInt = option(0, "Evaluate every n steps; 0 is before and after only.")
    eval_max_prompts: NonNegativeInt = option(0, "Held-out prompts per domain; 0 is all.")
    save_every: Annotated[int | Auto, Ge(0)] = option(
        "auto", "Checkpoint every n steps; 0 is at the end only; auto is every 10 to 30 minutes."
    )
    time_limit: Annotated[float | None, Gt(0)] = option(
        None, "Hours from the start in which the run saves and ends; the same command continues."
    )
    keep_checkpoints: PositiveInt = option(2, "Newest checkpoints to keep.")
    rollout_samples: NonNegativeInt = option(
        4, "Responses written to rollouts/ and TensorBoard at each logged step."
    )
    rollout_every: NonNegativeInt = option(10, "Write sample responses every n steps; 0 is never.")
    report_to: str = option(
        "tensorboard",
        "Where curves go beside metrics.jsonl: tensorboard, wandb, both with a comma, or none.",
    )
    push_to_hub: str = option(
        "", "ORG/NAME on the hub for the trained model; made, private, if it does not exist."
    )
    resume: str = option("auto", "auto: newest whole checkpoint, or fresh; never; or one's path.")
    allow_change: list[str] = option(
        [], "Flags that may differ from the checkpoint's, such as learning_rate,num_steps."
    )
    plan: Literal["auto", "off"] = option(
        "auto",
        "auto: what no flag says (micro-batches, packing, gradient checkpointing, support, the "
        "loss's chunks, GPUs that share a teacher) is chosen so that the run fits its memory, and "
        "printed.",
    )
    ignore_plan: bool = option(
        False, "Start although the plan says that the run does not fit its memory."
    )
    dry_run: bool = option(False, "Print configuration, memory and two prompts; load no weights.")
    local_rank: int = option(-1, "Set by launchers.")


def is_async(config) -> bool:
    """Whether rollouts run ahead of training; the Config of train_gkd.py has no such group."""
    return getattr(config, "ahead", AsyncConfig()).mode == "async"
