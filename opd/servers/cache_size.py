"""How large a server's KV cache is, and how long the sequences are that it takes: both before a
weight is loaded.
"""

import argparse
import math
import sys
from typing import Literal

import psutil
import torch

from opd.config import GIB
from opd.inputs.kv_cache import BLOCK, SMALL_BLOCK, one_sequence_bytes, token_bytes
from opd.inputs.shapes import ModelShape, served_length

CACHE_HELP = (
    "KV cache of each replica per GPU, GiB; auto: what one sequence takes, and more where there is "
    "room"
)
USED = 0.9  # of the memory that is free; the rest is for activations and for what others take
# What a server on a CPU takes beside weights and cache: Qwen3-0.6B in float32 took 4.8 GiB in the
# worker of vLLM's own server, 2.2 of them weights, and 1.5 in the two processes before it.
BESIDE_CPU = 2 * GIB
SHARE_CPU = 0.25  # of what is left on a CPU, beyond one sequence: its memory is everybody's
WITH_STATES = GIB  # at least, for a family whose layers keep states beside the cache
# Tokens that are computed at once, defaults of vllm 0.32: most for what sizes itself, so that no
# model gets too little; fewest for what is given, so that none is refused that would run.
MOST_IN_FLIGHT, FEWEST_IN_FLIGHT = 2 * 16_384, 2048


def cache_gib(text: str) -> float | Literal["auto"]:
    """The value of `--kv_cache_gib`."""
    if text == "auto":
        return text
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give GiB, above 0, or auto")
    return size


def cache_and_length(
    shape: ModelShape,
    max_model_len: int | None,
    kv_cache_gib: float | Literal["auto"],
    *,
    width: int,
    gpus: int = 1,
    tokens: int,
    device: int = 0,
) -> tuple[float, int]:
    """(GiB of the KV cache on each of `gpus` GPUs, tokens of the longest sequence).

    `device` is one of them, by its number in this process. `auto` is room for `tokens` tokens and
    for one sequence at least. A context for which there is no memory is cut, unless `max_model_len`
    asks for it. ValueError for a cache that vLLM would refuse.
    """
    block, in_flight = BLOCK, MOST_IN_FLIGHT
    if kv_cache_gib != "auto":
        block, in_flight = SMALL_BLOCK, FEWEST_IN_FLIGHT

    def needs(length: int) -> int:
        if shape.keeps_states:  # only vLLM knows
            return WITH_STATES if kv_cache_gib == "auto" else 0
        return one_sequence_bytes(
            shape.cached, length, width=width, gpus=gpus, in_flight=in_flight, block=block
        )

    longest = served_length(shape.path, shape.context, max_model_len)
    free = _free_bytes(device) - _beside_cache(shape, width) // gpus
    room = int(kv_cache_gib * GIB) if kv_cache_gib != "auto" else free
    if needs(longest) > room:
        fitting = _longest_within(room, longest, needs)
        given = f"--kv_cache_gib {kv_cache_gib}"
        if kv_cache_gib == "auto":
            given += f": {max(0, free) / GIB:.3g} GiB are free beside the weights"
        if max_model_len or not fitting:
            remedy = f"--max_model_len {fitting} fits" if fitting else "take a smaller model"
            if not fitting and kv_cache_gib != "auto":
                remedy = "give more, or auto"
            raise ValueError(
                f"{given}: one sequence of {longest} tokens takes "
                f"{math.ceil(1000 * needs(longest) / GIB) / 1000:g} GiB; {remedy}"
            )
        line = f"warning: {shape.path}: takes {fitting} tokens of {longest}: {given}"
        print(line, file=sys.stderr, flush=True)
        longest = fitting
    if kv_cache_gib != "auto":
        return kv_cache_gib, longest
    wanted = tokens * token_bytes(shape.cached, width=width, gpus=gpus)
    most = room if torch.cuda.is_available() else int(SHARE_CPU * room)
    return max(needs(longest), min(wanted, most)) / GIB, longest


def _free_bytes(device: int) -> int:
    if torch.cuda.is_available():
        return int(USED * torch.cuda.mem_get_info(device)[0])
    return int(USED * psutil.virtual_memory().available)


def _beside_cache(shape: ModelShape, width: int) -> int:
    """The weights; on a CPU vllm 0.32 keeps the head in a packed form too."""
    weights = shape.num_parameters * width
    if torch.cuda.is_available():
        return weights
    return weights + shape.vocab_size * shape.hidden_size * width + BESIDE_CPU


def _longest_within(room: int, longest: int, needs) -> int:
    """The most tokens of a sequence whose cache fits; 0 if none does."""
    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        if needs(middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low
