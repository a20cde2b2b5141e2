"""Which class of transformers runs a model: one for text, or one that sees images too."""

from typing import Any

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
