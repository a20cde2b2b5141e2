"""Sequences end to end in one row: every family that says it can computes each as if it lay alone,
and the kernel of a GPU is called with what it means.

T tokens of a row, S sequences, h query and k key-value heads, D head size.
"""

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

from opd.ops import packed_attention
from opd.ops.attention import can_pack
from opd.ops.packed_attention import PACKED, boundaries
from scripts.measure.families import FAMILIES, make_config, make_model
from tests.support.published import PUBLISHED

LENGTHS = [5, 12, 9, 1, 14]
WINDOW = 4
CANNOT = {
    "gpt_oss",
    "granite_swa",
    "gemma2",
    "vaultgemma",
    "nemotron",
    "doge",
    "recurrent_gemma",
    "mamba2",
}


def rows(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [S, T] and where they are real."""
    generator = torch.Generator().manual_seed(0)
    longest = max(LENGTHS)
    ids_ST = torch.randint(2, vocab, (len(LENGTHS), longest), generator=generator)
    return ids_ST, torch.arange(longest) < torch.tensor(LENGTHS)[:, None]


def test_families_with_parts_of_their_own_do_not():
    found = {f.name for f in FAMILIES if can_pack(make_config(f, pad_id=0, eos_id=1))}
    assert not found & CANNOT and len(found) >= 60
    assert {"llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "mistral", "phi3", "olmo3"} <= found


def test_published_models_pack_but_for_the_one_with_sinks():
    configs = {name: dict(values) for name, values in PUBLISHED.items()}
    found = {
        name
        for name, c in configs.items()
        if can_pack(AutoConfig.for_model(c.pop("model_type"), **c))
    }
    assert configs.keys() - found == {"gpt-oss-20b"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_that_packs_sees_each_sequence_alone(family):
    config = make_config(family, pad_id=0, eos_id=1)
    if not can_pack(config):
        return
    model = make_model(family, config, seed=0).eval().float()
    ids_ST, real_ST = rows(config.vocab_size)
    grads = []

    def hidden_of(**inputs) -> torch.Tensor:
        model.zero_grad()
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        hidden = hidden[real_ST] if len(hidden) > 1 else hidden[0]
        hidden.square().sum().backward()
        grads.append(next(p.grad for p in model.base_model.parameters()))
        return hidden.detach()

    padded = hidden_of(input_ids=ids_ST, attention_mask=real_ST)
    model.set_attn_implementation(PACKED)
    where = (real_ST.cumsum(-1) - 1)[real_ST]
    packed = hidden_of(
        input_ids=ids_ST[real_ST][None],
        position_ids=where[None],
        **boundaries(torch.tensor(LENGTHS), max(LENGTHS)),
    )
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)
    without = hidden_of(input_ids=ids_ST)  # rows, right-padded
    torch.testing.assert_close(without, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["s_aux", "softcap", "position_bias"])
def test_what_it_would_leave_out_is_an_error(part):
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"leaves out {part}"):
        packed_attention.packed_attention(torch.nn.Module(), *[states] * 3, None, **{part: 1.0})


# ---- The kernel of a GPU -------------------------------------------------------------------------


def as_documented(
    query_ThD, key_TkD, value_TkD, starts_q, starts_k, max_q, max_k, *, scale, window_size,
    enable_gqa,
):  # fmt: skip
    """What torch 2.13 documents of `varlen_attn`, slowly."""
    assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k)
    assert max_q == max_k >= int(starts_q.diff().max())
    assert enable_gqa == (query_ThD.shape[1] != key_TkD.shape[1])
    left, right = window_size
    assert right == 0  # causal
    outputs = []
    for first, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        distance = torch.arange(end - first)[:, None] - torch.arange(end - first)
        mask = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
        states = (t[first:end].transpose(0, 1) for t in (query_ThD, key_TkD, value_TkD))
        outputs.append(
            scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_kernel_is_called_with_what_it_means(monkeypatch, window):
    generator = torch.Generator().manual_seed(0)
    T = sum(LENGTHS)
    query, key, value = (torch.randn(1, h, T, 8, generator=generator) for h in (6, 2, 2))
    options = {"scaling": 0.3, "sliding_window": window}
    options |= boundaries(torch.tensor(LENGTHS), max(LENGTHS) + 3)
    one_by_one, _ = packed_attention.packed_attention(
        torch.nn.Module(), query, key, value, None, **options
    )
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    at_once, _ = packed_attention.packed_attention(
        torch.nn.Module(), query, key, value, None, **options
    )
    assert at_once.shape == one_by_one.shape == (1, T, 6, 8)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-6, rtol=1e-5)
