"""The KV cache that vLLM asks for before it starts: room for one sequence of full length.

The rule is that of vllm 0.32 (`v1/core/kv_cache_utils.py`), computed from a configuration alone, so
that a cache which is too small is found before a weight is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

# Tokens of a block. vllm 0.32 takes 16 on a GPU and 128 on a CPU; attention kernels may want more.
SMALL_BLOCK, BLOCK = 16, 128
# Layer types of transformers whose layers keep a state, however long the sequence.
STATES = ("linear_attention", "mamba", "conv", "recurrent", "moe")


@dataclass(frozen=True)
class CachedLayers:
    """Layers that keep equally much of a token in the KV cache."""

    count: int
    values: int  # of a token: keys and values of all heads together
    heads: int  # dealt to the GPUs that share a model; a latent is one, and each GPU has a copy
    window: int | None = None  # tokens that such a layer looks back; None: all


def cached_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """`cached` and `state_layers` of a ModelShape, from a model's text configuration."""
    found: dict[tuple[int, int, int | None], int] = {}
    kinds = list(_layers(config))
    for kind in kinds:
        if kind is not None:
            found[kind] = found.get(kind, 0) + 1
    cached = tuple(
        CachedLayers(count, values, heads, window)
        for (values, heads, window), count in found.items()
    )
    return {"cached": cached, "state_layers": kinds.count(None)}


def _layers(config: PreTrainedConfig) -> Iterator[tuple[int, int, int | None] | None]:
    """(values, heads, window) of each layer, None for one that keeps a state."""
    own = getattr(config, "is_heterogeneous", False)
    number = getattr(config, "num_hidden_layers", None)
    for index in range(number if isinstance(number, int) else 0):
        part = config.per_layer_config[index] if own else config
        kind = _at(getattr(config, "layer_types", None), index) or "full_attention"
        if kind in STATES or "mamba" in kind:
            yield None
            continue
        latent = getattr(part, "kv_lora_rank", None)
        if latent:
            yield latent + (getattr(part, "qk_rope_head_dim", None) or 0), 1, None
            continue
        heads = _at(getattr(part, "num_attention_heads", None), index) or 1
        head_dim = _at(getattr(part, "head_dim", None), index) or part.hidden_size // heads
        kv_heads = _at(getattr(part, "num_key_value_heads", None), index) or heads
        yield 2 * kv_heads * head_dim, kv_heads, _window(part, index, kind)


def _at(value: Any, index: int) -> Any:
    """The entry of a layer where a field holds one for each; a shorter list says nothing."""
    if isinstance(value, list | tuple):
        return value[index] if index < len(value) else None
    return value


def _window(config: PreTrainedConfig, index: int, kind: str) -> int | None:
    """Where `layer_types` is missing, a window is that of all layers (Mistral)."""
    if kind == "chunked_attention":
        return _at(getattr(config, "attention_chunk_size", None), index)
    says_kinds = getattr(config, "layer_types", None) is not None
    if getattr(config, "use_sliding_window", True) is False or (
        says_kinds and kind != "sliding_attention"
    ):
        return None
    return _at(getattr(config, "sliding_window", None), index) or None


def token_bytes(cached: tuple[CachedLayers, ...], *, width: int, gpus: int = 1) -> int:
    """Bytes of one token in the KV cache of each of `gpus` GPUs, `width` bytes a value."""
    return width * sum(
        layers.count * (layers.values // min(layers.heads, gpus)) for layers in cached
    )


def one_sequence_bytes(
    cached: tuple[CachedLayers, ...],
    tokens: int,
    *,
    width: int,
    gpus: int = 1,
    in_flight: int,
    block: int = BLOCK,
) -> int:
    """Bytes on each of `gpus` GPUs without which vLLM refuses sequences of `tokens` tokens.

    A block holds so many tokens of a group of layers; layers are grouped by what they look back,
    all groups with equally many, so some have fillers. A layer with a window keeps it and the
    `in_flight` tokens that are computed at once. One block more is vLLM's own.

    `width` is bytes of a value. 0 for a model without a cache.
    """
    pages: dict[int | None, list[int]] = {}  # window -> bytes of a block, layer by layer
    for layers in cached:
        page = block * width * (layers.values // min(layers.heads, gpus))
        pages.setdefault(layers.window, []).extend([page] * layers.count)
    if not pages:
        return 0
    least, most = (choose(map(len, pages.values())) for choose in (min, max))
    size = most if most < 1.5 * least else least  # layers of a group
    # layers of one kind stand in one block, whatever their sizes; others are padded to the largest
    in_block = sum(*pages.values()) if len(pages) == 1 else size * max(map(max, pages.values()))
    blocks = 1
    for window, own in pages.items():
        kept = tokens if window is None else min(tokens, window - 1 + in_flight)
        groups = 1 if len(pages) == 1 else -(-len(own) // size)
        blocks += groups * (-(-kept // block) + (window is not None))
    return blocks * in_block
