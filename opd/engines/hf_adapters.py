"""LoRA adapters on a transformers model that has the base's weights already.

peft puts its layers into the model in place, so base and adapters lie in one module, each once.
"""

import warnings
from pathlib import Path

import torch
from peft import PeftConfig
from peft.functional import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from opd.ops.headers import ADAPTER_WEIGHTS
from opd.ops.lora import FILE_PREFIX


def add_teacher_adapter(model: nn.Module, name: str, directory: str, dtype: torch.dtype) -> None:
    """Gives `model`, a causal language model, the adapter in `directory` under `name`: asleep until
    `use_adapter` names it, and in the type that the model computes in.

    RuntimeError if a tensor of its file has no place, or a place no tensor.
    """
    tensors = {
        key.removeprefix(FILE_PREFIX): tensor.to(dtype)
        for key, tensor in load_file(Path(directory) / ADAPTER_WEIGHTS).items()
    }
    config = PeftConfig.from_pretrained(directory)
    config.inference_mode, own = True, _in_peft(name)
    with warnings.catch_warnings():  # of peft 0.21, about a second adapter: it is meant
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, own, low_cpu_mem_usage=True)
    found = set_peft_model_state_dict(model, tensors, own, low_cpu_mem_usage=True)
    empty = [key for key, value in model.named_parameters() if f".{own}." in key and value.is_meta]
    if found.unexpected_keys or empty:
        raise RuntimeError(
            f"adapter {name}: {directory}: {len(found.unexpected_keys)} tensors without a place, "
            f"{len(empty)} places without one, first {[*found.unexpected_keys, *empty][0]}"
        )
    use_adapter(model, "")


def use_adapter(model: nn.Module, name: str) -> None:
    """The model computes with that adapter from now on; with "" it is the base itself, to
    the bit.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(bool(name))
            if name:
                module.set_adapter(_in_peft(name), inference_mode=True)


def _in_peft(name: str) -> str:
    """What peft calls the adapter of a teacher: a name that may be a part of a module's, which
    `math.v2` and `update` may not.
    """
    return f"teacher_{name.encode().hex()}"
