"""Attention over sequences that lie end to end in one row, none of which sees another.

transformers would build a mask of every token against every token, of which all that lies between
two sequences is false. Here each sequence is a causal attention of its own: no mask, and no work
that is thrown away. T tokens of a row, S sequences, D head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "packed"  # as `attn_implementation`
LARGEST_HEAD = 256  # of the flash kernels


def boundaries(lengths_S: Tensor, longest: int) -> dict[str, Tensor | int]:
    """What the forward of a model is given with a packed row, under the names by which
    transformers hands it down to attention: where its sequences start and end. `longest` is a
    bound on their lengths.
    """
    starts_S1 = nn.functional.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "cu_seq_lens_q": starts_S1,
        "cu_seq_lens_k": starts_S1,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: nn.Module,
    query_1hTD: Tensor,
    key_1kTD: Tensor,
    value_1kTD: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """[1, T, h, D]: the attention function that transformers calls (`AttentionInterface`).

    Rows without boundaries are causal attention as ever, right-padded ones too. ValueError for a
    part of attention that it would leave out.
    """
    left_out = [n for n in ("s_aux", "softcap", "position_bias") if others.get(n) is not None]
    if left_out or not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention leaves out {', '.join(left_out) or 'what lies ahead'}")
    if cu_seq_lens_q is None:
        output = _causal(query_1hTD, key_1kTD, value_1kTD, scaling, sliding_window)
        return output.transpose(1, 2).contiguous(), None
    if _has_kernel(query_1hTD):
        return _by_kernel(
            *(query_1hTD, key_1kTD, value_1kTD),
            *(cu_seq_lens_q, max_length_q, scaling, sliding_window),
        ), None
    lengths = cu_seq_lens_q.diff().tolist()
    each = zip(*(t.split(lengths, 2) for t in (query_1hTD, key_1kTD, value_1kTD)), strict=True)
    outputs = [_causal(*sequence, scaling, sliding_window) for sequence in each]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling, sliding_window) -> Tensor:
    T = query.shape[2]
    mask_TT = None
    if sliding_window is not None and sliding_window < T:
        ones_TT = torch.ones(T, T, dtype=torch.bool, device=query.device)
        mask_TT = ones_TT.tril() & ones_TT.triu(1 - sliding_window)
    return scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _has_kernel(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] <= LARGEST_HEAD


def _by_kernel(query, key, value, starts_S1, longest, scaling, sliding_window) -> Tensor:
    """One call for all sequences. Not run on a GPU yet."""
    from torch.nn.attention.varlen import varlen_attn

    query_ThD, key_TkD, value_TkD = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    output_ThD = varlen_attn(
        *(query_ThD, key_TkD, value_TkD, starts_S1, starts_S1, longest, longest),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_ThD.unsqueeze(0)


AttentionInterface.register(PACKED, packed_attention)
