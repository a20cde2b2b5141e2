"""LoRA adapters in an engine of vLLM: its options, and what its CPU build gets wrong.

N tokens of a batch, R rank, I and O sizes of a layer's input and output.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd.ops.headers import ADAPTER_CONFIG
from opd.ops.lora import room_for_rank


def lora_options(ranks: Collection[int]) -> dict[str, Any]:
    """Options of an engine that holds an adapter of each of `ranks` at once; none without any."""
    if not ranks:
        return {}
    return {
        "enable_lora": True,
        "max_loras": len(ranks),
        "max_cpu_loras": len(ranks),
        "max_lora_rank": room_for_rank(max(ranks)),
    }


def rank_of(directory: str) -> int:
    """The largest rank of an adapter."""
    config = json.loads((Path(directory) / ADAPTER_CONFIG).read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def use_exact_kernels(worker) -> None:
    """Called by vLLM with its worker. Without a GPU, its adapters are computed as below.

    vllm 0.32 would copy an adapter for each token of the batch, and take the last adapter for a
    token that has none.
    """
    if torch.cuda.is_available():
        return
    wrappers = worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    for wrapper in wrappers:
        wrapper.__class__ = _exact(type(wrapper))


def _exact(wrapper_class: type) -> type:
    """vLLM's class for CPUs with a matrix product for each adapter of a batch."""

    class ExactWrapper(wrapper_class):
        def update_metadata(self, *args, **kwargs) -> None:
            super().update_metadata(*args, **kwargs)
            self._found = self.token_lora_indices.unique().tolist()

        def _parts(self, num_rows: int) -> Iterator[tuple[int, Tensor | slice]]:
            """(adapter, its rows of the batch); nothing for rows without one."""
            indices_N = self.token_lora_indices[:num_rows]
            for index in self._found:
                if index >= 0:
                    yield index, slice(num_rows) if len(self._found) == 1 else indices_N == index

        def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
            y_NR, x_NI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            for index, rows in self._parts(len(x_NI)):
                weight_RI = w_t_all[index].flatten(0, -2).to(y.dtype)
                y_NR[rows] = scale * (x_NI[rows].to(y.dtype) @ weight_RI.T)

        def _apply_expand(
            self,
            y: Tensor,
            x: Tensor,
            w_t_all: Tensor,
            y_offset: int,
            y_slice_size: int,
            add_inputs: bool = True,
        ) -> None:
            assert add_inputs, "an adapter adds to what the base computes"
            x_NR = x.view(-1, x.shape[-1])
            y_NO = y.view(-1, y.shape[-1])[:, y_offset : y_offset + y_slice_size]
            for index, rows in self._parts(len(x_NR)):
                weight_OR = w_t_all[index].flatten(0, -2)
                y_NO[rows] += x_NR[rows].to(y.dtype) @ weight_OR.to(y.dtype).T

    return ExactWrapper
