"""A plan for people: the table, the stacked bars, and which one or two changes would make a run
fit.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.config import GIB
from opd.plan.job import MIB, PHASES, Choices, Job
from opd.plan.memory import memory_rows, sampler_cache, teacher_cache
from opd.plan.planner import USABLE, Plan, engines_with_cache, make_plan


def table(plan: Plan) -> str:
    """Rows of participants, columns of phases, in GiB or MiB; what crosses the PCIe bus in a step
    stands behind.
    """
    unit, name = (GIB, "GiB") if plan.peak >= 4 * GIB else (MIB, "MiB")
    machine = plan.job.machine
    where = (
        "on each GPU" if machine.is_gpu else "of each process, no GPU: only teachers on disk sleep"
    )
    width = max(len(row.participant) for row in plan.rows)
    moves = machine.is_gpu
    lines = [
        f"Memory {where}, {machine.gpus} ranks, {name}"
        + (f"; moved in a step, {name}" if moves else "")
    ]
    lines.append(
        f"{'':{width}}"
        + "".join(f"{phase:>10}" for phase in PHASES)
        + ("     moved" if moves else "")
    )
    for kind, title, total in (
        ("device", "total", plan.bytes_of),
        ("host", "total on the host", plan.host_bytes),
    ):
        rows = [row for row in plan.rows if row.kind == kind]
        if not rows:
            continue
        if kind == "host":
            lines.append(f"on the host, of each of {machine.gpus} ranks")
        for row in rows:
            cells = "".join(_in_gib(row.bytes[phase], unit) for phase in PHASES)
            lines.append(
                f"{row.participant:{width}}{cells}" + (_in_gib(row.moved, unit) if moves else "")
            )
        lines.append(f"{title:{width}}" + "".join(_in_gib(total(phase), unit) for phase in PHASES))
    if plan.job.is_async:
        lines.append("rollout and log-prob servers are not in this table: devices of their own")
    return "\n".join(lines)


def _in_gib(size: int, unit: int) -> str:
    return f"{size / unit:10,.1f}" if size else f"{'.':>10}"


def verdict(plan: Plan) -> str:
    """One line: fits, or what is missing and which one or two changes would help; and what is not
    counted.
    """
    machine = plan.job.machine
    phase = max(PHASES, key=plan.bytes_of)
    usable = USABLE * machine.device_bytes
    peak = (
        f"{plan.peak / GIB:.1f} of {usable / GIB:.1f} GiB in {phase} ({USABLE:.0%} of the memory "
        "are counted on)"
    )
    host = machine.gpus * max(map(plan.host_bytes, PHASES))
    if machine.is_gpu:
        peak += f", host {host / GIB:.1f} of {machine.host_bytes / GIB:.1f} GiB"
        peak += f"; {plan.transfer_seconds:.1f} s a step on the PCIe bus"
    for _, shape, *_ in engines_with_cache(plan.job):
        if shape.keeps_states:
            peak += f"; not counted: states of {shape.flag} {shape.path}, which only vLLM knows"
    if plan.fits:
        return f"fits: {peak}"
    changes = next(remedies(plan), None)
    return f"does not fit: {peak}; " + (
        f"try {' and '.join(changes)}" if changes else _last_resort(plan, phase)
    )


def _last_resort(plan: Plan, phase: str) -> str:
    """For a run that no change of its flags makes fit, by what is too large in its worst phase."""
    if phase != "score":
        return "take a smaller student, or more GPUs"
    largest = max(plan.job.teachers, key=lambda name: plan.job.teachers[name].num_parameters)
    if plan.job.spec(largest).backend == "hf":
        return "take a smaller teacher, or --teacher_backend vllm, which divides one over GPUs"
    return "take a smaller teacher, or more GPUs"


# ---- What would make it fit ----------------------------------------------------------------------


def remedies(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Single changes that make the plan fit, then pairs of them, mildest first."""
    cfg = plan.job.cfg
    if cfg.run.plan == "off" and make_plan(plan.job, cfg.explicit).fits:
        yield ("--plan auto",)
    changes = list(_changes(plan.job, plan.choices))
    for count in (1, 2):
        for chosen in itertools.combinations(changes, count):
            job, choices = plan.job, plan.choices
            for _, change in chosen:
                job, choices = change(job, choices)
            if Plan(job, choices, memory_rows(job, choices)).fits:
                yield tuple(text for text, _ in chosen)


Change = Callable[[Job, Choices], tuple[Job, Choices]]


