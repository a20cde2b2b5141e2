"""Predicts a run's memory phase by phase, and chooses what the user left open so that it fits."""

from collections.abc import Set
from dataclasses import dataclass, replace

from opd.config import GIB
from opd.plan.job import MIB, OFFLOADS, PHASES, Choices, Job, MemoryRow
from opd.plan.memory import hidden_bytes, kv_least, kv_wanted, memory_rows, teacher_awake

USABLE = 0.92  # of a device's memory: allocators leave gaps
MOST_TOKENS, MOST_TOKENS_CPU = 32_768, 4096  # of a micro-batch: the processor is busy long before
KV_STEP = 64 * MIB
OFFLOAD_LEVEL = {
    "none": 0,
    "states": 2,
    "all": 3,
}  # how many of OFFLOADS leave with --offload_student


@dataclass(frozen=True)
class Plan:
    """A prediction for one rank: rows of bytes per phase, and what was chosen."""

    job: Job
    choices: Choices
    rows: list[MemoryRow]

    def bytes_of(self, phase: str) -> int:
        """Most bytes on the device in a phase.

        On a CPU: what the process's memory grows by, from the end of `prepare` on.
        """
        return sum(row.bytes[phase] for row in self.rows if row.kind == "device")

    def host_bytes(self, phase: str) -> int:
        """Bytes of this rank on the host in a phase; 0 on a CPU, where all is in `bytes_of`."""
        return sum(row.bytes[phase] for row in self.rows if row.kind == "host")

    def spare(self, phase: str) -> int:
        """Bytes of the device that nobody claims in a phase; none on a CPU, whose memory is
        everybody's.
        """
        machine = self.job.machine
        return (
            max(0, int(USABLE * machine.device_bytes) - self.bytes_of(phase))
            if machine.is_gpu
            else 0
        )

    @property
    def peak(self) -> int:
        return max(map(self.bytes_of, PHASES))

    @property
    def transfer_seconds(self) -> float:
        """Time on the PCIe bus in one step, if nothing overlaps."""
        return sum(row.moved for row in self.rows) / self.job.machine.pcie

    @property
    def fits(self) -> bool:
        machine = self.job.machine
        host = machine.gpus * max(map(self.host_bytes, PHASES))
        return self.peak <= USABLE * machine.device_bytes and host <= machine.host_bytes

    @property
    def prefetches(self) -> bool:
        """Whether the weights of a second teacher fit beside the one that scores."""
        awake = sorted(teacher_awake(self.job, name, self.choices) for name in self.job.teachers)
        return (
            len(awake) > 1
            and self.bytes_of("score") + awake[-2] <= USABLE * self.job.machine.device_bytes
        )


def make_plan(job: Job, explicit: Set[str] | None = None) -> Plan:
    """What the run takes.

    With `explicit`, the flags that the user gave, everything else that can be chosen is chosen.
    """
    choices = as_configured(job)
    if explicit is not None:
        choices = choose(job, choices, explicit)
    return Plan(job, choices, memory_rows(job, choices))


# ---- Choices -------------------------------------------------------------------------------------


def as_configured(job: Job) -> Choices:
    """What the flags say.

    Student states leave the GPU, all of them, where DeepSpeed can move them.
    """
    cfg = job.cfg
    return Choices(
        kv_cache=int(cfg.rollout.rollout_kv_cache_gib * GIB),
        offload=OFFLOADS[: OFFLOAD_LEVEL[cfg.model.offload_student]] if _can_offload(job) else (),
        support=cfg.loss.support,
        max_tokens=cfg.batch.max_tokens_per_micro_batch,
        tensor_parallel={spec.name: spec.tensor_parallel_size for spec in cfg.teachers},
    )


def _can_offload(job: Job) -> bool:
    """DeepSpeed 0.19.8 moves the states of an engine that shards them and does not offload them by
    itself. With asynchronous rollouts they stay: no sampler needs their place.
    """
    zero = job.zero
    return (
        job.machine.is_gpu
        and not job.is_async
        and zero.stage > 0
        and not zero.offloads_optimizer
        and not zero.offloads_parameters
    )


