"""The flags of LoRA students (arXiv 2106.09685), a group beside those of `opd/config.py`."""

from dataclasses import dataclass
from typing import Literal

from opd.options import NonNegativeInt, PositiveInt, option


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of the student: small trained matrices beside frozen weights."""

    lora_r: NonNegativeInt = option(
        0,
        "Rank of the student's LoRA adapters; 0 trains all weights. An adapter wants about ten "
        "times the --learning_rate of full training, such as 1e-4 (see docs/lora.md).",
        fingerprinted="lora",
    )
    lora_alpha: PositiveInt = option(
        32,
        "What adapters say is scaled by lora_alpha / lora_r. At a fixed alpha the best learning "
        "rate hardly depends on the rank.",
        fingerprinted="lora",
    )
    lora_dropout: float = option(
        0.0,
        "0, and nothing else: the student that trains is the student that samples, and a sampler "
        "drops nothing.",
        fingerprinted="lora",
    )
    lora_targets: list[str] = option(
        ["auto"],
        "Layers that get an adapter. auto: attention and MLP of every layer of the language model; "
        "all-linear: every linear layer but the head; or names, such as q_proj,v_proj.",
        fingerprinted="lora",
    )
    lora_modules_to_save: list[str] = option(
        [],
        "Modules that are trained whole beside the adapters, by name, such as lm_head or norm.",
        fingerprinted="lora",
    )
    lora_sync: Literal["auto", "merged", "adapter"] = option(
        "auto",
        "How the sampler gets an adapter. merged: as whole weights, merged on the way; adapter: as "
        "a request of vLLM's own LoRA, so that a sync costs the adapter alone; auto is adapter "
        "where vLLM takes it, else merged.",
    )
    merge_on_export: bool = option(
        False, "Export a whole model with the adapter merged into it, instead of the adapter."
    )
