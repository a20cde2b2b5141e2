"""Prompts with images in the form that vLLM takes, and whether it reads the same tokens in them."""

from collections.abc import Sequence
from typing import Any

from opd.pictures import PromptImages, token_difference

# ids of prompt and response, and the images of the prompt
Text = tuple[list[int], PromptImages | None]


def images_limit(images_per_prompt: int | None) -> dict[str, Any]:
    """The option of an engine for the most images of one prompt; none for a model without eyes.

    With 0 vllm 0.32 builds no image encoder.
    """
    if images_per_prompt is None:
        return {}
    return {"limit_mm_per_prompt": {"image": images_per_prompt, "video": 0, "audio": 0}}


def vllm_request(text: Text) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    ids, images = text
    if images is None:
        return {"prompt_token_ids": ids}
    return {
        "prompt_token_ids": images.unexpanded(ids),
        "multi_modal_data": {"image": images.open()},
    }


def check_vllm_tokens(name: str, text: Text, found: Sequence[int]) -> None:
    """ValueError if vLLM has made other tokens of a prompt with images than its student did."""
    ids, images = text
    if images is None or list(found) == ids:
        return
    raise ValueError(f"{name}: vLLM makes {token_difference(found, ids)}: {images.text!r:.120}")