def choose(job: Job, choices: Choices, explicit: Set[str]) -> Choices:
    """The cheapest choices that fit, phase by phase; where nothing fits, those that need least."""
    free_tokens = not explicit & {"max_tokens_per_micro_batch", "micro_batch_size"}
    free_cache = "rollout_kv_cache_gib" not in explicit and not job.is_async
    choices = replace(choices, tensor_parallel=_teacher_parallel(job, choices))
    if free_tokens:
        choices = replace(choices, max_tokens=job.longest - 1)
    if "support" not in explicit:
        choices = replace(choices, support=_support(job, choices))
    levels = (
        OFFLOAD_LEVEL.values() if "offload_student" not in explicit else (len(choices.offload),)
    )
    for level in levels if _can_offload(job) else (0,):  # what stays on the GPU need not travel
        choices = replace(choices, offload=OFFLOADS[:level])
        if free_cache:
            choices = replace(choices, kv_cache=_kv_cache(job, choices))
        enough = not free_cache or choices.kv_cache >= kv_wanted(job)
        if enough and all(_room(job, choices, phase) >= 0 for phase in PHASES):
            break
    return (
        replace(choices, max_tokens=_micro_batch_tokens(job, choices)) if free_tokens else choices
    )


def _room(job: Job, choices: Choices, phase: str) -> int:
    """Bytes left on the device in a phase; below 0 what is missing."""
    return int(USABLE * job.machine.device_bytes) - Plan(
        job, choices, memory_rows(job, choices)
    ).bytes_of(phase)


def _all_offloaded(job: Job, choices: Choices) -> Choices:
    return replace(choices, offload=OFFLOADS if _can_offload(job) else ())


def _teacher_parallel(job: Job, choices: Choices) -> dict[str, int]:
    """The fewest GPUs that can hold each teacher while it scores; sizes above 1 that the user gave
    stay.
    """
    sizes = dict(choices.tensor_parallel)
    if not job.machine.is_gpu:
        return sizes
    for name, shape in job.teachers.items():
        if sizes[name] > 1 or job.spec(name).backend != "vllm":
            continue
        alone = replace(job, teachers={name: shape})
        options = [
            n for n in (1, 2, 4, 8) if job.machine.gpus % n == 0 and not shape.why_not_shared(n)
        ]
        fitting = (
            n
            for n in options
            if _room(
                alone, replace(_all_offloaded(job, choices), tensor_parallel={name: n}), "score"
            )
            >= 0
        )
        sizes[name] = next(fitting, options[-1])
    return sizes


def _micro_batch_tokens(job: Job, choices: Choices) -> int:
    """The most tokens that training has room for, at least one sequence, at most what a
    step has.
    """
    low = job.longest - 1
    high = max(
        low, min(MOST_TOKENS if job.machine.is_gpu else MOST_TOKENS_CPU, job.sequences * low)
    )
    while low < high:
        middle = (low + high + 1) // 2
        if _room(job, replace(choices, max_tokens=middle), "train") >= 0:
            low = middle
        else:
            high = middle - 1
    return low


def _support(job: Job, choices: Choices) -> str:
    """auto, unless a policy gradient asks for less, if most hidden states find room; then top-k;
    then the sampled token.
    """
    cfg = job.cfg
    if choices.support != "auto" or cfg.loss.loss == "reverse_kl_pg":
        return choices.support
    options = (
        ["auto", "teacher_topk", "sampled"]
        if cfg.loss.loss == "reverse_kl"
        else ["auto", "teacher_topk"]
    )
    if hidden_bytes(job) > 2 * cfg.teacher.teacher_cache_bytes:
        options.remove("auto")  # more than half would be spilled, and trained on as top-k anyway
    for option in options:
        candidate = replace(_all_offloaded(job, choices), support=option)
        plan = Plan(job, candidate, memory_rows(job, candidate))
        on_host = job.machine.gpus * max(map(plan.host_bytes, PHASES))
        if job.machine.is_gpu and on_host <= job.machine.host_bytes:
            return option
        if not job.machine.is_gpu and plan.bytes_of("train") <= USABLE * job.machine.device_bytes:
            return option
    return options[0]


def _kv_cache(job: Job, choices: Choices) -> int:
    """As much as all rollouts need, or what is left, at least one sequence; a multiple
    of 64 MiB.
    """
    empty = replace(choices, kv_cache=0)
    room = min(
        _room(job, empty, phase) for phase in (("rollout",) if job.machine.is_gpu else PHASES)
    )
    size = max(kv_least(job), min(kv_wanted(job), room))
    rounded = (
        -(-size // KV_STEP) if size >= kv_wanted(job) or size <= kv_least(job) else size // KV_STEP
    )
    return max(1, rounded) * KV_STEP
