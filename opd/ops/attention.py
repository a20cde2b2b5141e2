"""Which attention a transformers model computes with: one that leaves nothing of it out.

vLLM computes what a configuration says. An attention of transformers that does not know a part of
it, as PyTorch's `scaled_dot_product_attention` does not know the soft-cap of Gemma 2, leaves that
part out without a word.
"""

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from opd.ops.packed_attention import LARGEST_HEAD, PACKED

AUTO = "auto"
SOFTCAP_KEYS = (
    "attn_logit_softcapping",
    "attn_logit_soft_cap",
    "attn_logits_soft_cap",
    "attention_logits_soft_cap",
)
CAPPING = (
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
)  # of transformers 5.19


FLASH = "flash_attention_2"
CAUSAL_LAYERS = {"full_attention", "sliding_attention"}
# The layers of one do not hand down where sequences start; the other does not say that it is
# recurrent.
CANNOT_PACK = {"nemotron", "recurrent_gemma"}


def attention_for(
    config: PreTrainedConfig,
    wanted: str = AUTO,
    dtype: torch.dtype | None = None,
    *,
    packed: bool = False,
) -> str | None:
    """The `attn_implementation` for a model of `config`: what is wanted; for "auto" the fastest
    that is exact.

    That is flash attention for a model in half precision, `dtype`, where the package is installed,
    there is a GPU and the family has it; then, for sequences that lie end to end in a `packed` row,
    `opd.ops.packed_attention`. None leaves the choice to transformers: PyTorch's own where the
    family has it, else eager. ValueError, without the flag, for one that leaves out a part of the
    model.
    """
    capped = _soft_cap(config)
    if wanted == AUTO and _has_flash(config, dtype):
        return FLASH
    if wanted == AUTO and packed and can_pack(config):
        return PACKED
    if wanted == AUTO:
        return "eager" if capped else None
    if capped and wanted not in CAPPING:
        raise ValueError(
            f"{wanted} leaves out the soft-cap of {config.model_type} ({capped} = "
            f"{getattr(config.get_text_config(), capped)}); choose auto or eager"
        )
    return wanted


def _soft_cap(config: PreTrainedConfig) -> str | None:
    text_config = config.get_text_config()
    return next((key for key in SOFTCAP_KEYS if getattr(text_config, key, None) is not None), None)


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether sequences that lie end to end cost a text model of this family nothing: every layer
    is causal attention without parts of its own, by what the family says of itself.

    What it does not say is found by `Student.check_packing`.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None or config.get_text_config() is not config or _soft_cap(config):
        return False
    layers = set(getattr(config, "layer_types", None) or CAUSAL_LAYERS)
    if not layers <= CAUSAL_LAYERS or config.model_type in CANNOT_PACK:
        return False
    # sinks, and masks that depend on values, are more than one of these can say
    return (
        family._supports_attention_backend and family._supports_sdpa and family._supports_flash_attn
    )


def _has_flash(config: PreTrainedConfig, dtype: torch.dtype | None) -> bool:
    if dtype not in (torch.float16, torch.bfloat16) or not is_flash_attn_2_available():
        return False
    family, text = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), config.get_text_config()
    # code that ships with a checkpoint is no family; some have a kernel of their own
    if family is None or not family._supports_flash_attn:
        return False
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return not family._compatible_flash_implementations and size <= LARGEST_HEAD


def attention_of(
    model: str,
    wanted: str = AUTO,
    *,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
) -> str | None:
    """The same for the model of a directory or hub id."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return attention_for(config, wanted, dtype, packed=packed)


def needs_padding_mask(model: nn.Module) -> bool:
    """Whether right-padded rows must come with a mask.

    In a causal model padding comes after every real token, so none sees it. With a mask PyTorch's
    attention takes a slower kernel, which computes the upper triangle too. In float32 the
    gradients of both kernels differ by rounding (torch 2.13 on a CPU); there it stays, so that a
    comparison to the bit does not depend on it.
    """
    if model.dtype == torch.float32 or getattr(model.config, "_attn_implementation", "") == "eager":
        return True
    # what looks ahead says so in its attention layers (transformers 5.19)
    return any(getattr(module, "is_causal", True) is False for module in model.modules())
