"""Whether the safetensors of a model hold what its configuration asks for. Headers are read, never a weight.

transformers itself is asked, with tensors that have a shape and no memory: it knows every family's renamings, fused experts,
tied weights and buffers that no file holds. What it loads and vLLM does not is known here.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opd.messages import one_line
from opd.shapes import quiet

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
LFS_POINTER = b"version https://git-lfs"

# Families whose published checkpoints have no prefix, and for which vLLM 0.32 adds it as transformers does.
WITHOUT_PREFIX = ("gpt2", "bloom", "opt")

# Where files say that weights are quantised: keys of config.json, and files of older tools.
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# What a checkpoint may hold beside what its class asks for: buffers of older versions, parts that predict further tokens,
# and the eyes and ears of a model of which only the language model is used.
HARMLESS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)(causal_mask|position_ids|version)$|rotary|inv_freq|rope_freqs|_cached$|"
    r"mtp|nextn|medusa|eagle|vision|visual|audio|speech|image|multi_modal|mm_projector"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint, as a header describes it."""

    file: Path
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]


def weight_files(root: Path) -> list[Path]:
    """The safetensors of the model in `root`, in the order of their names.

    ValueError, without the name of the model, for none, for an index without its files, and where transformers and vLLM would
    read different ones.
    """
    whole, index = root / WHOLE, root / INDEX
    if index.is_file():
        names = _read_index(index)
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}")
        if whole.is_file() and names != [WHOLE]:
            raise ValueError(f"holds both {WHOLE} and {INDEX}; remove what is left over from an older export")
        return [root / name for name in names]
    others = sorted(path.name for path in root.glob("*.safetensors") if path.name != WHOLE)
    if not whole.is_file():
        raise ValueError(_nothing_to_read(root, others))
    if others:  # vLLM takes all that it finds
        raise ValueError(f"{others[0]} lies beside {WHOLE}, and vLLM would load both; move it away")
    return [whole]


def _read_index(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot load its {INDEX}: {one_line(error)}; fetch the file again") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {INDEX} names no files; fetch the file again")
    return names


def _nothing_to_read(root: Path, others: list[str]) -> str:
    if len(others) == 1:
        return f"its weights are in {others[0]}, which no {INDEX} names; rename it to {WHOLE}"
    if others:
        return f"{len(others)} weight files and no {INDEX} that names them, first {others[0]}; fetch the index too"
    hint = ""
    if any(root.glob("*.bin")):
        hint = "; convert the .bin files with save_pretrained"
    elif any(root.glob("*.gguf")):
        hint = "; give the checkpoint from which the .gguf file was made"
    return f"no .safetensors weights in the directory{hint}"


def read_headers(root: Path) -> dict[str, Stored]:
    """Tensor name -> what the files of the model in `root` say of it. ValueError, without the model's name, for broken ones."""
    found: dict[str, Stored] = {}
    for path in weight_files(root):
        for name, stored in _read_header(path).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].file.name} and in {path.name}; remove the older file")
            found[name] = stored
    index = root / INDEX
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        wrong = [name for name, file in named.items() if name not in found or found[name].file.name != file]
        if wrong:
            raise ValueError(
                f"its {INDEX} names {len(wrong)} tensors that are not where it says, first {wrong[0]} in {named[wrong[0]]}; "
                "fetch index and files of one export"
            )
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(f"{path.name} is a git-lfs pointer, not weights; fetch it with git lfs pull")
        if not start:
            raise ValueError(f"{path.name} is empty; fetch it again")
        with safe_open(path, framework="np") as file:  # checks that the header accounts for every byte, and reads none
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return {name: Stored(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({one_line(error)}); fetch it again") from None


def check_not_quantised(flag: str, path: str, config_dict: dict, remedy: str) -> None:
    """ValueError for a checkpoint of quantised weights: nothing here trains one, and none was ever tried as a teacher.

    `config_dict` is the content of its config.json.
    """
    nested = [part for part in config_dict.values() if isinstance(part, dict)]
    for part in (config_dict, *nested):
        for key in QUANTISED_KEYS:
            if found := part.get(key):
                method = found.get("quant_method", "no method named") if isinstance(found, dict) else found
                raise ValueError(f"{flag} {path}: its weights are quantised ({key} in config.json: {method}); {remedy}")
    for name in QUANTISED_FILES:
        if (Path(path) / name).is_file():
            raise ValueError(f"{flag} {path}: its weights are quantised ({name} lies beside them); {remedy}")


def check_weights(flag: str, path: str, root: Path, model: nn.Module, *, vllm: bool) -> None:
    """The files in `root` hold every weight of `model`, which is on the meta device, in its shape; ValueError otherwise.

    With `vllm` names are also those that vLLM takes.
    """
    try:
        _check(root, model, vllm)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None


def _check(root: Path, model: PreTrainedModel, vllm: bool) -> None:
    if (root / "adapter_config.json").is_file():
        raise ValueError("a LoRA adapter lies beside its weights (adapter_config.json); merge it, or move it away")
    stored = read_headers(root)
    expected = model.state_dict(keep_vars=True)
    others = {name: s for name, s in stored.items() if s.dtype not in FLOATS}
    tied = _tied_names(model, expected)
    tensors = {name: torch.empty(s.shape, device="meta") for name, s in stored.items() if name not in tied}
    found = _ask_transformers(model, tensors)
    missing = [name for name in expected if name in found["missing_keys"]]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} weights are not in its files, first {missing[0]}; "
            + _remedy(model, expected[missing[0]], missing[0], found["unexpected_keys"], others)
        )
    if others:
        lost = _ask_transformers(model, {name: t for name, t in tensors.items() if name not in others})["missing_keys"]
        lost = [name for name, tensor in expected.items() if name in lost and tensor.is_floating_point()]
        if lost:
            raise ValueError(f"{len(lost)} of its weights are no floating-point numbers, first {lost[0]}; " + _types(others))
    if found["mismatched_keys"]:
        name, there, here = min(found["mismatched_keys"])
        raise ValueError(
            f"{len(found['mismatched_keys'])} weights have another shape than config.json says, first {name}: "
            f"{tuple(there)} in its files, {tuple(here)} by config.json; take both from one export"
        )
    _check_unexpected(model, found["unexpected_keys"])
    if vllm:
        _check_prefix(model, stored, expected)


