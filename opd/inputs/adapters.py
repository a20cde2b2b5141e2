"""LoRA adapters of teachers, checked before a weight is loaded: by their configuration and the
header of their file, against a base that has shapes and no memory.

peft itself is asked where an adapter's tensors belong. What it would compute and our engines would
not is refused here.
"""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model

from opd.config import TeacherSpec
from opd.hub_names import as_named
from opd.inputs.weight_files import FLOATS
from opd.log import one_line, warn_once
from opd.ops.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Stored, read_header
from opd.ops.lora import ADAPTER_RANKS, FILE_PREFIX
from opd.ops.model_class import sees_images

# Initial values that leave the base as it is; with others peft changes the base too.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
# What may have any value: both engines compute it as peft does, or it is of the training only.
TAKEN = (
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config", "corda_config"),
    *("lora_ga_config", "loftq_config", "runtime_config", "megatron_core", "qalora_group_size"),
    "ensure_weight_tying",
)
MERGE = "merge it into its base with peft (merge_and_unload), and give the result as `model`"


def engines_of(specs: Sequence[TeacherSpec]) -> dict[str, tuple[TeacherSpec, ...]]:
    """The engines of teachers that run here, each under the name of its first teacher: those of one
    model are one, with adapters and without. One whose weights change has its own.
    """
    groups: dict[tuple, list[TeacherSpec]] = {}
    for spec in specs:
        if not spec.is_served:
            own = spec.name if spec.follows else ""
            place = (str(Path(spec.model).resolve()), spec.backend, spec.tensor_parallel_size, own)
            groups.setdefault(place, []).append(spec)
    return {group[0].name: tuple(group) for group in groups.values()}


