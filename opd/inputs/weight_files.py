"""Whether the safetensors of a model hold what its configuration asks for.

Headers are read, never a weight.

transformers itself is asked, with tensors that have a shape and no memory: it knows every family's
renamings, fused experts, tied weights and buffers that no file holds. What it loads and vLLM does
not is known here.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opd.inputs.shapes import quiet
from opd.log import one_line
from opd.ops.headers import Stored, read_headers

FLOATS = ("F64", "F32", "F16", "BF16")

# Families whose published checkpoints have no prefix, and for which vLLM 0.32 adds it as
# transformers does.
WITHOUT_PREFIX = ("gpt2", "bloom", "opt")

# Where files say that weights are quantised: keys of config.json, and files of older tools.
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

# What a checkpoint may hold beside what its class asks for: buffers of older versions, parts that
# predict further tokens, and the eyes and ears of a model of which only the language model is used.
HARMLESS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)(causal_mask|position_ids|version)$|rotary|inv_freq|rope_freqs|_cached$|"
    r"mtp|nextn|medusa|eagle|vision|visual|audio|speech|image|multi_modal|mm_projector"
)


def check_not_quantised(flag: str, path: str, config_dict: dict, remedy: str) -> None:
    """ValueError for a checkpoint of quantised weights: nothing here trains one, and none was ever
    tried as a teacher.

    `config_dict` is the content of its config.json.
    """
    nested = [part for part in config_dict.values() if isinstance(part, dict)]
    for part in (config_dict, *nested):
        for key in QUANTISED_KEYS:
            if found := part.get(key):
                method = (
                    found.get("quant_method", "no method named")
                    if isinstance(found, dict)
                    else found
                )
                raise ValueError(
                    f"{flag} {path}: its weights are quantised ({key} in config.json: {method}); "
                    f"{remedy}"
                )
    for name in QUANTISED_FILES:
        if (Path(path) / name).is_file():
            raise ValueError(
                f"{flag} {path}: its weights are quantised ({name} lies beside them); {remedy}"
            )


def check_weights(flag: str, path: str, root: Path, model: nn.Module, *, vllm: bool) -> None:
    """The files in `root` hold every weight of `model`, which is on the meta device, in its shape;
    ValueError otherwise.

    With `vllm` names are also those that vLLM takes.
    """
    try:
        _check_names(root, model, vllm)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None


def _check_names(root: Path, model: PreTrainedModel, vllm: bool) -> None:
    if (root / "adapter_config.json").is_file():
        raise ValueError(
            "a LoRA adapter lies beside its weights (adapter_config.json); merge it, or move it "
            "away"
        )
    stored = read_headers(root)
    expected = model.state_dict(keep_vars=True)
    others = {name: s for name, s in stored.items() if s.dtype not in FLOATS}
    tied = _tied_names(model, expected)
    tensors = {
        name: torch.empty(s.shape, device="meta") for name, s in stored.items() if name not in tied
    }
    found = _ask_transformers(model, tensors)
    missing = [name for name in expected if name in found["missing_keys"]]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} weights are not in its files, first {missing[0]}; "
            + _remedy(model, expected[missing[0]], missing[0], found["unexpected_keys"], others)
        )
    if others:
        lost = _ask_transformers(
            model, {name: t for name, t in tensors.items() if name not in others}
        )["missing_keys"]
        lost = [
            name for name, tensor in expected.items() if name in lost and tensor.is_floating_point()
        ]
        if lost:
            raise ValueError(
                f"{len(lost)} of its weights are no floating-point numbers, first {lost[0]}; "
                + _types(others)
            )
    if found["mismatched_keys"]:
        name, there, here = min(found["mismatched_keys"])
        raise ValueError(
            f"{len(found['mismatched_keys'])} weights have another shape than config.json says, "
            f"first {name}: {tuple(there)} in its files, {tuple(here)} by config.json; take both "
            "from one export"
        )
    _check_unexpected(model, found["unexpected_keys"])
    if vllm:
        _check_prefix(model, stored, expected)


def _tied_names(model: PreTrainedModel, expected: dict[str, Tensor]) -> list[str]:
    """Names of weights that are the embedding: a copy under such a name is no substitute for it
    (vLLM 0.32 skips it).
    """
    embedding = model.get_input_embeddings().weight
    return [name for name, tensor in expected.items() if tensor is embedding][1:]


def _ask_transformers(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict:
    """missing_keys, unexpected_keys and mismatched_keys of transformers 5.19, which loads nothing
    and allocates nothing.
    """
    with quiet():
        try:
            _, found = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError as error:  # experts that cannot be put together
            wanted = revert_weight_conversion(model, dict(model.state_dict()))
            missing = [name for name in wanted if name not in tensors]
            if not missing:
                raise ValueError(
                    f"transformers cannot convert its weights: {one_line(error)}"
                ) from None
            raise ValueError(
                f"{len(missing)} of {len(wanted)} weights are not in its files, first "
                f"{missing[0]}; export the model again"
            ) from None
    return found


def _remedy(
    model: PreTrainedModel,
    weight: Tensor,
    missing: str,
    unexpected: Iterable[str],
    others: dict[str, Stored],
) -> str:
    if extra := _extra_parts(model, missing, unexpected):
        return (
            f"names in its files have `{extra}.` too many; save the model without what is wrapped "
            "around it"
        )
    if others:
        return _types(others)
    head = model.get_output_embeddings()
    if weight is head.weight and weight is not model.get_input_embeddings().weight:
        return (
            "export the model with its lm_head, or set tie_word_embeddings to true in config.json "
            "if the embedding is it"
        )
    return "export the model again, whole"


def _types(others: dict[str, Stored]) -> str:
    (dtype, count), *_ = Counter(s.dtype for s in others.values()).most_common(1)
    return (
        f"{count} tensors are of type {dtype}, as quantised weights are; give its bfloat16 "
        "checkpoint"
    )


def _extra_parts(model: PreTrainedModel, missing: str, names: Iterable[str]) -> str | None:
    """What stands too much in the names of a model that was saved inside another: module,
    base_model.model, _orig_mod ...

    Example: of "student.model.norm.weight", where "model.norm.weight" is missing, it is "student".
    """
    for wanted in (missing, missing.removeprefix(f"{model.base_model_prefix}.")):
        found = [extra for name in names if (extra := _parts_beside(wanted, name))]
        if found:
            return ".".join(min(found, key=len))
    return None


def _parts_beside(wanted: str, name: str) -> list[str] | None:
    """What is left of a name without the parts of the wanted one, which must follow each other in
    it; else None.
    """
    rest, extra = wanted.split("."), []
    for part in name.split("."):
        if rest and part == rest[0]:
            rest.pop(0)
        else:
            extra.append(part)
    return None if rest else extra


def _check_unexpected(model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """A weight without a place means that config.json describes another model: it would be dropped
    in silence.
    """
    config = model.config
    is_text = config.get_text_config() is config
    if not is_text or model.is_custom_code() or getattr(config, "num_nextn_predict_layers", None):
        return
    strange = sorted(name for name in unexpected if not HARMLESS.search(name))
    if strange:
        raise ValueError(
            f"{len(strange)} weights in its files have no place in the {type(model).__name__} of "
            f"its config.json, first {strange[0]}; take both from one export, without adapters and "
            "further heads"
        )


def _check_prefix(
    model: PreTrainedModel, stored: dict[str, Stored], expected: dict[str, Tensor]
) -> None:
    prefix = model.base_model_prefix
    if not prefix or model.config.model_type in WITHOUT_PREFIX:
        return
    bare = [name for name in stored if name not in expected and f"{prefix}.{name}" in expected]
    if bare:
        # as save_pretrained does: Fuyu's have none
        named = revert_weight_conversion(model, dict(model.state_dict()))
        bare = [name for name in bare if name not in named]
    if bare:
        raise ValueError(
            f"{len(bare)} names in its files lack the prefix `{prefix}.`, first {bare[0]}, and "
            f"vLLM does not know them so; export the {type(model).__name__}, not its base model"
        )