def _changes(job: Job, choices: Choices) -> Iterator[tuple[str, Change]]:
    """(what to write on the command line, what it does), mildest first; those that would change
    nothing are left out.
    """
    cfg, zero = job.cfg, job.zero
    if not choices.checkpointing:
        yield "--gradient_checkpointing", lambda j, c: (j, replace(c, checkpointing=True))
    if choices.max_tokens == 0 and cfg.batch.micro_batch_size > 1:
        yield "--micro_batch_size 1", _config("batch", micro_batch_size=1)
    elif choices.max_tokens >= job.longest:
        least = job.longest - 1
        yield (
            f"--max_tokens_per_micro_batch {least}",
            lambda j, c: (j, replace(c, max_tokens=least)),
        )
    least = 0 if job.is_async else sampler_cache(job)[0]
    if cfg.rollout.rollout_kv_cache_gib != "auto" and choices.kv_cache > least > 0:
        yield "--rollout_kv_cache_gib auto", lambda j, c: (j, replace(c, kv_cache=least))
    if job.machine.is_gpu and job.cfg.teacher.teacher_residency == "host":
        yield "--teacher_residency disk", _config("teacher", teacher_residency="disk")
    if cfg.teacher.teacher_cache_bytes > GIB:
        yield f"--teacher_cache_bytes {GIB}", _config("teacher", teacher_cache_bytes=GIB)
    if zero.stage < 3:
        yield "--ds_config ds_configs/zero3.json", _zero(stage=3)
    if job.machine.is_gpu and not zero.offloads_optimizer:
        yield "offload_optimizer in the ds_config", _zero(offloads_optimizer=True)
    for size in (2, 4, 8):
        possible = (
            job.machine.is_gpu
            and size <= job.machine.gpus
            and not any(shape.why_not_shared(size) for shape in job.teachers.values())
        )
        if possible and size > max(choices.tensor_parallel.values(), default=size):
            sizes = dict.fromkeys(job.teachers, size)
            text = f"tensor_parallel_size {size} of the teachers"
            yield text, functools.partial(_shared_by, sizes=sizes)
    half = cfg.rollout.max_response_tokens // 2
    yield f"--max_response_tokens {half}", _config("rollout", max_response_tokens=half)
    if not job.machine.is_gpu and any(job.spec(name).backend == "vllm" for name in job.teachers):
        yield "backend hf with --teacher_residency disk", _on_disk
    more = 2 * job.machine.gpus
    if job.machine.is_gpu:
        yield f"{more} GPUs", lambda j, c: (replace(j, machine=replace(j.machine, gpus=more)), c)


def _config(group: str, **values: Any) -> Change:
    def change(job: Job, choices: Choices) -> tuple[Job, Choices]:
        section = replace(getattr(job.cfg, group), **values)
        return replace(job, cfg=replace(job.cfg, **{group: section})), choices

    return change


def _zero(**values: Any) -> Change:
    return lambda job, choices: (
        replace(job, zero=replace(job.zero, **values)),
        replace(choices, offload=() if "offloads_optimizer" in values else choices.offload),
    )


def _shared_by(job: Job, choices: Choices, *, sizes: dict[str, int]) -> tuple[Job, Choices]:
    caches = {name: teacher_cache(job, name, sizes[name])[0] for name in choices.teacher_kv}
    given = job.cfg.teacher.teacher_kv_cache_gib != "auto"
    caches = choices.teacher_kv if given else caches
    return job, replace(choices, tensor_parallel=sizes, teacher_kv=caches)


def _on_disk(job: Job, choices: Choices) -> tuple[Job, Choices]:
    specs = tuple(replace(spec, backend="hf") for spec in job.cfg.teachers)
    job = replace(job, cfg=replace(job.cfg, teachers=specs))
    choices = replace(choices, teacher_kv={})
    return _config("teacher", teacher_residency="disk")(job, choices)


# ---- Other forms ---------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan as plain data."""
    choices = plan.choices
    return {
        "fits": plan.fits,
        "bytes": {phase: plan.bytes_of(phase) for phase in PHASES},
        "host_bytes": {phase: plan.host_bytes(phase) for phase in PHASES},
        "transfer_seconds": plan.transfer_seconds,
        "choices": {
            "rollout_kv_cache_gib": choices.kv_cache / GIB,
            "teacher_kv_cache_gib": {k: v / GIB for k, v in choices.teacher_kv.items()},
            "gradient_checkpointing": choices.checkpointing,
            "offload": list(choices.offload),
            "support": choices.support,
            "max_tokens_per_micro_batch": choices.max_tokens,
            "tensor_parallel_size": choices.tensor_parallel,
            "prefetch": plan.prefetches,
        },
        "rows": [vars(row) for row in plan.rows],
        "verdict": verdict(plan),
    }


def draw(plan: Plan, path: Path) -> None:
    """A PNG with one stacked bar per phase, and the device's memory as a line.

    ValueError if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    floor = dict.fromkeys(PHASES, 0.0)
    colours = pyplot.colormaps["tab20"].colors
    for index, row in enumerate(row for row in plan.rows if row.kind == "device"):
        heights = [row.bytes[phase] / GIB for phase in PHASES]
        axes.bar(
            PHASES,
            heights,
            bottom=list(floor.values()),
            label=row.participant,
            color=colours[index % 20],
        )
        floor = {
            phase: floor[phase] + height for phase, height in zip(PHASES, heights, strict=True)
        }
    axes.axhline(
        plan.job.machine.device_bytes / GIB, color="black", linestyle="--", label="all there is"
    )
    axes.set_ylabel("GiB on a GPU" if plan.job.machine.is_gpu else "GiB of a process")
    axes.set_title(
        f"{plan.job.student.path}, {len(plan.job.teachers)} teachers, {plan.job.machine.gpus} ranks"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
