"""LoRA (arXiv 2106.09685): which layers of a model have an adapter, what it is called, and how it
is merged.

A layer computes W x + scale * B (A x), with scale = alpha / r; W is frozen. In a model with
adapters W is called `NAME.base_layer.weight`, A `NAME.lora_A.default.weight` and B
`NAME.lora_B.default.weight` (peft's names).

Shape suffixes: I inputs of a layer, O its outputs, R the adapter's rank.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from opd.lora_config import LoraConfig

ADAPTER = "default"  # peft's name of an adapter that was given none
FILE_PREFIX = "base_model.model."  # of every tensor in an adapter's file
_PART = re.compile(r"\.(base_layer|lora_[AB]\.default)\.")
_TOWER = re.compile(r"(^|\.)(vision|visual|vpm|audio|speech)\w*(\.|$)")
# Ranks of adapters for which vllm 0.32 makes room.
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Choose experts: a small change there moves whole tokens.
ROUTERS = ("gate", "router", "shared_expert_gate")


def room_for_rank(rank: int) -> int:
    """The rank for which vLLM makes room where an adapter has `rank`."""
    return next(most for most in ADAPTER_RANKS if most >= rank)


@dataclass(frozen=True)
class LoraLayout:
    """The adapter of one model: its rank and the names of the layers that it is on."""

    r: int
    alpha: int
    targets: tuple[str, ...]  # in the model's order
    saved: tuple[str, ...] = ()  # modules that are trained whole
    transposed: frozenset[str] = frozenset()  # targets whose weight is [I, O], as GPT-2 has them
    # the shortest names that mean these targets and no others
    short_targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.r


def layout_of(model: nn.Module, lora: LoraConfig) -> LoraLayout | None:
    """The adapter that the flags ask for on `model`, which may be on the meta device; None without
    one. ValueError in one line for names that are none of the model's, and for what cannot be
    trained.
    """
    if not lora.lora_r:
        return None
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    head = {name for name, module in linear.items() if module is model.get_output_embeddings()}
    targets = _adapted(model, lora, linear, head)
    saved = _saved(model, lora, targets)
    _check_rank(lora, [_shape(linear[name].weight) for name in targets], len(targets))
    return LoraLayout(
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        targets=targets,
        saved=saved,
        transposed=frozenset(name for name in targets if isinstance(linear[name], Conv1D)),
        short_targets=_shortest(targets, [name for name, _ in model.named_modules()]),
    )


def names_of(values: Iterable[str]) -> list[str]:
    """Names that were given one by one or with commas between them."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def automatic_targets(linear: Iterable[str]) -> tuple[str, ...]:
    """Of a model's linear layers those in the numbered layers of its language model, without the
    routers of experts.
    """
    return tuple(
        name
        for name in linear
        if re.search(r"\.\d+\.", name)
        and not _TOWER.search(name)
        and name.rpartition(".")[2] not in ROUTERS
    )


def _adapted(
    model: nn.Module, lora: LoraConfig, linear: dict[str, nn.Module], head: set[str]
) -> tuple[str, ...]:
    names = names_of(lora.lora_targets)
    said = f"--lora_targets {','.join(names)}"
    if names == ["all-linear"]:
        found = tuple(name for name in linear if name not in head)
    elif names == ["auto"]:
        found = automatic_targets(name for name in linear if name not in head)
    else:
        asked = {name: _named(name, linear) for name in names}
        for name, matches in asked.items():
            if set(matches) & head:
                raise ValueError(
                    f"--lora_targets {name}: the loss reads the head's own weight, so it takes no "
                    f"adapter; train it whole with --lora_modules_to_save {name}"
                )
            if not matches:
                raise ValueError(f"--lora_targets {name}: {_unknown(name, model, linear)}")
        wanted = {name for matches in asked.values() for name in matches}
        found = tuple(name for name in linear if name in wanted)
    if not found:
        raise ValueError(
            f"{said}: {model.config.model_type} has no linear layer of that kind; name some"
        )
    return found


def _named(name: str, modules: Iterable[str]) -> list[str]:
    """Modules that a name means: their own name, or the end of it from a dot on."""
    return [module for module in modules if module == name or module.endswith(f".{name}")]


def _unknown(name: str, model: nn.Module, known: Iterable[str]) -> str:
    family = model.config.model_type
    if _named(name, (module for module, _ in model.named_modules())):
        return f"no linear layer of {family}; --lora_modules_to_save trains other modules whole"
    ends = sorted({module.rpartition(".")[2] for module in known})
    close = difflib.get_close_matches(name, ends, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(ends)}"
    return f"no layer of {family} is called so; {hint}"