def check_adapter(spec: TeacherSpec, base: torch.nn.Module) -> dict[str, int]:
    """What `ModelShape` says of a teacher's adapter, of none nothing. ValueError if it is none that
    our engines compute as peft does, if its file is not whole, or if it was trained on another
    base.

    `base` is the teacher's model on the meta device.
    """
    if not spec.adapter:
        return {}
    where = f"--teacher {spec.name}: adapter {spec.adapter}"
    try:
        config = _adapter_config(Path(spec.adapter))
        rank = _check_kind(config, spec)
        stored = _read_weights(Path(spec.adapter))
        _check_places(config, stored, base, spec)
        _check_seen(stored, base, spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _warn_of_another_base(where, config, spec)
    values = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    return {"adapter_values": values, "adapter_rank": rank}


def has_tokenizer(directory: str) -> bool:
    """Whether an adapter brings its own tokenizer, and with it a chat template."""
    return bool(directory) and (Path(directory) / "tokenizer_config.json").is_file()


def _adapter_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    if not directory.is_dir():
        raise ValueError("no such directory")
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        other = "it is a model, not an adapter; give it as `model`, without a base"
        raise ValueError(other if is_model else f"the directory holds no {ADAPTER_CONFIG}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load its {ADAPTER_CONFIG}: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"its {ADAPTER_CONFIG} holds no settings; save it again with peft")
    return config


def _check_kind(config: Mapping[str, Any], spec: TeacherSpec) -> int:
    """Its largest rank."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"it is of the type {kind}, only LORA is known; {MERGE}")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise ValueError(f"its ranks are {ranks}; they must be whole numbers above 0")
    if spec.backend == "vllm" and max(ranks) > ADAPTER_RANKS[-1]:
        raise ValueError(
            f"its rank is {max(ranks)}, vLLM takes up to {ADAPTER_RANKS[-1]}; set `backend: hf` in "
            f"its entry, or {MERGE}"
        )
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS and str(start).lower() not in PLAIN_STARTS:
        raise ValueError(
            f"its init_lora_weights is {start}, with which peft changes the base too; convert it "
            "with peft (path_initial_model_for_weight_conversion)"
        )
    usual = {f.name: None if f.default is MISSING else f.default for f in fields(LoraConfig)}
    for name, value in config.items():
        if name not in TAKEN and value and value != usual.get(name):
            raise ValueError(
                f"its {name} is {value}, which is more than LoRA on linear layers; {MERGE}"
            )
    return max(ranks)


def _read_weights(directory: Path) -> dict[str, Stored]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        old = directory / "adapter_model.bin"
        hint = "; convert adapter_model.bin by saving it with a newer peft" if old.is_file() else ""
        raise ValueError(f"the directory holds no {ADAPTER_WEIGHTS}{hint}")
    stored = read_header(path)
    strange = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]
    if strange:
        raise ValueError(
            f"{len(strange)} of its tensors are no floating-point numbers, first {strange[0]} "
            f"({stored[strange[0]].dtype}); save it again without quantisation"
        )
    return stored


def _check_places(
    config: Mapping[str, Any], stored: Mapping[str, Stored], base: torch.nn.Module, spec
) -> None:
    """Every tensor of its file has a place in the base, and every place a tensor."""
    wanted = _places(config, base)
    other = f"; its base is {config.get('base_model_name_or_path')}: give that as `model`"
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if beside := [name for name in found if "lora_" not in name or "lora_embedding" in name]:
        raise ValueError(
            f"its file holds {beside[0]}, which is no LoRA of a linear layer: the head must be "
            f"the base's; {MERGE}"
        )
    if strange := [name for name in found if name not in wanted]:
        raise ValueError(
            f"{len(strange)} of its {len(found)} tensors have no place in {spec.model}, first "
            f"{strange[0]}{other}"
        )
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} tensors are not in its file, first {missing[0]}; "
            "save it again, whole"
        )
    if wrong := [name for name in wanted if wanted[name] != found[name]]:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors have another shape than {spec.model} and its rank ask for, "
            f"first {name}: {found[name]} in its file, {wanted[name]} asked for{other}"
        )


def _check_seen(stored: Mapping[str, Stored], base: torch.nn.Module, spec: TeacherSpec) -> None:
    """Of a model that sees vLLM 0.32 takes what is on the text model, and leaves the rest out
    without a word.
    """
    if spec.backend != "vllm" or not sees_images(base.config):
        return
    text = {id(module) for module in base.get_decoder().modules()}
    layers = {name for name, module in base.named_modules() if id(module) in text}
    places = [name.removeprefix(FILE_PREFIX).partition(".lora_")[0] for name in stored]
    if beside := sorted(set(places) - layers):
        raise ValueError(
            f"it changes what reads images ({beside[0]} and {len(beside) - 1} more), which vLLM "
            f"would leave out; set `backend: hf` in its entry, or {MERGE}"
        )


def _places(config: Mapping[str, Any], base: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that peft gives to the base. ValueError for targets that it does
    not find, and for the head and the embedding: scores are computed with the base's.
    """
    known = {f.name for f in fields(LoraConfig)}
    lora = LoraConfig(**{name: value for name, value in config.items() if name in known})
    model = copy.deepcopy(base)
    ends = [model.get_output_embeddings(), model.get_input_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = inject_adapter_in_model(lora, model, "teacher", low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"peft cannot put it on its base: {one_line(error)}") from None
    places = {
        FILE_PREFIX + name.replace(".teacher.", "."): tuple(tensor.shape)
        for name, tensor in model.named_parameters()
        if ".teacher." in name or name.endswith(".teacher")
    }
    for module in ends:
        name = names.get(id(module), "")
        if any(place.startswith(f"{FILE_PREFIX}{name}.lora_") for place in places):
            raise ValueError(
                f"it changes {name}; teachers of one base share its head and embedding; {MERGE}"
            )
    return places


def _warn_of_another_base(where: str, config: Mapping[str, Any], spec: TeacherSpec) -> None:
    """Names may differ for the same weights, so this is no error: shapes have been compared."""
    named = str(config.get("base_model_name_or_path") or "")
    own = as_named(spec.model).partition("@")[0]
    if named and Path(named.partition("@")[0]).name != Path(own).name:
        warn_once(f"{where}: it was trained on {named}; make sure that {own} has the same weights")
