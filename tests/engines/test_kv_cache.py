"""The KV cache of real engines: as large as one sequence takes, by vLLM's rule and by ours."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.config import GIB
from opd.engines.vllm_engine import GeneratorEngine, HiddenStateEngine
from opd.inputs.kv_cache import one_sequence_bytes
from opd.inputs.shapes import read_model, shape_of
from scripts.make_demo import make_tokenizer

LENGTH = 1000  # not a multiple of a block
OPTIONS = {"dtype": "bfloat16", "max_model_len": LENGTH, "trust_remote_code": False}


@pytest.fixture(scope="module")
def addition(device, tmp_path_factory):
    """A teacher whose context is longer than its cache."""
    path = tmp_path_factory.mktemp("models") / "addition"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(**sizes, **heads, max_position_embeddings=4096)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def least(path) -> int:
    shape = shape_of(read_model("--teacher", str(path)), "--teacher", str(path))
    return one_sequence_bytes(shape.cached, LENGTH, width=2, in_flight=1 << 20)


def test_caches_of_engines(addition):
    """In one test: vLLM destroys the process's groups with its first engine that goes."""
    sized = HiddenStateEngine(
        "math",
        str(addition),
        tokenizer=str(addition),
        kv_cache_gib=0,
        kv_cache_grows=True,
        **OPTIONS,
    )
    assert sized._kv_cache_bytes == least(addition)
    cache = sized.llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks == -(-LENGTH // cache.block_size) + 1, "what vLLM took, and its own"
    short, long = sized.hidden_states([[5, 6, 7], list(range(10, 60)) * (LENGTH // 50)])
    assert short.shape == (3, 32) and long.shape == (LENGTH, 32)
    assert short.dtype == long.dtype == torch.bfloat16, "not float32, which is twice the bytes"

    given = {"seed": 0, "enforce_eager": True, **OPTIONS}
    exact = GeneratorEngine(str(addition), kv_cache_gib=least(addition) / GIB, **given)
    (sample,) = exact.generate([[5]], [0], (), max_tokens=LENGTH - 1, temperature=1.0)
    assert len(sample.token_ids) == LENGTH - 1

    with pytest.raises(ValueError, match=rf"one sequence of {LENGTH} tokens takes 0\.00\d+ GiB"):
        GeneratorEngine(str(addition), kv_cache_gib=(least(addition) - 1) / GIB, **given)
