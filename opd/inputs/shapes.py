"""Shapes of models, from their configurations alone: parameters, KV cache, activations, and what
tensor parallelism deals to GPUs.

No weight and no tokenizer is read. A model is built on the meta device, where tensors have shapes
and no memory, so its parameters are those that will be loaded.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from opd.config import is_async
from opd.inputs.kv_cache import CachedLayers, cached_layers
from opd.log import one_line
from opd.lora_config import LoraConfig
from opd.ops.attention import AUTO, attention_for, can_pack
from opd.ops.lora import LoraLayout, layout_of, lora_shapes
from opd.ops.model_class import model_class, sees_images, vision_parameters


class Unplannable(ValueError):
    """A configuration does not say enough for a prediction of memory."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the configuration of a model says of it. Sizes are numbers of values, not bytes."""

    flag: str  # what error messages call it
    path: str
    context: int | None  # most positions; None if the model states no limit
    # the shape of each, in the model's order; tied ones once
    parameters: tuple[tuple[int, ...], ...]
    vocab_size: int  # rows of the head, padding included
    hidden_size: int
    tied: bool  # whether the head is the embedding
    num_layers: int  # this and the next: 0 where the configuration has no such field
    num_heads: int  # this and the following: the largest, where layers differ
    num_kv_heads: int
    head_dim: int
    # columns that a token passes in one layer; of a mixture of experts those of its experts
    # together
    mlp_size: int
    # What tensor parallelism deals to the GPUs: its name -> how many there are. Here and of the
    # key-value heads: where layers differ, what divides the number of each.
    divided: dict[str, int]
    common_kv_heads: int
    cached: tuple[CachedLayers, ...]  # what stands in the KV cache
    # layers of the family keep a state (Mamba, linear attention); what their pages take beside the
    # cache, only vLLM knows
    keeps_states: bool
    # Shapes of what is trained and of what is frozen, each in the model's order: all of
    # `parameters` and nothing, or with adapters these and what they stand beside.
    trained: tuple[tuple[int, ...], ...]
    frozen: tuple[tuple[int, ...], ...]
    lora: LoraLayout | None
    packs: bool = False  # sequences may lie end to end at no cost (`opd.ops.attention.can_pack`)
    vision: tuple[tuple[int, ...], ...] = ()  # shapes of what reads images, which may be frozen
    adapter_values: int = 0  # of the LoRA adapter of a teacher that has one
    adapter_rank: int = 0  # its largest

    @property
    def num_trained(self) -> int:
        return sum(math.prod(shape) for shape in self.trained)

    @property
    def largest_trained(self) -> int:
        return max(math.prod(shape) for shape in self.trained)

    @property
    def trains_head(self) -> bool:
        """Whether the head's own weight gets a gradient."""
        return (self.vocab_size, self.hidden_size) in self.trained

    @property
    def largest_layer(self) -> int:
        """Parameters of a layer, taken as an equal part of all but embedding and head."""
        beside = self.head_parameters * (1 if self.tied else 2)
        return (self.num_parameters - beside) // max(1, self.num_layers)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def in_small_matrices(self, limit: int) -> int:
        """Parameters in matrices of fewer than `limit` values, embedding and head aside."""
        sizes = (
            math.prod(shape)
            for shape in self.parameters
            if len(shape) > 1 and shape[0] != self.vocab_size
        )
        return sum(size for size in sizes if size < limit)

    @property
    def values_per_rank(self) -> int:
        """Values that an adapter of rank 1 on every matrix but embedding and head would have."""
        matrices = (s for s in self.parameters if len(s) > 1 and s[0] != self.vocab_size)
        return sum(s[-1] + s[-2] for s in matrices)

    @property
    def kv_per_token(self) -> int:
        """Values in the KV cache for one token."""
        return sum(layers.count * layers.values for layers in self.cached)

    @property
    def largest_parameter(self) -> int:
        return max(math.prod(shape) for shape in self.parameters)

    def activations_per_token(self, width: int) -> int:
        """Bytes that the forward of one layer keeps for the backward of one token, with an
        attention that keeps no scores.

        Counted from the layer as transformers 5 writes it, `width` bytes a value. A norm works in
        float32: it keeps its input in that type (of a float32 model the input itself, once) and its
        result before the weight. Then: what the projections read, queries, keys and values as
        attention sees them, its result and its log-sum-exp, and gate, activation, up and their
        product in the MLP.
        """
        H, Q = self.hidden_size, self.num_heads * self.head_dim
        KV = self.num_kv_heads * self.head_dim
        norms = 2 * H * (4 + width) + 2 * H * width
        heads = 3 * Q * width + 4 * KV * width + 4 * self.num_heads
        mlp = 4 * self.mlp_size * width
        return norms + heads + mlp

    def with_frozen_vision(self) -> "ModelShape":
        """Of a model whose part that reads images is not trained."""
        left, trained = Counter(self.vision), []
        for shape in self.trained:
            if left[shape]:
                left[shape] -= 1
            else:
                trained.append(shape)
        return replace(self, trained=tuple(trained), frozen=(*self.frozen, *self.vision))

    def check_plannable(self) -> None:
        """Unplannable if the configuration does not say enough for a prediction of memory."""
        for name, number in (
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
        ):
            if not number:
                raise Unplannable(
                    f"{self.flag} {self.path}: config.json has no {name}; without it memory cannot "
                    "be planned"
                )

    def why_not_shared(self, size: int) -> str | None:
        """Why `size` GPUs cannot each take an equal part of the model; None if they can.

        Where heads of keys and values are fewer than GPUs, vLLM keeps copies of them; it refuses
        numbers without a common measure.
        """
        for name, count in self.divided.items():
            if count % size:
                return f"does not divide the {count} {name} of {self.path}; choose a divisor"
        if self.common_kv_heads % size and size % self.common_kv_heads:
            return (
                f"neither divides the {self.common_kv_heads} key-value heads of {self.path} nor is "
                "a multiple of them; choose another size"
            )
        return None


