"""What the planner speaks about: a machine, a run as memory sees it, what may be chosen, and a row of the result."""

from dataclasses import dataclass
from typing import Any, Literal

from opd.shapes import ModelShape
from opd.sharding import Shard, ZeroSettings, zero_shard

GIB, MIB = 1 << 30, 1 << 20
PHASES = ("rollout", "score", "train", "sync")
OFFLOADS = ("optimizer", "gradients", "parameters")  # in the order in which they leave the GPU

# (tokens of one forward, requests at once): defaults of vllm 0.32 for its `LLM` class, by the device's memory
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

    kv_cache: int  # of the rollout engine
    offload: tuple[str, ...]  # student states on the host while they are not needed, of OFFLOADS
    support: str
    max_tokens: int  # of a micro-batch; 0 cuts by micro_batch_size
    tensor_parallel: dict[str, int]  # GPUs that share a teacher


@dataclass(frozen=True)
class Row:
    """One participant's memory on one rank, on the device or on the host."""

    participant: str
    kind: Literal["device", "host"]
    bytes: dict[str, int]  # phase -> bytes
    moved: int = 0  # over PCIe in one step, both directions together


@dataclass(frozen=True)
class Job:
    """A run as memory sees it."""

    cfg: Any  # a script's Config
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

    @property
    def sequences(self) -> int:
        """Rollouts of a rank in one step."""
        return -(-self.cfg.rollout.prompts_per_step // self.machine.gpus) * self.cfg.rollout.num_generations

    @property
    def shard(self) -> Shard:
        return zero_shard(self.student.parameters, self.zero, width=self.width, world_size=self.machine.gpus)

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

    def spec(self, name: str):
        return next(spec for spec in self.cfg.teachers if spec.name == name)

    @property
    def residency(self) -> str:
        return getattr(self.cfg.teacher, "teacher_residency", "host")

    def backend(self, name: str) -> str:
        return getattr(self.spec(name), "backend", "vllm")
