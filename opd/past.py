"""Teachers that are the student as it was K steps ago, or the moving average of its weights.

Their weights come from the student after every step, at the push to the sampler, on every rank
alike: each rank keeps its own copies on the host. `self@0`, the student as it started, needs none
of this: it is the model that the student was read from.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd import distributed
from opd.config import TeacherSpec
from opd.student import Student
from opd.teachers import ColocatedTeacher

Weights = dict[str, Tensor]  # under the names of transformers' model


class History(Protocol):
    """What is kept of the student beside what the teacher has."""

    def take(self, name: str, tensor: Tensor) -> None:
        """One of the student's tensors of now; it is valid in this call only."""

    def due(self) -> Weights | None:
        """After the last of them: the teacher's weights for the coming step; None if they stay."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class StepsBack:
    """The student of K steps ago: the K copies between the teacher's weights and the student's."""

    def __init__(self, steps: int):
        self.steps = steps
        self._copies: deque[Weights] = deque()
        self._new: Weights = {}

    def take(self, name: str, tensor: Tensor) -> None:
        self._new[name] = tensor.to("cpu", copy=True)

    def due(self) -> Weights | None:
        self._copies.append(self._new)
        self._new = {}
        return self._copies.popleft() if len(self._copies) > self.steps else None

    def state(self) -> dict[str, Tensor]:
        return {f"{n}/{name}": t for n, kept in enumerate(self._copies) for name, t in kept.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._copies.clear()
        for key in sorted(tensors, key=lambda key: int(key.partition("/")[0])):
            place, _, name = key.partition("/")
            if int(place) == len(self._copies):
                self._copies.append({})
            self._copies[-1][name] = tensors[key]


class MovingAverage:
    """The exponential moving average: decay * average + (1 - decay) * weights, after every step.

    Kept in float32: in bfloat16 a small step would be rounded away, again and again.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._average: Weights = {}

    def take(self, name: str, tensor: Tensor) -> None:
        if name not in self._average:
            self._average[name] = tensor.to("cpu", torch.float32, copy=True)
        elif tensor.is_floating_point():
            self._average[name].lerp_(tensor.to("cpu", torch.float32), 1 - self.decay)

    def due(self) -> Weights:
        return self._average

    def state(self) -> dict[str, Tensor]:
        return self._average

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._average = dict(tensors)


class PastTeacher:
    """One of them: its engine, its head and its history."""

    def __init__(self, spec: TeacherSpec, teacher: ColocatedTeacher, history: History):
        self.name, self.teacher, self.history = spec.name, teacher, history
        self.head_names: tuple[str, ...] = ()  # of the head's weight and, if it has one, its bias

    def load(self, weights: Weights) -> None:
        """The teacher has these weights from now on, its head included."""
        self.teacher.engine.load_weights(weights.items())
        for name, tensor in self._head().items():
            tensor.copy_(weights[name])
        self.teacher.remember_canaries()

    def _head(self) -> Weights:
        head = self.teacher.head
        tensors = [tensor for tensor in (head.weight_VH, head.bias_V) if tensor is not None]
        return dict(zip(self.head_names, tensors, strict=True))

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs: what the teacher has, and its history."""
        own = self.teacher.engine.weights() | self._head()
        found = {f"own/{name}": tensor for name, tensor in own.items()}
        return found | {f"history/{name}": tensor for name, tensor in self.history.state().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"own": {}, "history": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.history.load_state(parts["history"])
        self.load(parts["own"])


class PastTeachers:
    """All of them. `follow` is asked after every push; nothing happens where there are none."""

    def __init__(self, teachers: Iterable[ColocatedTeacher], student: Student):
        self._student, self._version = student, -1
        self._teachers = [
            PastTeacher(t.spec, t, history_of(t.spec)) for t in teachers if t.spec.follows
        ]
        for teacher in self._teachers:
            teacher.head_names = _head_names(student.model)

    def follow(self, version: int) -> None:
        """The student has the weights of `version`: what is due to each teacher goes to it.

        Once per version, so that the push at a resumed run's start changes nothing. Collective.
        """
        if not self._teachers or version == self._version:
            return
        for name, tensor in self._student.named_full_tensors():
            for teacher in self._teachers:
                teacher.history.take(name, tensor)
        for teacher in self._teachers:
            if (weights := teacher.history.due()) is not None:
                teacher.load(weights)
        self._version = version

    def save(self, directory: Path) -> None:
        """Into a checkpoint, by rank 0: all ranks have the same."""
        if distributed.rank() == 0:
            for teacher in self._teachers:
                tensors = {k: t.detach().cpu().contiguous() for k, t in teacher.state().items()}
                save_file(_apart(tensors), directory / _past_file(teacher.name))

    def load(self, directory: Path, version: int) -> None:
        """From the checkpoint of `version`."""
        for teacher in self._teachers:
            with safe_open(directory / _past_file(teacher.name), framework="pt") as file:
                teacher.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - it is no dict
        self._version = version


def history_of(spec: TeacherSpec) -> History:
    """What follows from `self@-K` or `self@ema:DECAY`."""
    kind, _, decay = spec.past.partition(":")
    return MovingAverage(float(decay)) if kind == "ema" else StepsBack(-int(spec.past))


def _head_names(model: torch.nn.Module) -> tuple[str, ...]:
    """The names under which a checkpoint's tensors hold the head: the embedding's, if it is it."""
    head = model.get_output_embeddings()
    wanted: Sequence[Tensor] = list(head.parameters())
    named = dict(model.named_parameters())
    return tuple(next(name for name, p in named.items() if p is own) for own in wanted)


def _past_file(name: str) -> str:
    return f"past_{name.encode().hex()}.safetensors"


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without shared memory, which safetensors does not write."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return found
