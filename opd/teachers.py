"""Teachers: colocated engines that return hidden states, their `lm_head`, and the pool that routes by domain.

L response length, K support size, V vocabulary, H teacher hidden size.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from opd.config import LossConfig, TeacherSpec
from opd.fused_linear import score_hidden
from opd.types import Rollout, TeacherPayload, TeacherScores
from opd.vllm_engine import HiddenStateEngine

HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")


def load_head(model_dir: str) -> Tensor:
    """The output projection [V, H] from the safetensors of a checkpoint: `lm_head`, or the tied embedding.

    Read by name and nothing else is: a 32B teacher costs one tensor. Raises ValueError naming the directory.
    """
    root = Path(model_dir)
    index = root / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(root / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    tied = json.loads((root / "config.json").read_text()).get("tie_word_embeddings", False)
    names = HEAD_NAMES[1:] + HEAD_NAMES[:1] if tied else HEAD_NAMES
    for name in names:
        if name in files:
            with safe_open(root / files[name], framework="pt") as file:
                return file.get_tensor(name)
    raise ValueError(f"{model_dir}: none of {', '.join(HEAD_NAMES)} in its safetensors")


class ColocatedTeacher:
    """One teacher on this rank's GPU: asleep but while it scores. Its head stays on the host and visits the GPU."""

    def __init__(self, spec: TeacherSpec, engine: HiddenStateEngine, head_VH: Tensor):
        self.name, self.spec, self.engine = spec.name, spec, engine
        self.head_VH = head_VH.pin_memory() if torch.cuda.is_available() else head_VH

    @property
    def awake(self) -> bool:
        return self.engine.awake

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self, tags: list[str] | None = None) -> None:
        self.engine.wake(tags)

    def hidden_states(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """[L, H] per rollout: the state that predicts response token t is the one at its predecessor."""
        states = self.engine.hidden_states([(r.prompt.token_ids + r.response_ids)[:-1] for r in rollouts])
        return [state[len(r.prompt.token_ids) - 1 :] for r, state in zip(rollouts, states, strict=True)]


class TeacherPool:
    """Scores each rollout with the teachers of its own domain. One teacher, many and mixtures are the same path."""

    def __init__(
        self, teachers: Sequence[ColocatedTeacher], routes: dict[str, tuple[tuple[str, float], ...]],
        cfg: LossConfig, *, payload: TeacherPayload, device: torch.device,
    ):  # fmt: skip
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.routes, self.cfg, self.payload, self.device = routes, cfg, payload, device
        self._resident: tuple[str, Tensor] | None = None

    def head(self, name: str) -> Tensor:
        """The teacher's head [V, H] on the device. One is resident at a time."""
        if self._resident is None or self._resident[0] != name:
            self._resident = None  # free the last one before the next arrives
            self._resident = (name, self.teachers[name].head_VH.to(self.device, non_blocking=True))
        return self._resident[1]

    def release_head(self) -> None:
        self._resident = None

    def score(self, rollouts: Sequence[Rollout]) -> list[tuple[TeacherScores, ...]]:
        """One tuple of scores per rollout, in the order of the rollouts; every teacher wakes at most once."""
        work: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, rollout in enumerate(rollouts):
            for name, weight in self.routes[rollout.prompt.domain]:
                work[name].append((index, weight))
        scores: list[list[TeacherScores]] = [[] for _ in rollouts]
        for name, teacher in self.teachers.items():
            if not work[name]:
                continue
            mine = [rollouts[index] for index, _ in work[name]]
            teacher.wake()
            try:
                states = teacher.hidden_states(mine)
            finally:
                teacher.sleep()
            for (index, weight), rollout, hidden_LH in zip(work[name], mine, states, strict=True):
                scores[index].append(self._score(name, weight, rollout, hidden_LH))
        self.release_head()
        return [tuple(row) for row in scores]

    def _score(self, name: str, weight: float, rollout: Rollout, hidden_LH: Tensor) -> TeacherScores:
        if not torch.isfinite(hidden_LH).all():
            raise FloatingPointError(f"teacher {name}: hidden states of prompt {rollout.prompt.prompt_id} are not finite")
        if self.payload == "hidden":
            return TeacherScores(teacher=name, weight=weight, hidden=hidden_LH)
        head_VH = self.head(name)
        result = score_hidden(
            hidden_LH.to(self.device, head_VH.dtype), head_VH, torch.tensor(rollout.response_ids, device=self.device),
            support_k=self.cfg.support_k if self.payload == "topk" else 0, temperature=self.cfg.loss_temperature,
            chunk_bytes=self.cfg.loss_chunk_mib << 20,
        )  # fmt: skip
        return TeacherScores(
            teacher=name, weight=weight, sampled_logprobs=result.sampled_logprobs_N.cpu(), entropy=result.entropy_N.cpu(),
            topk_ids=_to_host(result.topk_ids_NK), topk_logprobs=_to_host(result.topk_logprobs_NK),
        )  # fmt: skip


def _to_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
