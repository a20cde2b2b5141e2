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
# In the name of a setting: the family has layers that keep a state, however long the sequence.
STATES = ("mamba", "ssm", "state_size", "linear_", "lru", "hybrid", "conv_L")
# They have a latent, of which vLLM keeps the keys and values that follow from it.
UNFOLDED = ("minicpm3",)


@dataclass(frozen=True)
class CachedLayers:
    """Layers that keep equally much of a token in the KV cache."""

    count: int
    values: int  # of a token: keys and values of all heads together
    heads: int  # dealt to the GPUs that share a model; a latent is one, and each GPU has a copy
    window: int | None = None  # tokens that such a layer looks back; None: all


def cached_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """`cached` and `keeps_states` of a ModelShape, from a model's text configuration."""
    found: dict[tuple[int, int, int | None], int] = {}
    for kind in _layers(config):
        found[kind] = found.get(kind, 0) + 1
    cached = tuple(
        CachedLayers(count, values, heads, window)
        for (values, heads, window), count in found.items()
    )
    keeps_states = any(word in name for name in config.to_dict() for word in STATES)
    return {"cached": cached, "keeps_states": keeps_states}


def _layers(config: PreTrainedConfig) -> Iterator[tuple[int, int, int | None]]:
    """(values, heads, window) of each layer that attends."""
    own = getattr(config, "is_heterogeneous", False)
    number = getattr(config, "num_hidden_layers", None)
    for index in range(number if isinstance(number, int) else 0):
        part = config.per_layer_config[index] if own else config
        kind = _at(getattr(config, "layer_types", None), index) or "full_attention"
        heads = _at(getattr(part, "num_attention_heads", None), index)
        if not heads or not kind.endswith("attention") or kind == "linear_attention":
            continue
        latent, rotated = (getattr(part, key, None) for key in ("kv_lora_rank", "qk_rope_head_dim"))
        if latent and config.model_type not in UNFOLDED:
            yield latent + (rotated or 0), 1, None
            continue
        head_dim = _at(getattr(part, "head_dim", None), index) or part.hidden_size // heads
        if latent:
            head_dim = part.qk_nope_head_dim + rotated
        kv_heads = _kv_heads(part, index) or heads
        yield 2 * kv_heads * head_dim, kv_heads, _window(part, index, kind)


def _kv_heads(config: PreTrainedConfig, index: int) -> int | None:
    """Falcon has names of its own."""
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return next((n for name in names if (n := _at(getattr(config, name, None), index))), None)


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

    Layers that look back alike stand in one group, and a block holds `block` tokens of it. Where
    they differ, all groups have equally many layers, some of them fillers, and blocks of one size:
    what is smaller gets more tokens into it, or is padded. A layer with a window keeps it and the
    `in_flight` tokens that are computed at once. One block more is vLLM's own.

    `width` is bytes of a value. 0 for a model without a cache.
    """
    kinds: dict[tuple[int | None, int], int] = {}  # (window, bytes of a token) -> layers
    for layers in cached:
        kind = layers.window, width * (layers.values // min(layers.heads, gpus))
        kinds[kind] = kinds.get(kind, 0) + layers.count
    if not kinds:
        return 0
    windows = {window for window, _ in kinds}
    if len(windows) == 1:
        kept = _kept(*windows, tokens, in_flight)
        in_block = block * sum(size * count for (_, size), count in kinds.items())
        return (1 + _blocks(kept, block, *windows)) * in_block
    least, most = min(kinds.values()), max(kinds.values())
    group = most if most < 1.5 * least else least  # layers of a group
    largest = max(size for _, size in kinds)
    blocks = 1
    for (window, size), count in kinds.items():
        own = block * (largest // size) if largest % size == 0 else block
        kept = _kept(window, tokens, in_flight)
        blocks += -(-count // group) * _blocks(kept, own, window)
    return blocks * group * block * largest


def _kept(window: int | None, tokens: int, in_flight: int) -> int:
    return tokens if window is None else min(tokens, window - 1 + in_flight)


def _blocks(kept: int, block: int, window: int | None) -> int:
    """A window may begin within a block."""
    return -(-kept // block) + (window is not None)
