"""Right-padded rows without a mask: the same hidden states and gradients of every real token."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from opd.ops.attention import needs_padding_mask

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
LINEAR = {
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},  # shorter than the rows
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},  # padding is routed to experts, with a mask too
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR,  # a state that padding comes too late to change
}


def model_of(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, dtype):
    """Hidden states, and gradients up to the rounding of another kernel: in bfloat16 a few steps
    of 2^-8, one for each product that the backward of two layers rounds.
    """
    model = model_of(family, dtype)
    ids_BS = torch.randint(1, 64, (3, 12))
    real_BS = torch.arange(12) < torch.tensor([[5], [9], [12]])
    ids_BS[~real_BS] = 0
    hidden, gradients = [], []
    for options in ({"attention_mask": real_BS}, {}):
        model.zero_grad()
        states = model.base_model(input_ids=ids_BS, use_cache=False, **options).last_hidden_state
        states_NH = states[real_BS].float()
        (states_NH * torch.linspace(-1, 1, states_NH.numel()).view_as(states_NH)).sum().backward()
        hidden.append(states_NH.detach())
        used = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        gradients.append({n: p.grad.float() for n, p in used})
    tolerance = 1e-5 if dtype == torch.float32 else 4 * 2**-8
    assert (hidden[0] - hidden[1]).abs().max() <= tolerance * hidden[0].abs().max()
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max()
        assert error <= tolerance * expected.abs().max().clamp(min=1e-3), name


def test_who_needs_a_mask():
    """Float32, whose gradients are compared to the bit; what builds a mask anyway; and what looks
    ahead, where padding is seen.
    """
    assert needs_padding_mask(model_of("llama", torch.float32))
    model = model_of("llama", torch.bfloat16)
    assert not needs_padding_mask(model)
    model.set_attn_implementation("eager")
    assert needs_padding_mask(model)
    sizes = {name: SMALL[name] for name in SMALL if name not in ("num_key_value_heads", "head_dim")}
    options = {"attn_implementation": "sdpa", "dtype": torch.bfloat16}
    looks_ahead = AutoModelForCausalLM.from_config(BertConfig(**sizes), **options)
    assert needs_padding_mask(looks_ahead)
    assert not needs_padding_mask(
        AutoModelForCausalLM.from_config(BertConfig(**sizes, is_decoder=True), **options)
    )
