"""Published language models as their config.json has them: numbers only, for plans without weights.

What transformers and vLLM read is kept, what only a tokenizer or a generation reads is left out.
Gemma 3's are the text parts of its models.
"""

import json
import math
from pathlib import Path
from typing import Any

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "eos_token_id": 151645,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": 128001,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, tied: bool) -> dict[str, Any]:
    return QWEN3 | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 17408, False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 25600, False),
    "Qwen3-30B-A3B": QWEN3_MOE,
    "Qwen3-Coder-30B-A3B": QWEN3_MOE | {"max_position_embeddings": 262144, "rope_theta": 10000000},
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "eos_token_id": 151645,
    },
    "Llama-3.1-8B": LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "rope_scaling": LLAMA["rope_scaling"] | {"factor": 8.0},
        "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": LLAMA
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "intermediate_size": 8192,
        "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Gemma-3-4B": GEMMA3
    | {
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "query_pre_attn_scalar": 256,
    },
    "Gemma-3-27B": GEMMA3
    | {
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 21504,
        "query_pre_attn_scalar": 168,
    },
    "Phi-4": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 100352,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "pad_token_id": 100349,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
    },
    "Mistral-Small-24B": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 131072,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 32768,
        "max_position_embeddings": 32768,
        "rope_theta": 100000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "rope_theta": 5000000.0,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(36)],
        "no_rope_layer_interval": 4,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128012,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "eos_token_id": 200002,
    },
}
# billions of parameters, as their cards have them; an embedding that is the head counts once
PARAMETERS = {
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
    "Qwen3-30B-A3B": 30.532,
    "Qwen3-Coder-30B-A3B": 30.532,
    "Qwen2.5-7B": 7.616,
    "Llama-3.1-8B": 8.030,
    "Llama-3.2-1B": 1.236,
    "Gemma-3-4B": 3.880,
    "Gemma-3-27B": 27.009,
    "Phi-4": 14.660,
    "Mistral-Small-24B": 23.572,
    "Mistral-7B-v0.1": 7.242,
    "SmolLM3-3B": 3.075,
    "gpt-oss-20b": 20.915,
}


def write_config(name: str, directory: Path) -> str:
    """The directory of a published model, with its config.json and nothing else."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    content = {"torch_dtype": "bfloat16", **PUBLISHED[name]}
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


def write_hollow(name: str, directory: Path) -> str:
    """A Qwen3 model as published, its weights included: files of their full size that are all hole,
    with true headers, so nothing of them is on the disk.
    """
    path = Path(write_config(name, directory))
    shapes = _qwen3_tensors(PUBLISHED[name])
    entries, end = {}, 0
    for tensor, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return str(path)


def _qwen3_tensors(config: dict[str, Any]) -> dict[str, list[int]]:
    """The names and shapes of a checkpoint."""
    H, V = config["hidden_size"], config["vocab_size"]
    Q, KV = (config["head_dim"] * config[f"num_{of}_heads"] for of in ("attention", "key_value"))
    found = {"model.embed_tokens.weight": [V, H], "model.norm.weight": [H]}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = [V, H]
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": [Q, H],
            "self_attn.k_proj": [KV, H],
            "self_attn.v_proj": [KV, H],
            "self_attn.o_proj": [H, Q],
            "self_attn.q_norm": [config["head_dim"]],
            "self_attn.k_norm": [config["head_dim"]],
            "input_layernorm": [H],
            "post_attention_layernorm": [H],
        }
        experts = config.get("num_experts", 0)
        if experts:
            of_layer["mlp.gate"] = [experts, H]
        for expert in range(experts) if experts else [None]:
            where = "mlp" if expert is None else f"mlp.experts.{expert}"
            size = config["intermediate_size" if expert is None else "moe_intermediate_size"]
            of_layer |= {f"{where}.gate_proj": [size, H], f"{where}.up_proj": [size, H]}
            of_layer[f"{where}.down_proj"] = [H, size]
        found |= {f"model.layers.{layer}.{key}.weight": shape for key, shape in of_layer.items()}
    return found
