"""Predicts a run's memory phase by phase, and chooses what the user left open so that it fits."""

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from opd.config import GIB
from opd.inputs.kv_cache import SMALL_BLOCK
from opd.inputs.shapes import ModelShape
from opd.plan.job import MIB, OFFLOADS, PHASES, Choices, Job, MemoryRow
from opd.plan.memory import (
    hidden_bytes,
    memory_rows,
    one_sequence,
    sampler_cache,
    teacher_awake,
    teacher_cache,
    teacher_weights,
    teacher_writes,
)

USABLE = 0.92  # of a device's memory: allocators leave gaps
# of it, for a micro-batch whose size is chosen: what activations take is an estimate
FILLED = 0.8
MOST_TOKENS, MOST_TOKENS_CPU = 32_768, 4096  # of a micro-batch: the processor is busy long before
KV_STEP = 64 * MIB
FEWEST_AT_ONCE = 2048  # tokens that an engine of vllm 0.32 computes: no default is lower
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

    def teacher_writes(self, name: str) -> tuple[int, bool]:
        """`memory.teacher_writes` on this machine."""
        return teacher_writes(self.job, name, int(USABLE * self.job.machine.device_bytes))

    @property
    def peak(self) -> int:
        return max(map(self.bytes_of, PHASES))

    @property
    def transfer_seconds(self) -> float:
        """Time on the PCIe bus in one step, if nothing overlaps."""
        return sum(row.moved for row in self.rows) / self.job.machine.pcie

    @property
    def fits_host(self) -> bool:
        machine = self.job.machine
        return machine.gpus * max(map(self.host_bytes, PHASES)) <= machine.host_bytes

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.job.machine.device_bytes and self.fits_host

    @property
    def prefetches(self) -> bool:
        """Whether the weights of a second teacher fit beside the one that scores."""
        awake = sorted(teacher_awake(self.job, name, self.choices) for name in self.job.engines)
        return (
            len(awake) > 1
            and self.bytes_of("score") + awake[-2] <= USABLE * self.job.machine.device_bytes
        )


def make_plan(job: Job, explicit: Set[str] | None = None) -> Plan:
    """What the run takes.

    With `explicit`, the flags that the user gave, everything else that can be chosen is chosen;
    without, caches that size themselves alone.
    """
    choices = as_configured(job)
    return _plan(
        job, _with_caches(job, choices) if explicit is None else choose(job, choices, explicit)
    )


def _plan(job: Job, choices: Choices) -> Plan:
    return Plan(job, choices, memory_rows(job, choices))


# ---- Choices -------------------------------------------------------------------------------------


def as_configured(job: Job) -> Choices:
    """What the flags say; caches that size themselves hold one sequence.

    Student states leave the GPU, all of them, where DeepSpeed can move them.
    """
    cfg = job.cfg
    choices = Choices(
        kv_cache=0,
        teacher_kv={},
        checkpointing=cfg.model.gradient_checkpointing,
        offload=OFFLOADS[: OFFLOAD_LEVEL[cfg.model.offload_student]] if _can_offload(job) else (),
        support=cfg.loss.support,
        max_tokens=cfg.batch.max_tokens_per_micro_batch,
        tensor_parallel={spec.name: spec.tensor_parallel_size for spec in cfg.teachers},
        chunk=cfg.loss.chunk_bytes,
    )
    return _with_least_caches(job, choices)


def engines_with_cache(job: Job) -> Iterator[tuple[str, ModelShape, int, int]]:
    """(flag of the cache, model, GPUs that share it, tokens of its longest sequence) of the sampler
    and the teachers that vLLM runs for this run, rollout servers that it starts included.
    """
    if not job.is_async or job.cfg.ahead.rollout_servers == ["auto"]:
        sharing = job.cfg.rollout.rollout_tensor_parallel_size
        yield "--rollout_kv_cache_gib", job.student, sharing, job.longest
    for name in job.engines:
        if job.spec(name).backend == "vllm":
            sharing = job.spec(name).tensor_parallel_size
            yield "--teacher_kv_cache_gib", job.teachers[name], sharing, job.longest_of(name)


def check_caches(job: Job) -> None:
    """ValueError for a KV cache of a given size that vLLM would refuse, minutes later.

    Where only vLLM knows how much more it takes, it is `vllm_process.room_for_one_sequence` that
    says so.
    """
    of_teachers = job.cfg.teacher.teacher_kv_cache_gib
    for flag, shape, gpus, length in engines_with_cache(job):
        size = job.cfg.rollout.rollout_kv_cache_gib if "rollout" in flag else of_teachers
        least = one_sequence(job, shape, gpus, FEWEST_AT_ONCE, SMALL_BLOCK, length=length)
        if size != "auto" and not shape.keeps_states and int(size * GIB) < least:
            raise ValueError(
                f"{flag} {size:g}: one sequence of {length} tokens takes "
                f"{math.ceil(1000 * least / GIB) / 1000:g} GiB of {shape.flag} {shape.path}; give "
                "as much, or auto"
            )


def _with_least_caches(job: Job, choices: Choices) -> Choices:
    """Caches as the flags say, or for one sequence."""
    given, of_teachers = job.cfg.rollout.rollout_kv_cache_gib, job.cfg.teacher.teacher_kv_cache_gib
    sampler = sampler_cache(job)[0] if given == "auto" else int(given * GIB)
    caches = {
        name: teacher_cache(job, name, choices.tensor_parallel[name])[0]
        if of_teachers == "auto"
        else int(of_teachers * GIB)
        for name in job.engines
        if job.spec(name).backend == "vllm"
    }
    return replace(choices, kv_cache=0 if job.is_async else sampler, teacher_kv=caches)


