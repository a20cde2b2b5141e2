"""What the planner speaks about: a machine, a run as memory sees it, what may be chosen, and a row
of the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from opd.config import GIB, TeacherSpec, is_async
from opd.inputs.adapters import check_adapter, engines_of
from opd.inputs.lora_rules import samples_with_adapter
from opd.inputs.shapes import ModelShape, check_tensor_parallel, read_model, shape_of
from opd.inputs.teacher_prompts import longest_prompt
from opd.inputs.validation import load_ds_config
from opd.lora_config import LoraConfig
from opd.plan.sharding import Shard, ZeroSettings, zero_shard

MIB = 1 << 20
PHASES = ("rollout", "score", "train", "sync")
OFFLOADS = ("optimizer", "gradients", "parameters")  # in the order in which they leave the GPU

# (tokens of one forward, requests at once): defaults of vllm 0.32 for its `LLM` class, by the
# device's memory
ENGINE_LIMITS = {"cpu": (4096, 256), "below 70 GiB": (8192, 256), "above": (16_384, 1024)}


@dataclass(frozen=True)
class Machine:
    """What one rank has."""

    gpus: int  # ranks
    device_bytes: int  # of a GPU; without one, this rank's share of the host's free memory
    host_bytes: int  # of the node; without a GPU it is already in `device_bytes`
    pcie: float  # bytes a second between host and GPU, one direction
    is_gpu: bool


@dataclass(frozen=True)
class Choices:
    """What the planner may decide."""

    kv_cache: int  # of the rollout engine; 0 where servers write
    teacher_kv: dict[str, int]  # of each vllm teacher
    checkpointing: bool  # activations are recomputed
    offload: tuple[str, ...]  # student states on the host while they are not needed, of OFFLOADS
    support: str
    max_tokens: int  # of a micro-batch; 0 cuts by micro_batch_size
    tensor_parallel: dict[str, int]  # GPUs that share a teacher
    chunk: int  # bytes for the logits of one chunk of the loss


@dataclass(frozen=True)
class MemoryRow:
    """One participant's memory on one rank, on the device or on the host."""

    participant: str
    kind: Literal["device", "host"]
    bytes: dict[str, int]  # phase -> bytes
    moved: int = 0  # over PCIe in one step, both directions together


@dataclass(frozen=True)
class Job:
    """A run as memory sees it."""

    cfg: Any  # a script's Config, without the teachers that are served
    student: ModelShape
    teachers: dict[str, ModelShape]
    zero: ZeroSettings
    machine: Machine

    @property
    def width(self) -> int:
        """Bytes of a value of the computation type."""
        dtype = self.cfg.model.dtype
        return 2 if dtype == "bfloat16" or (dtype == "auto" and self.machine.is_gpu) else 4

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_response_tokens

    def longest_of(self, name: str) -> int:
        """Tokens of the longest sequence of a teacher, which may have longer prompts of its own, or
        of those that share its engine.
        """
        sharing = self.engines.get(name, (name,))
        longest = max(longest_prompt(self.cfg, self.spec(each)) for each in sharing)
        return longest + self.cfg.rollout.max_response_tokens

    @property
    def sequences(self) -> int:
        """Rollouts of a rank in one step."""
        return (
            -(-self.cfg.rollout.prompts_per_step // self.machine.gpus)
            * self.cfg.rollout.num_generations
        )

    @property
    def shard(self) -> Shard:
        return zero_shard(
            self.student.trained,
            self.zero,
            width=self.width,
            world_size=self.machine.gpus,
            frozen=self.student.frozen,
        )

    @property
    def samples_with_adapter(self) -> bool:
        """Whether the rollout engine takes adapters instead of whole weights."""
        return samples_with_adapter(self.cfg, self.student)

    def micro_tokens(self, choices: Choices) -> int:
        """Most tokens of a micro-batch, padding included."""
        rows = min(self.cfg.batch.micro_batch_size, self.sequences)
        return choices.max_tokens or rows * (self.longest - 1)

    @property
    def engine_limits(self) -> tuple[int, int]:
        """Tokens of one forward and requests at once in an engine of vLLM."""
        if not self.machine.is_gpu:
            return ENGINE_LIMITS["cpu"]
        return ENGINE_LIMITS["above" if self.machine.device_bytes >= 70 * GIB else "below 70 GiB"]

    @property
    def is_async(self) -> bool:
        """Whether responses are written by servers, which have devices of their own."""
        return is_async(self.cfg)

    def spec(self, name: str) -> TeacherSpec:
        return next(spec for spec in self.cfg.teachers if spec.name == name)

    @property
    def engines(self) -> dict[str, tuple[str, ...]]:
        """The engines of the teachers, by their first, and whom each is."""
        known = [spec for spec in self.cfg.teachers if spec.name in self.teachers]
        return {name: tuple(s.name for s in specs) for name, specs in engines_of(known).items()}


PCIE_GB_S = 25.0  # what PCIe 4.0 x16 gives to a pinned copy in one direction


def machine_here(world_size: int, *, pcie_gb_s: float = PCIE_GB_S) -> Machine:
    """This machine: its GPUs' memory, or on a CPU each rank's share of the host's free memory."""
    free = free_host_memory()
    if not torch.cuda.is_available():
        return Machine(world_size, free // world_size, 0, pcie_gb_s * 1e9, is_gpu=False)
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Machine(world_size, device, free, pcie_gb_s * 1e9, is_gpu=True)


def free_host_memory() -> int:
    """What the system could still give, within the container's limit if there is one."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)


def read_shapes(cfg) -> tuple[ModelShape, dict[str, ModelShape]]:
    """(student, teachers by name), from configurations alone. A served teacher has none here."""

    def shape(
        flag: str, path: str, spec: TeacherSpec | None = None, lora: LoraConfig | None = None
    ) -> ModelShape:
        model = read_model(flag, path, cfg.model.trust_remote_code)
        adapter = check_adapter(spec, model) if spec is not None else {}
        return replace(shape_of(model, flag, path, lora), **adapter)

    local = [spec for spec in cfg.teachers if not spec.is_served]
    student = shape("--student_model", cfg.model.student_model, lora=cfg.lora)
    return student, {spec.name: shape(f"--teacher {spec.name}", spec.model, spec) for spec in local}


def make_job(cfg, student: ModelShape, teachers: Mapping[str, ModelShape], machine: Machine) -> Job:
    """A run, with the shapes of its models as they were read.

    ValueError with one line for a model that says too little (Unplannable), for numbers that do not
    divide the ranks, and for a wrong ds_config. A served teacher takes no memory here: the job does
    not know it.
    """
    if cfg.model.freeze_vision:
        student = student.with_frozen_vision()
    for shape in (student, *teachers.values()):
        shape.check_plannable()
    if cfg.rollout.prompts_per_step % machine.gpus:
        raise ValueError(
            f"--prompts_per_step {cfg.rollout.prompts_per_step}: must be a multiple of the "
            f"{machine.gpus} ranks"
        )
    check_tensor_parallel(cfg, student, teachers, machine.gpus)
    cfg = replace(cfg, teachers=tuple(spec for spec in cfg.teachers if not spec.is_served))
    zero = ZeroSettings.of(load_ds_config(cfg.run.ds_config))
    return Job(cfg, student, dict(teachers), zero, machine)
