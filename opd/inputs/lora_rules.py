"""What is wrong with the flags of a LoRA student by themselves; names of layers and sizes are
checked where the model is read (`ops/lora.py`).
"""

from dataclasses import fields

from opd.config import is_async
from opd.inputs.shapes import ModelShape
from opd.inputs.vllm_models import takes_adapters
from opd.lora_config import LoraConfig
from opd.ops.lora import ADAPTER_RANKS, automatic_targets, names_of


def validate_lora(config) -> None:
    """ValueError for a value that no run can have, and for flags that do not go together."""
    lora = config.lora
    if not lora.lora_r:
        default = LoraConfig()
        for flag in fields(lora):
            if getattr(lora, flag.name) != getattr(default, flag.name):
                raise ValueError(
                    f"--{flag.name}: is about an adapter, and there is none; set --lora_r, such as "
                    "16, or leave it out"
                )
        return
    if lora.lora_dropout:
        raise ValueError(
            f"--lora_dropout {lora.lora_dropout}: must be 0; the student that trains is the one "
            "that samples, and a sampler drops nothing"
        )
    if config.model.freeze_vision:
        raise ValueError(
            "--freeze_vision: with --lora_r all weights of the model are frozen already, and auto "
            "puts no adapter into the tower; leave it out"
        )
    names = names_of(lora.lora_targets)
    for alone in ("auto", "all-linear"):
        if alone in names and len(names) > 1:
            raise ValueError(
                f"--lora_targets {','.join(names)}: {alone} stands alone; leave it or the names out"
            )
    if not names:
        raise ValueError("--lora_targets: names no layer; use auto, all-linear or names")
    if lora.lora_sync == "adapter" and (why := why_merged(config)):
        raise ValueError(f"--lora_sync adapter: {why}; use --lora_sync merged")


def why_merged(config) -> str | None:
    """Why the sampler gets whole weights, as far as the flags decide it; None if they do not."""
    lora = config.lora
    if is_async(config):
        return "rollout servers get whole weights"
    if lora.lora_r > ADAPTER_RANKS[-1]:
        return f"vLLM takes ranks up to {ADAPTER_RANKS[-1]}, and --lora_r is {lora.lora_r}"
    if lora.lora_modules_to_save:
        return "vLLM takes no --lora_modules_to_save beside an adapter"
    if config.rollout.rollout_tensor_parallel_size > 1:
        return "it was not tried with --rollout_tensor_parallel_size above 1"
    return None


def check_sampled(config, student: ModelShape, *, sees: bool) -> None:
    """ValueError for an adapter that the sampler is to take and vLLM 0.32 would leave a part of
    out, without a word: of a model that sees it takes what is on the text model.
    """
    if student.lora is None or config.lora.lora_sync != "adapter" or not sees:
        return
    usual = automatic_targets(student.lora.targets)
    if other := [name for name in student.lora.targets if name not in usual]:
        raise ValueError(
            f"--lora_sync adapter: vLLM takes adapters on the text model alone, and --lora_targets "
            f"puts some on {other[0]} and {len(other) - 1} others; use --lora_sync merged"
        )


def samples_with_adapter(config, student: ModelShape) -> bool:
    """Whether the sampler keeps the student's own weights and takes adapters, by `--lora_sync`."""
    layout, asked = student.lora, config.lora.lora_sync
    if layout is None or asked == "merged":
        return False
    if asked == "adapter":
        return True
    usual = automatic_targets(layout.targets) == layout.targets
    return why_merged(config) is None and usual and takes_adapters(student.path)