def _with_caches(job: Job, choices: Choices) -> Choices:
    """Caches that size themselves as large as is useful, where there is room."""
    choices = _with_least_caches(job, choices)
    if job.cfg.teacher.teacher_kv_cache_gib == "auto":
        sizes = choices.tensor_parallel
        wanted = {name: teacher_cache(job, name, sizes[name])[1] for name in choices.teacher_kv}
        phases = ("score",) if job.machine.is_gpu else PHASES
        larger = replace(choices, teacher_kv=wanted)
        if all(_room(job, larger, phase) >= 0 for phase in phases):
            choices = larger
    if job.cfg.rollout.rollout_kv_cache_gib == "auto" and not job.is_async:
        choices = replace(choices, kv_cache=_kv_cache(job, choices))
    return choices


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
    if free_tokens:
        choices = replace(choices, max_tokens=job.longest - 1)
    choices = _with_least_caches(
        job, replace(choices, tensor_parallel=_teacher_parallel(job, choices))
    )
    if job.machine.is_gpu and job.cfg.loss.loss_chunk_bytes == "auto":
        choices = replace(choices, chunk=_chunk(job, choices))
    if "gradient_checkpointing" not in explicit:
        tight = _room(job, _all_offloaded(job, choices), "train") < 0
        choices = replace(choices, checkpointing=choices.checkpointing or tight)
    if "support" not in explicit:
        choices = replace(choices, support=_support(job, choices))
    levels = (
        OFFLOAD_LEVEL.values() if "offload_student" not in explicit else (len(choices.offload),)
    )
    for level in levels if _can_offload(job) else (0,):  # what stays on the GPU need not travel
        choices = _with_caches(job, replace(choices, offload=OFFLOADS[:level]))
        enough = job.is_async or choices.kv_cache >= sampler_cache(job)[1]
        given = job.cfg.rollout.rollout_kv_cache_gib != "auto"
        if (enough or given) and all(_room(job, choices, phase) >= 0 for phase in PHASES):
            break
    return (
        replace(choices, max_tokens=_micro_batch_tokens(job, choices)) if free_tokens else choices
    )


def _room(job: Job, choices: Choices, phase: str) -> int:
    """Bytes left on the device in a phase; below 0 what is missing."""
    return int(USABLE * job.machine.device_bytes) - _plan(job, choices).bytes_of(phase)


def _all_offloaded(job: Job, choices: Choices) -> Choices:
    return replace(choices, offload=OFFLOADS if _can_offload(job) else ())


def _teacher_parallel(job: Job, choices: Choices) -> dict[str, int]:
    """The fewest GPUs that can hold each teacher while it scores, and more while their copies on
    the host do not fit: GPUs that share a model share its copy. Sizes above 1 that the user gave
    stay.
    """
    sizes = dict(choices.tensor_parallel)
    if not job.machine.is_gpu:
        return sizes
    options = {
        name: [n for n in (1, 2, 4, 8) if not job.machine.gpus % n and not shape.why_not_shared(n)]
        for name in job.engines
        if sizes[name] == 1 and job.spec(name).backend == "vllm" and (shape := job.teachers[name])
    }
    empty = _all_offloaded(job, choices)

    def with_sizes(some: Job, own: dict[str, int]) -> Choices:
        return _with_least_caches(some, replace(empty, tensor_parallel=own))

    for name, sizes_of in options.items():
        alone = replace(job, teachers={each: job.teachers[each] for each in job.engines[name]})
        fitting = (n for n in sizes_of if _room(alone, with_sizes(alone, {name: n}), "score") >= 0)
        sizes[name] = next(fitting, sizes_of[-1])
    if job.cfg.teacher.teacher_residency != "host":
        return _for_all(job, sizes)
    while not _plan(job, with_sizes(job, sizes)).fits_host:
        larger = [name for name, sizes_of in options.items() if sizes[name] < sizes_of[-1]]
        if not larger:
            break
        now = with_sizes(job, sizes)
        most = max(larger, key=lambda name: teacher_weights(job, name, now))
        sizes[most] = next(n for n in options[most] if n > sizes[most])
    return _for_all(job, sizes)


def _for_all(job: Job, sizes: dict[str, int]) -> dict[str, int]:
    """The size of an engine, for each of its teachers."""
    first = {each: name for name, members in job.engines.items() for each in members}
    return {name: sizes[first.get(name, name)] for name in sizes}


def _chunk(job: Job, choices: Choices) -> int:
    """A GPU reads the head, and adds to its gradient, once for each chunk of the loss: it gets
    chunks of a twentieth of its memory, or what is left.
    """
    wanted = min(max(job.machine.device_bytes // 20, GIB), 5 * GIB)
    empty = _all_offloaded(job, replace(choices, chunk=0))
    room = _room(job, empty, "train")
    return min(wanted, max(room, choices.chunk))


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
        plan = _plan(job, replace(choices, max_tokens=middle))
        if plan.bytes_of("train") <= FILLED * job.machine.device_bytes:
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
        plan = _plan(job, replace(_all_offloaded(job, choices), support=option))
        if job.machine.is_gpu and plan.fits_host:
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
    least, wanted = sampler_cache(job)
    size = max(least, min(wanted, room))
    rounded = -(-size // KV_STEP) if size >= wanted or size <= least else size // KV_STEP
    return max(1, rounded) * KV_STEP