def check_tensor_parallel(
    config, student: ModelShape, teachers: Mapping[str, ModelShape], ranks: int
) -> None:
    """Every group of ranks is whole, and every rank of it gets an equal part of the model;
    ValueError otherwise.

    Rollout servers of an asynchronous run are no ranks. Served teachers are not in `teachers`.
    """
    flag, size = "--rollout_tensor_parallel_size", config.rollout.rollout_tensor_parallel_size
    engines = [(flag, size, student, 0 if is_async(config) else ranks)]
    for spec in config.teachers:
        if not spec.is_served:
            flag = f"teachers: {spec.name}: tensor_parallel_size"
            engines.append((flag, spec.tensor_parallel_size, teachers[spec.name], ranks))
    for flag, size, shape, sharing in engines:
        if sharing % size:
            fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
            raise ValueError(
                f"{flag} {size}: does not divide the {ranks} ranks of this run; choose {fitting}"
            )
        if reason := shape.why_not_shared(size):
            raise ValueError(f"{flag} {size}: {reason}")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without warnings and progress bars: what it warns of here, it says again when
    the model is loaded.
    """
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def load_part(flag: str, path: str, what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; whatever it raises becomes one line about the model at `path`, and the
    only one.
    """
    try:
        with quiet():
            return load()
    except Exception as error:  # a broken file breaks other people's parsers in any way it likes
        raise ValueError(f"{flag} {path}: cannot load its {what}: {one_line(error)}") from None


def check_path(flag: str, path: str) -> None:
    """Refuses what is neither a directory nor looks like a hub id."""
    if not Path(path).is_dir() and (
        path.startswith((".", "/", "~"))
        or path.partition("@")[0].count("/") > 1
        or Path(path).exists()
    ):
        raise ValueError(f"{flag} {path}: no such model directory")


def served_length(model: str, context: int | None, max_model_len: int | None) -> int:
    """Tokens of prompt and response that a server of `model` takes: its context, or less.

    ValueError for more.
    """
    if context is None and max_model_len is None:
        raise ValueError(f"--model {model} states no context length; give --max_model_len")
    if context is not None and (max_model_len or 0) > context:
        raise ValueError(
            f"--max_model_len {max_model_len}: over the {context} tokens of {model}; lower it"
        )
    return max_model_len or context


def read_model(
    flag: str, path: str, trust_remote_code: bool = False, *, attn_implementation: str = AUTO
) -> torch.nn.Module:
    """The causal language model of a directory or hub id on the meta device: shapes only.

    ValueError if it cannot be built, or not with that attention.
    """
    check_path(flag, path)
    options = {"trust_remote_code": trust_remote_code}
    config = load_part(flag, path, "config.json", lambda: _load_config(path, options))
    try:
        attention = attention_for(config, attn_implementation)
        return model_of(copy.deepcopy(config), flag, path, attn_implementation=attention, **options)
    except ValueError as error:
        if attn_implementation == AUTO:
            raise
        model_of(config, flag, path, **options)  # what fails here too is not a matter of attention
        reason = str(error).rpartition(": cannot load its architecture: ")[2]
        raise ValueError(
            f"--attn_implementation {attn_implementation}: not for {flag} {path}; choose auto or "
            f"eager ({reason})"
        ) from None