def _tied_names(model: PreTrainedModel, expected: dict[str, Tensor]) -> list[str]:
    """Names of weights that are the embedding: a copy under such a name is no substitute for it (vLLM 0.32 skips it)."""
    embedding = model.get_input_embeddings().weight
    return [name for name, tensor in expected.items() if tensor is embedding][1:]


def _ask_transformers(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict:
    """missing_keys, unexpected_keys and mismatched_keys of transformers 5.19, which loads nothing and allocates nothing."""
    with quiet():
        try:
            _, found = type(model).from_pretrained(
                None, config=model.config, state_dict=tensors, device_map={"": "meta"}, dtype=torch.float32,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except RuntimeError as error:  # experts that cannot be put together
            wanted = revert_weight_conversion(model, dict(model.state_dict()))
            missing = [name for name in wanted if name not in tensors]
            if not missing:
                raise ValueError(f"transformers cannot convert its weights: {one_line(error)}") from None
            raise ValueError(
                f"{len(missing)} of {len(wanted)} weights are not in its files, first {missing[0]}; export the model again"
            ) from None
    return found


def _remedy(
    model: PreTrainedModel, weight: Tensor, missing: str, unexpected: Iterable[str], others: dict[str, Stored]
) -> str:
    if extra := _extra_parts(model, missing, unexpected):
        return f"names in its files have `{extra}.` too many; save the model without what is wrapped around it"
    if others:
        return _types(others)
    head = model.get_output_embeddings()
    if weight is head.weight and weight is not model.get_input_embeddings().weight:
        return "export the model with its lm_head, or set tie_word_embeddings to true in config.json if the embedding is it"
    return "export the model again, whole"


def _types(others: dict[str, Stored]) -> str:
    (dtype, count), *_ = Counter(s.dtype for s in others.values()).most_common(1)
    return f"{count} tensors are of type {dtype}, as quantised weights are; give its bfloat16 checkpoint"


def _extra_parts(model: PreTrainedModel, missing: str, names: Iterable[str]) -> str | None:
    """What stands too much in the names of a model that was saved inside another: module, base_model.model, _orig_mod ...

    Example: of "student.model.norm.weight", where "model.norm.weight" is missing, it is "student".
    """
    for wanted in (missing, missing.removeprefix(f"{model.base_model_prefix}.")):
        found = [extra for name in names if (extra := _parts_beside(wanted, name))]
        if found:
            return ".".join(min(found, key=len))
    return None


def _parts_beside(wanted: str, name: str) -> list[str] | None:
    """What is left of a name without the parts of the wanted one, which must follow each other in it; else None."""
    rest, extra = wanted.split("."), []
    for part in name.split("."):
        if rest and part == rest[0]:
            rest.pop(0)
        else:
            extra.append(part)
    return None if rest else extra


def _check_unexpected(model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """A weight without a place means that config.json describes another model: it would be dropped in silence."""
    config = model.config
    is_text = config.get_text_config() is config
    if not is_text or model.is_custom_code() or getattr(config, "num_nextn_predict_layers", None):
        return
    strange = sorted(name for name in unexpected if not HARMLESS.search(name))
    if strange:
        raise ValueError(
            f"{len(strange)} weights in its files have no place in the {type(model).__name__} of its config.json, first "
            f"{strange[0]}; take both from one export, without adapters and further heads"
        )


def _check_prefix(model: PreTrainedModel, stored: dict[str, Stored], expected: dict[str, Tensor]) -> None:
    prefix = model.base_model_prefix
    if not prefix or model.config.model_type in WITHOUT_PREFIX:
        return
    bare = [name for name in stored if name not in expected and f"{prefix}.{name}" in expected]
    if bare:
        named = revert_weight_conversion(model, dict(model.state_dict()))  # as save_pretrained does: Fuyu's have none
        bare = [name for name in bare if name not in named]
    if bare:
        raise ValueError(
            f"{len(bare)} names in its files lack the prefix `{prefix}.`, first {bare[0]}, and vLLM does not know them so; "
            f"export the {type(model).__name__}, not its base model"
        )
