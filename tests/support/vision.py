"""Tiny random models that see, of the configuration classes of published families."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from opd.ops.model_class import model_class
from opd.ops.pixels import Pixels
from opd.pictures import Picture, PromptImages
from scripts import make_demo
from scripts.demos import vision_models

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{%- for m in messages -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for p in m.content -%}{{ 'IMAGE' if p.type == 'image' else p.text }}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}"
)


def tokenizer_with(image: str, *tokens: str):
    """The demo's, with the tokens of a family; its template writes `image` for an image."""
    tokenizer = make_demo.make_tokenizer()
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": added}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", image)
    return tokenizer


def idefics3(path: Path, *, hidden_size: int = 64, num_layers: int = 2) -> None:
    """What vLLM's CPU build runs too."""
    processor = vision_models.make_processor()
    vision_models.random_idefics3(hidden_size, num_layers, processor.tokenizer).save_pretrained(
        path
    )
    processor.save_pretrained(path)


def smolvlm(path: Path) -> None:
    """As Idefics3, with a processor that sees videos too; how many tokens an image takes is said in
    a file of its own.
    """
    tokenizer = vision_models.make_tokenizer()
    like = vision_models.random_idefics3(64, 2, tokenizer).config.to_dict()
    like["vision_config"].pop("model_type")
    names = ("image_token_id", "scale_factor", "pad_token_id", "text_config", "vision_config")
    config = transformers.SmolVLMConfig(
        **{name: like[name] for name in names}, tie_word_embeddings=False
    )
    side = {"longest_edge": vision_models.SIDE}
    images = SmolVLMImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    _save(path, config, tokenizer, images)
    said = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
    (path / "processor_config.json").write_text(json.dumps(said))


def _qwen(path: Path, family: str, text: dict, vision: dict) -> None:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_with(image, *tokens)
    patch = vision["patch_size"]
    processor = Qwen2VLImageProcessorPil(
        min_pixels=4 * patch**2, max_pixels=32 * patch**2, patch_size=patch, merge_size=2
    )
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            tokens,
            strict=True,
        )
    }
    config = getattr(transformers, f"{family}Config")(
        text_config={**SIZES, "vocab_size": len(tokenizer), **text},
        vision_config={"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | vision,
        tie_word_embeddings=False,
        **ids,
    )
    _save(path, config, tokenizer, processor)


def qwen2_5_vl(path: Path) -> None:
    """Rotary positions of three dimensions, windows in its image encoder."""
    _qwen(
        path,
        "Qwen2_5_VL",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    )


def qwen3_vl(path: Path) -> None:
    """Deepstack: features of several layers of the encoder enter several of the text model."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    _qwen(
        path,
        "Qwen3VL",
        {"rope_parameters": rope},
        {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    )


def llava(path: Path) -> None:
    """A CLIP encoder of pictures of one size."""
    tokenizer = tokenizer_with("<image>", "<image>")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZES, "vocab_size": len(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    _save(path, config, tokenizer, processor)


def gemma3(path: Path) -> None:
    """Attention that sees a whole image at once, in both directions."""
    tokens = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tokenizer = tokenizer_with("<start_of_image>", *tokens)
    tokenizer.init_kwargs |= dict(
        zip(("boi_token", "eoi_token", "image_token"), tokens, strict=True)
    )
    tokenizer = _with_names(path, tokenizer)
    config = transformers.Gemma3Config(
        text_config={**SIZES, "vocab_size": len(tokenizer), "sliding_window": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(tokens[0]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(tokens[1]),
        image_token_index=tokenizer.convert_tokens_to_ids(tokens[2]),
    )
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    _save(path, config, tokenizer, processor)


def _with_names(path: Path, tokenizer):
    """The tokenizer with the tokens that its file names, as Gemma's has them."""
    names = {n: tokenizer.init_kwargs[n] for n in ("boi_token", "eoi_token", "image_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=names,
        chat_template=tokenizer.chat_template,
        padding_side="left",
    )


def _save(path: Path, config, tokenizer, processor) -> None:
    torch.manual_seed(0)
    model = model_class(config).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if not parameter.any():  # Gemma 3 begins blind
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "gemma3": gemma3,
}


def picture(seed: int, width: int = 40, height: int = 32) -> Picture:
    """Noise as PNG."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(values).save(encoded, "png")
    return Picture.of(encoded.getvalue())


def prompt_images(pixels: Pixels, text: str, *pictures: Picture) -> tuple[list[int], PromptImages]:
    """(expanded ids, images) of a prompt in which `{}` stands for each image."""
    chat = [
        {"type": "image"} if part == "{}" else {"type": "text", "text": part} for part in _cut(text)
    ]
    tokenizer = pixels.processor.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True
    )
    ids = pixels.expanded(rendered, pictures)
    unexpanded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids, PromptImages(pictures, rendered, tuple(unexpanded), len(ids))


def _cut(text: str) -> list[str]:
    parts: list[str] = []
    for number, part in enumerate(text.split("{}")):
        parts += ["{}"] if number else []
        parts += [part] if part else []
    return parts


def some_text(seed: int, length: int) -> list[int]:
    """Ids of plain tokens of the demo."""
    rng = random.Random(seed)
    return [rng.randrange(len(make_demo.SPECIAL_TOKENS), 38) for _ in range(length)]
