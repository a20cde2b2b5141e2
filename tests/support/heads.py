"""Families whose logits differ from a plain projection, as tiny models."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.ops.heads import LogitForm

V, H = 41, 32
GEMMA3N = {
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
}


GEMMA4 = {
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}

SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.5,
    "dtype": "float32",
}


MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
NESTED = {**SHAPE, **GEMMA4, "model_type": "gemma4_text", "final_logit_softcapping": 3.0}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]}
GPT = {"n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8}


# name -> (model type, configuration, the form it must have)
CASES = {
    "plain": ("qwen3", {"tie_word_embeddings": False}, LogitForm()),
    "tied": ("qwen3", {"tie_word_embeddings": True}, LogitForm()),
    "bias": ("phi", {}, LogitForm()),
    "bias_gptj": ("gptj", GPT, LogitForm()),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0}, LogitForm(softcap=3.0)),
    "gemma3_text": ("gemma3_text", {"final_logit_softcapping": 3.0}, LogitForm(softcap=3.0)),
    "gemma3_no_cap": ("gemma3_text", {"final_logit_softcapping": None}, LogitForm()),
    "gemma3n_text": (
        "gemma3n_text",
        {**GEMMA3N, "final_logit_softcapping": 3.0},
        LogitForm(softcap=3.0),
    ),
    "gemma4_text": (
        "gemma4_text",
        {**GEMMA4, "final_logit_softcapping": 3.0},
        LogitForm(softcap=3.0),
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {**GEMMA4, "final_logit_softcapping": 3.0},
        LogitForm(softcap=3.0),
    ),
    "gemma4_nested": (
        "gemma4",
        {"text_config": NESTED, "vision_config": VISION, "audio_config": None},
        LogitForm(softcap=3.0),
    ),
    "vaultgemma": ("vaultgemma", {"final_logit_softcapping": 3.0}, LogitForm(softcap=3.0)),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}, LogitForm(softcap=3.0)),
    "cohere": ("cohere", {"logit_scale": 0.3}, LogitForm(scale=0.3)),
    "cohere2": ("cohere2", {"logit_scale": 0.3}, LogitForm(scale=0.3)),
    "granite": ("granite", {"logits_scaling": 4.0}, LogitForm(scale=0.25)),
    "granite_swa": ("granite_swa", {"logits_scaling": 4.0}, LogitForm(scale=0.25)),
    "granitemoe": ("granitemoe", {"logits_scaling": 4.0}, LogitForm(scale=0.25)),
    "granitemoeshared": ("granitemoeshared", {"logits_scaling": 4.0}, LogitForm(scale=0.25)),
    "granitemoe_swa": ("granitemoe_swa", {"logits_scaling": 4.0}, LogitForm(scale=0.25)),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**HYBRID, "logits_scaling": 4.0},
        LogitForm(scale=0.25),
    ),
    "cohere2_moe": ("cohere2_moe", {"logit_scale": 0.3}, LogitForm(scale=0.3)),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 4.0}, LogitForm(scale=4.0)),
    "falcon_h1": ("falcon_h1", {**MAMBA, "lm_head_multiplier": 0.3}, LogitForm(scale=0.3)),
}


def make_model(model_type: str, changes: dict):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    # leaves no soft-cap out
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)  # zeros would not show
    return model
