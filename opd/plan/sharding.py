"""What one rank holds of a model that DeepSpeed trains: parameters, gradients, float32 masters,
AdamW moments.

Exact, not a rule of thumb: the partitions and their padding as DeepSpeed 0.19.8 makes them,
compared in the tests with the tensors of real engines. Bytes, for `width` bytes a value of the
computation type.

| stage | parameters | gradients | masters | moments |
|-------|------------|-----------|---------|---------|
| 0 | all, width | all, 4 | bfloat16: all, 4 | all, 4 + 4 |
| 1, 2 | all, width | own part, 4 | own part, 4 | own part, 4 + 4 |
| 3 | own part, width, and whole ones below a threshold | own part, 4, for the whole run | own part, 4 | own part, 4 + 4 |

AdamW keeps two moments of every value it steps on (arXiv 1412.6980) in float32, and a step count
per tensor. DeepSpeed keeps a float32 master beside the parameters in every sharded stage, in
float32 runs too; in stage 0 in bfloat16 only. Gradients are summed over micro-batches in float32
(`deepspeed_engine`). What is frozen has
parameters and nothing else: in stages 1 and 2 as they are, in stage 3 partitioned as the others.
"""  # noqa: E501

import math
from dataclasses import dataclass, replace
from typing import Any

Shapes = tuple[tuple[int, ...], ...]

FLOAT32 = 4
ADAM_MOMENTS = 2
STEP_COUNT = 4  # torch's AdamW counts steps in a float32 scalar per tensor


@dataclass(frozen=True)
class ZeroSettings:
    """The part of a ds_config's `zero_optimization` that decides memory, with DeepSpeed's defaults;
    sizes in values.
    """

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    sub_group_size: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    persistence_threshold: int = 100_000
    offloads_optimizer: bool = (
        False  # masters, moments and gradients live on the host, where AdamW runs
    )
    offloads_parameters: bool = False

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> "ZeroSettings":
        """From the content of a ds_config; keys of stage 3 may or may not carry their prefix."""
        zero = ds_config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        found = {"stage": stage, "overlap_comm": stage == 3}
        for name in (
            "reduce_bucket_size",
            "overlap_comm",
            "contiguous_gradients",
            "sub_group_size",
            "prefetch_bucket_size",
            "max_live_parameters",
            "param_persistence_threshold",
        ):
            value = zero.get(f"stage3_{name}", zero.get(name))
            if isinstance(value, int | float):
                found[name.removeprefix("param_")] = (
                    type(value)(value) if isinstance(value, bool) else int(value)
                )
        return cls(
            **found,
            offloads_optimizer=_offload_device(zero.get("offload_optimizer")) == "cpu",
            offloads_parameters=_offload_device(zero.get("offload_param")) == "cpu",
        )


def _offload_device(section: Any) -> str | None:
    return section.get("device", "none") if isinstance(section, dict) else None


@dataclass(frozen=True)
class Shard:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    masters: int
    moments: int

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _groups(shapes: Shapes) -> list[Shapes]:
    """The optimizer's groups: with weight decay, and without it (norms and biases)."""
    groups = [tuple(s for s in shapes if len(s) > 1), tuple(s for s in shapes if len(s) <= 1)]
    return [group for group in groups if group]


def zero_shard(
    shapes: Shapes, zero: ZeroSettings, *, width: int, world_size: int, frozen: Shapes = ()
) -> Shard:
    """What a rank holds of parameters of these shapes between two steps, and of gradients after the
    last backward. Of the `frozen` ones it holds parameters and nothing else.
    """
    trained = _trained_shard(shapes, zero, width, world_size)
    if zero.stage == 3:
        beside = _partitioned_parameters(frozen, zero, width, world_size)
    else:
        beside = width * _numel(frozen)
    return replace(trained, parameters=trained.parameters + beside)


def _trained_shard(shapes: Shapes, zero: ZeroSettings, width: int, world_size: int) -> Shard:
    if zero.stage == 0:
        total = _numel(shapes)
        masters = 0 if width == FLOAT32 else FLOAT32 * total
        moments = ADAM_MOMENTS * FLOAT32 * total + STEP_COUNT * len(shapes)
        return Shard(width * total, FLOAT32 * total, masters, moments)
    if zero.stage in (1, 2):
        return _flat_shard(shapes, width, world_size)
    return _partitioned_shard(shapes, zero, width, world_size)


def _flat_shard(shapes: Shapes, width: int, world_size: int) -> Shard:
    """Stages 1 and 2 lay the parameters of a group end to end, pad the row to 2 x ranks values and
    cut it into equal parts.
    """
    align = 2 * world_size
    rows = [-(-_numel(group) // align) * align for group in _groups(shapes)]
    part = sum(rows) // world_size
    return Shard(
        parameters=width * sum(rows),
        gradients=FLOAT32 * part,
        masters=FLOAT32 * part,
        moments=ADAM_MOMENTS * FLOAT32 * part + STEP_COUNT * len(rows),
    )


def _partitioned_shard(shapes: Shapes, zero: ZeroSettings, width: int, world_size: int) -> Shard:
    """Stage 3 cuts each parameter by itself, rounded up, and keeps small ones whole beside their
    parts.
    """
    part = sum(-(-math.prod(shape) // world_size) for shape in shapes)
    return Shard(
        parameters=_partitioned_parameters(shapes, zero, width, world_size),
        gradients=FLOAT32 * part,
        masters=FLOAT32 * part,
        moments=ADAM_MOMENTS * FLOAT32 * part
        + STEP_COUNT * _count_sub_groups(shapes, zero, world_size),
    )


def _partitioned_parameters(shapes: Shapes, zero: ZeroSettings, width: int, world_size: int) -> int:
    parts = [-(-math.prod(shape) // world_size) for shape in shapes]
    whole = [
        p
        for shape, p in zip(shapes, parts, strict=True)
        if math.prod(shape) <= zero.persistence_threshold
    ]
    persistent = sum(whole) * world_size if world_size > 1 else 0
    return width * (sum(parts) + persistent)


def _count_sub_groups(shapes: Shapes, zero: ZeroSettings, world_size: int) -> int:
    """Stage 3 steps on runs of parameters of about `sub_group_size` values; each is one tensor to
    AdamW.
    """
    count = 0
    for group in _groups(shapes):
        parts = [-(-math.prod(shape) // world_size) for shape in group]
        if zero.sub_group_size >= sum(parts):
            count += 1
            continue
        filled = 0
        for index, size in enumerate(parts):
            filled += size
            if filled >= zero.sub_group_size or index == len(parts) - 1:
                count, filled = count + 1, 0
    return count
