"""Which attention a transformers model computes with: one that leaves nothing of it out.

vLLM computes what a configuration says. An attention of transformers that does not know a part of
it, as PyTorch's `scaled_dot_product_attention` does not know the soft-cap of Gemma 2, leaves that
part out without a word.
"""

from transformers import AutoConfig, PreTrainedConfig

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


def attention_for(config: PreTrainedConfig, wanted: str = AUTO) -> str | None:
    """The `attn_implementation` for a model of `config`: what is wanted; for "auto" the fastest
    that is exact.

    None leaves the choice to transformers: PyTorch's own where the family has it, else eager.
    ValueError, without the flag, for one that leaves out a part of the model.
    """
    text_config = config.get_text_config()
    capped = next(
        (key for key in SOFTCAP_KEYS if getattr(text_config, key, None) is not None), None
    )
    if wanted == AUTO:
        return "eager" if capped else None
    if capped and wanted not in CAPPING:
        raise ValueError(
            f"{wanted} leaves out the soft-cap of {config.model_type} ({capped} = "
            f"{getattr(text_config, capped)}); choose auto or eager"
        )
    return wanted


def attention_of(model: str, wanted: str = AUTO, *, trust_remote_code: bool = False) -> str | None:
    """The same for the model of a directory or hub id."""
    return attention_for(
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), wanted
    )