def _saved(model: nn.Module, lora: LoraConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for name in names_of(lora.lora_modules_to_save):
        matches = _named(name, (module for module in modules if module))
        said = f"--lora_modules_to_save {name}"
        if not matches:
            ends = sorted({module.rpartition(".")[2] for module in modules} - {""})
            close = difflib.get_close_matches(name, ends, n=1)
            hint = f"did you mean {close[0]}?" if close else "see the model's own names"
            raise ValueError(f"{said}: no module of {model.config.model_type} is called so; {hint}")
        for match in matches:
            _check_saved(said, match, model, targets)
        found |= dict.fromkeys(matches)
    return tuple(found)


def _check_saved(said: str, name: str, model: nn.Module, targets: tuple[str, ...]) -> None:
    module = model.get_submodule(name)
    own = {id(p) for p in module.parameters()}
    if not own:
        raise ValueError(f"{said}: it has no weights; leave it out")
    if inside := [t for t in targets if t == name or t.startswith(f"{name}.")]:
        raise ValueError(f"{said}: {inside[0]} is in it and gets an adapter; choose one of the two")
    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(part.weight) for part in tied if part is not None}
    if len(weights) == 1 and weights & own:
        raise ValueError(
            f"{said}: the head is the embedding, and loaders of adapters give them back as two; "
            "leave it out"
        )


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, which ZeRO-3 may have partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_rank(lora: LoraConfig, shapes: list[tuple[int, ...]], count: int) -> None:
    adapter = sum(lora.lora_r * sum(shape) for shape in shapes)
    adapted = sum(math.prod(shape) for shape in shapes)
    if adapter >= adapted:
        most = max(1, (adapted - 1) // sum(sum(shape) for shape in shapes))
        raise ValueError(
            f"--lora_r {lora.lora_r}: the adapter would be as large as the {count} layers that it "
            f"is on; take at most {most}, or 0 to train all weights"
        )


def _shortest(targets: tuple[str, ...], modules: list[str]) -> tuple[str, ...]:
    """Last parts of the names where they mean no other module, else the names themselves."""
    ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    meant = {module for end in ends for module in _named(end, modules)}
    return ends if meant == set(targets) else targets


# ---- Sizes ---------------------------------------------------------------------------------------


def lora_shapes(
    model: nn.Module, layout: LoraLayout
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(shapes of what is trained, shapes of what is frozen), each in the model's order; tied ones
    once.
    """
    whole = {
        id(p) for name in layout.saved for p in model.get_submodule(name).parameters(recurse=True)
    }
    trained, frozen, seen = [], [], set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                (trained if id(parameter) in whole else frozen).append(_shape(parameter))
                seen.add(id(parameter))
        if name in layout.targets:
            first, second = _shape(module.weight)
            outputs, inputs = (second, first) if name in layout.transposed else (first, second)
            trained += [(layout.r, inputs), (outputs, layout.r)]
    return tuple(trained), tuple(frozen)


# ---- Layers --------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, layout: LoraLayout, *, seed: int) -> None:
    """Puts peft's layers into `model`, in place, and freezes all that is not trained.

    The matrices A are random, the same for a seed on every rank; B are zero, so the model computes
    what it did. Parameters may be partitioned by ZeRO-3.
    """
    from peft import LoraConfig as PeftConfig  # takes seconds
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(PeftConfig(**adapter_config(layout, full_names=True)), model)
    for name in layout.saved:
        model.get_submodule(name).requires_grad_(True)


def adapter_config(layout: LoraLayout, *, full_names: bool = False) -> dict:
    """What peft calls the configuration of this adapter."""
    names = layout.targets if full_names else layout.short_targets
    return {
        "r": layout.r,
        "lora_alpha": layout.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(names),
        "modules_to_save": None if full_names else (list(layout.saved) or None),
        "fan_in_fan_out": bool(layout.transposed),
        "bias": "none",
        "task_type": None if full_names else "CAUSAL_LM",
    }


def module_of(name: str) -> str | None:
    """The layer that a parameter of an adapted layer belongs to; None for any other parameter."""
    found = _PART.search(name)
    return name[: found.start()] if found else None


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def base_name(name: str, layout: LoraLayout) -> str:
    """A parameter's name in the model with adapters: the inverse of `plain_name`."""
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer.{last}" if module in layout.targets else name


def file_name(name: str) -> str:
    """What a trained parameter is called in an adapter's file."""
    return FILE_PREFIX + name.replace(f".{ADAPTER}.", ".")


def merged_layer(layer: list[tuple[str, Tensor]], layout: LoraLayout) -> list[tuple[str, Tensor]]:
    """The parameters of a layer with its adapters merged, under the names of the model without
    them: W + scale * B A, added up in float32 and rounded once to the type of W.

    W itself stays as it is.
    """
    named = dict(layer)
    found = []
    for name, tensor in layer:
        if ".lora_A." in name or ".lora_B." in name:
            continue
        module = module_of(name)
        if module is not None and name.endswith(".weight"):
            tensor = merged_weight(
                tensor,
                named[f"{module}.lora_A.{ADAPTER}.weight"],
                named[f"{module}.lora_B.{ADAPTER}.weight"],
                scale=layout.scale,
                transposed=module in layout.transposed,
            )
        found.append((plain_name(name), tensor))
    return found


def merged_weight(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float, transposed: bool = False
) -> Tensor:
    """W + scale * B A in the dtype of W, a new tensor; `transposed` weights are [I, O]."""
    delta = torch.mm(b_OR.detach().float(), a_RI.detach().float()).mul_(scale)
    return (
        delta.t_().add_(weight_OI).to(weight_OI.dtype)
        if transposed
        else (delta.add_(weight_OI).to(weight_OI.dtype))
    )


def trained_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters under the names of an adapter's file."""
    for name, tensor in named:
        yield file_name(name), tensor.detach()
