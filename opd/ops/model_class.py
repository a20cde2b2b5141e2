"""Which class of transformers runs a model: one for text, or one that sees images too."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

# Token ids of a configuration that stand for something that is no text (transformers 5.19).
PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
)


def model_class(config: PreTrainedConfig) -> Any:
    """The auto class that builds a model of `config`, its output head included."""
    only_with_images = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model of `config` has a part that reads images."""
    return (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and getattr(config, "vision_config", None) is not None
    )


def placeholder_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokens in whose place embeddings of images and the like are put; none of a text model."""
    if not sees_images(config):
        return ()
    ids = (getattr(config, name, None) for name in PLACEHOLDERS)
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))


def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What of a model that sees is neither its text model nor its head.

    ValueError if it has no such part.
    """
    parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part]
    text = {id(p) for part in parts for p in part.parameters()}
    found = [p for p in model.parameters() if id(p) not in text]
    if not found or not text:
        raise ValueError(f"{model.config.model_type} has no part that reads images")
    return found
