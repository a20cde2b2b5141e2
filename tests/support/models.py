"""Tiny models, a tokenizer and data: random weights, float32."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from scripts.make_demo import LETTERS

DOMAINS = ("addition", "reversal")
HEAD_DIM = 32  # the smallest that vLLM's attention takes on the CPU


# hidden size, layers; teachers differ from the student and from each other
SIZES = {"student": (64, 2), "addition": (96, 1), "reversal": (64, 1), "tied": (64, 1)}
PADDED_VOCAB = 64


@dataclass(frozen=True)
class Tiny:
    """Where things lie. Every model directory holds weights, tokenizer and generation config."""

    student: Path
    addition: Path  # teachers, named after their domains
    reversal: Path
    # the addition teacher with 24 more rows in its vocabulary than the tokenizer has tokens
    padded: Path
    train: Path
    eval: Path
    domains: tuple[str, ...] = DOMAINS


@dataclass(frozen=True)
class RealModel:
    """A published chat model, and a student of 20 of its 30 layers: model directories."""

    whole: Path
    student: Path


def random_model(name: str, tokenizer, **changes) -> Qwen3ForCausalLM:
    hidden_size, num_layers = SIZES[name]
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform distributions, so that a token out of place shows
        dtype="float32",
        bos_token_id=None,
        **{"tie_word_embeddings": False, **special, **changes},
    )
    torch.manual_seed(list(SIZES).index(name))
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def padded(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """More rows in embedding and head, as a vocabulary rounded up for the hardware; the new ones
    are random.
    """
    torch.manual_seed(99)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    model.resize_token_embeddings(PADDED_VOCAB)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.randn(PADDED_VOCAB, old[name].shape[1])
        rows[: len(old[name])] = old[name]
        model.state_dict()[name].copy_(rows)
    return model


def save(model: Qwen3ForCausalLM, tokenizer, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def row(domain: str, rng: random.Random) -> dict:
    if domain == "addition":
        a, b = rng.randrange(100), rng.randrange(100)
        question, answer = f"{a}+{b}=", str(a + b)[::-1]
    else:
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
        question, answer = f"{word}=", word[::-1]
    return {
        "data_source": domain,
        "prompt": [{"role": "user", "content": question}],
        "answer": answer,
    }