def _load_config(path: str, options: dict[str, Any]) -> PreTrainedConfig:
    here = {"local_files_only": Path(path).is_dir()}
    content, _ = PreTrainedConfig.get_config_dict(path, **here)
    family = content.get("model_type")
    if family is not None and family not in CONFIG_MAPPING and "auto_map" not in content:
        raise ValueError(
            f"transformers {transformers.__version__} does not know {family}; choose another model"
        )
    return AutoConfig.from_pretrained(path, **here, **options)


def model_of(config: PreTrainedConfig, flag: str, path: str, **options) -> torch.nn.Module:
    """A model on the meta device, from its configuration."""
    with torch.device("meta"):
        return load_part(
            flag,
            path,
            "architecture",
            lambda: model_class(config).from_config(config, dtype="float32", **options),
        )


def head_of(model: torch.nn.Module, flag: str, path: str) -> torch.nn.Module:
    """The output head of a model. ValueError if it has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{flag} {path}: {model.config.model_type} has no lm_head; give a causal language model"
        )
    return head


def shape_of(
    model: torch.nn.Module, flag: str, path: str, lora: LoraConfig | None = None
) -> ModelShape:
    """The shape of a model, real or on the meta device, and of the adapters that it is to have.

    ValueError if it has no output head, or if the adapters do not fit it.
    """
    config = model.config.get_text_config()
    head = head_of(model, flag, path)
    vocab_size, hidden_size = head.weight.shape
    embedding = model.get_input_embeddings()
    num_heads = _widest(config, "num_attention_heads") or 0
    parameters = tuple(tuple(p.shape) for p in model.parameters())
    sees = sees_images(model.config)
    layout = layout_of(model, lora) if lora is not None else None
    trained, frozen = lora_shapes(model, layout) if layout is not None else (parameters, ())
    return ModelShape(
        flag=flag,
        path=path,
        context=getattr(config, "max_position_embeddings", None),
        parameters=parameters,
        trained=trained,
        frozen=frozen,
        lora=layout,
        packs=can_pack(model.config),
        vision=tuple(tuple(p.shape) for p in vision_parameters(model)) if sees else (),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        tied=embedding is not None and embedding.weight is head.weight,
        num_layers=_widest(config, "num_hidden_layers") or 0,
        num_heads=num_heads,
        num_kv_heads=_widest(config, "num_key_value_heads") or num_heads,
        head_dim=_widest(config, "head_dim") or hidden_size // max(1, num_heads),
        mlp_size=_mlp_size(config, hidden_size),
        divided=_divided(config),
        common_kv_heads=math.gcd(*layer_values(config, "num_key_value_heads"))
        or math.gcd(*layer_values(config, "num_attention_heads"))
        or 1,
        **cached_layers(config),
    )


def _divided(config: PreTrainedConfig) -> dict[str, int]:
    sizes = {"num_attention_heads": "attention heads", "intermediate_size": "intermediate channels"}
    return {
        name: math.gcd(*values)
        for key, name in sizes.items()
        if (values := layer_values(config, key))
    }


def layer_values(config: PreTrainedConfig, name: str) -> list[int]:
    """The numbers that a field of a configuration holds: none, one, or one for each layer where
    layers differ.

    Layers differ by a list in the field, or by the overrides of transformers 5 (Gemma 4), whose
    global field may not be read.
    """
    is_heterogeneous = getattr(config, "is_heterogeneous", False) and name != "num_hidden_layers"
    parts = list(config.per_layer_config) if is_heterogeneous else [config]
    values = [getattr(part, name, None) for part in parts]
    flat = [n for value in values for n in (value if isinstance(value, list | tuple) else [value])]
    return [n for n in flat if isinstance(n, int) and n > 0]


def _widest(config: PreTrainedConfig, *names: str) -> int | None:
    """Of the first of these fields that holds a number; families name the same thing
    differently.
    """
    return next((max(values) for name in names if (values := layer_values(config, name))), None)


def _mlp_size(config: PreTrainedConfig, hidden_size: int) -> int:
    dense = _widest(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden_size
    experts = _widest(config, "num_experts_per_tok", "num_experts_per_token")
    if experts is None:
        return dense
    shared = _widest(config, "shared_expert_intermediate_size") or 0
    return experts * (_widest(config, "moe_intermediate_size") or dense) + shared
