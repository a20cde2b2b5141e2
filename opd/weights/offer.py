"""What a trainer says of weights that it is about to broadcast, checked against the model before
anything is allocated.

Names, shapes, dtypes and hashes come in the control request, as JSON and behind the token
(`server_control`). The bytes come over a group that knows no token (`weight_broadcast`), and are
believed when they are what was said.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opd.weights.store import check_names

Backend = Literal["gloo", "nccl"]

SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 10, 1 << 30
LONGEST_STALL = 600.0  # that a trainer may ask a server for
MOST_OFFER_BYTES = 32 << 20  # of a control request: a few hundred bytes for each tensor
MOST_HEADER_BYTES = 100_000_000  # safetensors' own bound
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Receivers:
    """The processes of a server that take weights, and the parameters of their model by name, tied
    ones under each.
    """

    workers: int
    backend: Backend
    parameters: Mapping[str, Tensor]  # shapes only: they may lie on the meta device


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Where a trainer waits, and what it is about to send.

    Plain values: it is handed on to other processes.
    """

    host: str  # where the request came from; never what a request says
    port: int
    seconds: float  # one wait
    chunk_bytes: int
    workers: int
    backend: Backend
    # {"size", "sha256", "header"}: safetensors files, and the header of each
    shards: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order in which they are sent."""
        return [name for shard in self.shards for name, *_ in entries_of(shard["header"])]


def backend_of(device: torch.device | str) -> Backend:
    """What carries tensors to a device."""
    return "nccl" if torch.device(device).type == "cuda" else "gloo"


def read_offer(body: Any, host: str, receivers: Receivers) -> Offer:
    """What a control request says of a broadcast.

    ValueError for what cannot be, or does not fit the model.
    """
    try:
        offer = Offer(
            host=host,
            port=_whole(body["port"], 1, 65535),
            seconds=_seconds(body["seconds"]),
            chunk_bytes=_whole(body["chunk_bytes"], SMALLEST_CHUNK, LARGEST_CHUNK),
            workers=receivers.workers,
            backend=receivers.backend,
            shards=[_checked_shard(shard) for shard in body["shards"]],
        )
        entries = [entry for shard in offer.shards for entry in entries_of(shard["header"])]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"broadcast: {type(error).__name__}: {error}") from None
    if len(set(offer.names)) < len(offer.names):
        raise ValueError("broadcast: two tensors of one name")
    check_names(offer.names, receivers.parameters)
    for name, _, shape, _ in entries:
        if shape != tuple(receivers.parameters[name].shape):
            expected = tuple(receivers.parameters[name].shape)
            raise ValueError(
                f"{name}: {shape} was published, and the model has {expected}; --model must be "
                f"the trainer's"
            )
    return offer


def entries_of(
    header: dict[str, Any],
) -> list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, int]]]:
    """(name, dtype, shape, where its bytes are) of the tensors of a safetensors header,
    by place.
    """
    entries = [
        (name, DTYPES[entry["dtype"]], tuple(entry["shape"]), tuple(entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(entries, key=lambda entry: entry[3])


def data_bytes(header: dict[str, Any]) -> int:
    """Of a file behind its header."""
    return max(end for *_, (_, end) in entries_of(header))


def _checked_shard(shard: dict[str, Any]) -> dict[str, Any]:
    """Its fields, if a file can have that header and size: tensors side by side from the first byte
    of data to the last.
    """
    size, sha256, header, end = (
        _whole(shard["size"], 8, 1 << 50),
        shard["sha256"],
        shard["header"],
        0,
    )
    for name, dtype, shape, (start, stop) in entries_of(header):
        length = math.prod(_whole(extent, 0, 1 << 40) for extent in shape) * dtype.itemsize
        if (start, stop) != (end, end + length):
            raise ValueError(f"{name[:200]}: its bytes are not where they should be")
        end = stop
    if not 8 < size - end <= 8 + MOST_HEADER_BYTES or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("a file's size or hash is none")
    return {"size": size, "sha256": sha256, "header": header}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) <= LONGEST_STALL:
        raise ValueError(f"seconds: must be a number above 0, at most {LONGEST_STALL:g}")
    return float(value)


def _whole(value: Any, least: int, most: int) -> int:
    number = int(value)
    if isinstance(value, bool) or number != value or not least <= number <= most:
        raise ValueError(f"{str(value)[:40]}: must be a whole number, {least} to {most}")
    return number
