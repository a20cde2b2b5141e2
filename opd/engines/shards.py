"""DeepSpeed's shards read as what they hold: whole tensors by name, without an engine and on any
number of ranks.

Under ZeRO-3 a rank owns an equal slice of every parameter, the last one padded: of the float32
masters, and of each of AdamW's moments. Its file holds these slices end to end, sub-group by
sub-group. Below stage 3 rank 0's file holds the parameters themselves. Files are mapped, not read,
so one tensor at a time is in memory.

The files are pickles that name DeepSpeed's classes: check their hashes first.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASTERS = "fp32"  # beside the names that AdamW gives its moments


class Shards:
    """The shards below a checkpoint's directory. ValueError if they are not what is expected."""

    def __init__(self, directory: Path):
        folder = Path(directory) / "shards"
        self._models = _in_order(folder, "*model_states.pt")
        self._optims = _in_order(folder, "*optim_states.pt")
        if not self._models:
            raise ValueError(f"{folder}: no shards of DeepSpeed in it")
        self._states = _load(self._models[0])
        self._slices = [_load(path)["optimizer_state_dict"] for path in self._optims]
        self.stage = int(self._slices[0]["zero_stage"]) if self._slices else 0

    @staticmethod
    def count(directory: Path) -> int:
        """Ranks that have written optimizer shards below a checkpoint's directory."""
        return len(_in_order(Path(directory) / "shards", "*optim_states.pt"))

    @property
    def moments(self) -> list[str]:
        """AdamW's names of what it keeps for every element of a parameter."""
        state = self._slices[0]["optimizer_state_dict"]["state"][0]
        return [key for key, value in state.items() if value.ndim > 0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters in training."""
        enabled = self._states["ds_config"].get("bf16", {}).get("enabled", False)
        return torch.bfloat16 if enabled else torch.float32

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers, such as a router's bias, by the names of the engine's module."""
        for name in self._states["buffer_names"]:
            if name in self._states["module"]:
                yield name, self._states["module"][name]

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters in the dtype of training, by the names of the engine's module; of tied
        ones one name at least.
        """
        if self.stage == 3:
            for name, master in self.whole(MASTERS):
                yield name, master.to(self.dtype)
            return
        buffers = set(self._states["buffer_names"])
        yield from ((n, t) for n, t in self._states["module"].items() if n not in buffers)

    @property
    def names(self) -> set[str]:
        """Of the parameters, without reading one."""
        if self.stage == 3:
            return {name for shapes in self._states["param_shapes"] for name in shapes}
        return self._states["module"].keys() - set(self._states["buffer_names"])

    def whole(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Under ZeRO-3: (name, float32 tensor) of the masters or of one of AdamW's moments."""
        assert self.stage == 3, self.stage
        parts = [self._flat(state, key) for state in self._slices]
        group, offset = 0, 0
        for shapes in self._states["param_shapes"]:
            for name, shape in shapes.items():
                numel = math.prod(shape)
                size = -(-numel // len(parts))
                if offset == parts[0][group].numel():  # a parameter lies in one sub-group
                    group, offset = group + 1, 0
                slices = [part[group].narrow(0, offset, size) for part in parts]
                yield name, torch.cat(slices).narrow(0, 0, numel).view(shape)
                offset += size

    def steps(self) -> Tensor:
        """AdamW's count of its steps, the same for every parameter."""
        return self._slices[0]["optimizer_state_dict"]["state"][0]["step"]

    @staticmethod
    def _flat(state: dict[str, Any], key: str) -> list[Tensor]:
        """A rank's slices, a flat tensor per sub-group."""
        if key == MASTERS:
            return [flat.detach() for flat in state["fp32_flat_groups"]]
        moments = state["optimizer_state_dict"]["state"]
        return [moments[index][key] for index in range(len(moments))]


def _in_order(folder: Path, pattern: str) -> list[Path]:
    """Files by rank: 10 comes behind 9."""

    def key(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    return sorted(folder.glob(pattern), key=key)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
