"""Published models that see, by their shapes: what is read of them, what is frozen, where adapters
go.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from opd.inputs.shapes import read_model, shape_of
from opd.lora_config import LoraConfig
from opd.ops.lora import layout_of
from opd.ops.model_class import placeholder_ids, sees_images, vision_parameters


@dataclass(frozen=True)
class Published:
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    more: dict[str, Any]
    billions: float  # as its page says
    tower: float  # of them, what reads images
    placeholders: tuple[int, ...]


MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": Published(
        "Qwen2_5_VLConfig",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        {"image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": False},
        8.292,
        0.677,
        (151655, 151656),
    ),
    "Qwen/Qwen3-VL-2B-Instruct": Published(
        "Qwen3VLConfig",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        {"image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": True},
        2.128,
        0.407,
        (151655, 151656),
    ),
    "llava-hf/llava-1.5-7b-hf": Published(
        "LlavaConfig",
        {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        {"image_token_index": 32000},
        7.063,
        0.324,
        (32000,),
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": Published(
        "Idefics3Config",
        {
            "model_type": "llama",
            "vocab_size": 128259,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "pad_token_id": 128002,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 364,
            "patch_size": 14,
        },
        {"scale_factor": 2, "image_token_id": 128257},
        8.462,
        0.432,
        (128257,),
    ),
}


@pytest.fixture(scope="module", params=[*MODELS])
def model(request, tmp_path_factory):
    """(what is published, the model on the meta device)."""
    published, path = MODELS[request.param], tmp_path_factory.mktemp("model")
    config = getattr(transformers, published.family)(
        text_config=published.text, vision_config=published.vision, **published.more
    )
    config.save_pretrained(path)
    return published, read_model("--student_model", str(path))


def test_its_shape_is_read_without_weights(model):
    published, read = model
    shape = shape_of(read, "--student_model", "model")
    assert shape.num_parameters / 1e9 == pytest.approx(published.billions, abs=1e-3)
    assert shape.context == published.text["max_position_embeddings"]
    assert shape.num_layers == published.text.get("num_hidden_layers", 32)
    assert shape.vocab_size == published.text["vocab_size"]
    assert sees_images(read.config) and placeholder_ids(read.config) == published.placeholders


def test_freeze_vision_freezes_all_that_reads_images(model):
    published, read = model
    frozen = sum(parameter.numel() for parameter in vision_parameters(read))
    assert frozen / 1e9 == pytest.approx(published.tower, abs=1e-3)
    shape = shape_of(read, "--student_model", "model")
    planned = shape.with_frozen_vision()
    assert shape.num_trained - planned.num_trained == frozen == sum(map(math.prod, planned.frozen))
    assert planned.num_parameters == shape.num_parameters and planned.trains_head


def test_adapters_go_on_every_layer_of_the_text_model_and_on_nothing_else(model):
    published, read = model
    targets = layout_of(read, LoraConfig(lora_r=16)).targets
    layers = published.text.get("num_hidden_layers", 32)
    assert len(targets) == 7 * layers
    assert all("language_model" in name or "text_model" in name for name in targets)
