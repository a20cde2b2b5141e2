"""Teachers: colocated engines that return hidden states, their `lm_head`, and the pool that routes by domain.

L response length, K support size, V vocabulary, H teacher hidden size.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from opd.config import LossConfig, TeacherSpec
from opd.fused_linear import score_hidden
from opd.types import Rollout, TeacherPayload, TeacherScores
from opd.vllm_engine import HiddenStateEngine

HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")


def find_head(model: str) -> tuple[Path, str]:
    """(file, tensor name) of a checkpoint's output projection: `lm_head`, or the tied embedding.

    `model` is a directory or a hub id, which is fetched. Raises ValueError if its safetensors hold neither.
    """
    root = Path(model)
    if not root.is_dir():
        root = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    index = root / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(root / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    tied = json.loads((root / "config.json").read_text()).get("tie_word_embeddings", False)
    for name in HEAD_NAMES[1:] + HEAD_NAMES[:1] if tied else HEAD_NAMES:
        if name in files:
            return root / files[name], name
    raise ValueError(f"--teacher {model}: none of {', '.join(HEAD_NAMES)} in its safetensors")


def load_head(model: str) -> Tensor:
    """The output projection [V, H], in the checkpoint's dtype. One tensor is read, whatever the size of the model."""
    path, name = find_head(model)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


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
        cfg: LossConfig, *, payload: TeacherPayload, shared_vocab: int, device: torch.device,
    ):  # fmt: skip
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.routes, self.cfg, self.payload, self.device = routes, cfg, payload, device
        self.shared_vocab = shared_vocab  # padded vocabularies differ; what they share is what the tokenizer can say
        self._resident: tuple[str, Tensor] | None = None

    def head(self, name: str) -> Tensor:
        """The teacher's head [V, H] on the device, cut to the shared vocabulary. One is resident at a time."""
        if self._resident is None or self._resident[0] != name:
            self._resident = None  # free the last one before the next arrives
            self._resident = (name, self.teachers[name].head_VH[: self.shared_vocab].to(self.device, non_blocking=True))
        return self._resident[1]

    def release_head(self) -> None:
        self._resident = None

    def score(self, rollouts: Sequence[Rollout]) -> list[tuple[TeacherScores, ...]]:
        """One tuple of scores per rollout, in the order of the rollouts; every teacher wakes at most once."""
        for rollout in rollouts:
            if max(rollout.response_ids) >= self.shared_vocab:
                raise RuntimeError(
                    f"prompt {rollout.prompt.prompt_id}: the student wrote token {max(rollout.response_ids)}, which lies in "
                    f"the padding beyond the {self.shared_vocab} tokens that all models share"
                )
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
            for (index, weight), score in zip(work[name], self._score(name, mine, states), strict=True):
                scores[index].append(replace(score, weight=weight))
        self.release_head()
        return [tuple(row) for row in scores]

    def _score(self, name: str, rollouts: Sequence[Rollout], states: Sequence[Tensor]) -> list[TeacherScores]:
        """One teacher's scores, all responses in one pass over its head."""
        for rollout, hidden_LH in zip(rollouts, states, strict=True):
            if not torch.isfinite(hidden_LH).all():
                raise FloatingPointError(
                    f"teacher {name}: prompt {rollout.prompt.prompt_id}: hidden states are not finite"
                )
        if self.payload == "hidden":
            return [TeacherScores(teacher=name, weight=1.0, hidden=hidden_LH) for hidden_LH in states]
        head_VH = self.head(name)
        labels_N = torch.tensor([token for r in rollouts for token in r.response_ids], device=self.device)
        result = score_hidden(
            torch.cat(list(states)).to(self.device, head_VH.dtype), head_VH, labels_N,
            support_k=min(self.cfg.support_k, len(head_VH)) if self.payload == "topk" else 0,
            temperature=self.cfg.loss_temperature, chunk_bytes=self.cfg.loss_chunk_mib << 20,
        )  # fmt: skip
        lengths = [len(r.response_ids) for r in rollouts]
        fields = {
            "sampled_logprobs": result.sampled_logprobs_N,
            "entropy": result.entropy_N,
            "topk_ids": result.topk_ids_NK,
            "topk_logprobs": result.topk_logprobs_NK,
        }
        parts = {key: value.cpu().split(lengths) for key, value in fields.items() if value is not None}
        return [
            TeacherScores(teacher=name, weight=1.0, **{key: part[i] for key, part in parts.items()})
            for i in range(len(rollouts))
        ]
