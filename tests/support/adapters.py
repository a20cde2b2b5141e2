"""LoRA adapters with random weights on a tiny base, as peft saves them, and each merged into it."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "v_proj")
LINEAR = (*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(base: Path, path: Path, *, seed: int, targets=ATTENTION, r: int = 4, **options):
    """Saves an adapter whose effect is far from nothing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM", **options
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(path)
    return path


def merged(base: Path, adapter: Path) -> torch.nn.Module:
    """The base with the adapter added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
