"""Model families, each as a tiny random model of its own configuration class with the traits of its
published models.

A family is what `model_type` in a config.json names, or a published variant of one that does
something else: other rope scaling, tied embeddings, a window. Sizes are shrunk (hidden size 64, two
layers, four experts). Traits are not: whether the head is the embedding, biases, soft-caps, scales,
dropout, how keys are shared and rotated. `scripts/check_families.py` trains them.

Shape suffixes: none; tensors here are whole parameters.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

VOCAB = 64  # the tokenizer of the demo has 40
WINDOW = 8  # of sliding attention: shorter than a prompt and its response
# Far from uniform distributions, so that a weight that is not where it should be shows.
INITIALIZER_RANGE = 0.2
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    # the smallest that vLLM's attention takes on a CPU
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 512, "initializer_range": INITIALIZER_RANGE, "bos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One row of docs/models.md."""

    name: str
    model_type: str
    published: str  # models of the family
    # what its configuration says beyond SIZES and its own defaults
    traits: dict[str, Any] = field(default_factory=dict)
    telling: bool = False  # in the short list: has a trait that something went wrong with

    @property
    def is_known(self) -> bool:
        """Whether transformers has it."""
        return self.model_type in CONFIG_MAPPING


def _rope(kind: str = "default", theta: float = 10_000.0, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _moe(**more) -> dict:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **more}


LLAMA3_ROPE = _rope(
    "llama3",
    500_000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)
HALF = {"partial_rotary_factor": 0.5}
# Multi-head latent attention of DeepSeek, with the only sizes that vLLM's kernel for a CPU has.
MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
LINEAR = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
SCALES = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
    "logits_scaling": 1.5,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

FAMILIES = (
    # Dense, as Llama with variations.
    Family("llama", "llama", "Llama 2, Llama 3.1 8B, Vicuna, Yi", {**LLAMA3_ROPE}, telling=True),
    Family("llama32", "llama", "Llama 3.2 1B and 3B, SmolLM2", {
        **TIED, **LLAMA3_ROPE,
    }, telling=True),
    Family("mistral", "mistral", "Mistral 7B", {"sliding_window": WINDOW}),
    Family("ministral", "ministral", "Ministral 8B", {**WINDOWED}),
    Family("ministral3", "ministral3", "Ministral 3", {
        **_rope("yarn", 1e6, factor=16.0, original_max_position_embeddings=256, beta_fast=32.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
    }),
    Family("qwen2", "qwen2", "Qwen2.5 0.5B to 3B, DeepSeek-R1-Distill", {**TIED}, telling=True),
    Family("qwen3", "qwen3", "Qwen3 0.6B to 4B", {**TIED}, telling=True),
    Family("qwen3_untied", "qwen3", "Qwen3 8B to 32B"),
    Family("gemma", "gemma", "Gemma 2B and 7B"),
    Family("gemma2", "gemma2", "Gemma 2", {
        **WINDOWED, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    }, telling=True),
    Family("gemma3", "gemma3_text", "Gemma 3 270M and 1B", {
        **WINDOWED, "query_pre_attn_scalar": 32,
    }),
    Family("gemma3n", "gemma3n_text", "Gemma 3n E2B", {
        **WINDOWED, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0, "laurel_rank": 16, "activation_sparsity_pattern": [0.0, 0.0],
    }),
    Family("gemma4", "gemma4_text", "Gemma 4, text", {
        **WINDOWED, "global_head_dim": 64, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
    }, telling=True),
    Family("gemma4_e2b", "gemma4_text", "Gemma 4 E2B and E4B, text", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 64,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0, "use_double_wide_mlp": True,
    }),
    Family("vaultgemma", "vaultgemma", "VaultGemma 1B", {
        **WINDOWED, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
    }),
    Family("phi", "phi", "Phi-1, Phi-1.5, Phi-2", {
        **_rope(**HALF), "resid_pdrop": 0.1,
    }, telling=True),
    Family("phi3", "phi3", "Phi-3 mini, Phi-4", {"sliding_window": WINDOW}),
    Family("phi4mini", "phi3", "Phi-4-mini", {
        **TIED, "original_max_position_embeddings": 256, **_rope("longrope",
        partial_rotary_factor=0.75, short_factor=[1.0 + k / 10 for k in range(12)],
        long_factor=[2.0 + k for k in range(12)], original_max_position_embeddings=256),
    }),
    Family("smollm3", "smollm3", "SmolLM3 3B", {"no_rope_layers": [1, 0]}, telling=True),
    Family("olmo", "olmo", "OLMo 1B and 7B", {"clip_qkv": 8.0}),
    Family("olmo2", "olmo2", "OLMo 2"),
    Family("olmo3", "olmo3", "Olmo 3", {**WINDOWED}),
    Family("stablelm", "stablelm", "StableLM 2 1.6B", {
        **_rope(partial_rotary_factor=0.25), "use_qkv_bias": True,
    }),
    Family("stablelm12b", "stablelm", "StableLM 2 12B", {
        **_rope(partial_rotary_factor=0.25), "qk_layernorm": True, "use_parallel_residual": True,
    }),
    Family("granite", "granite", "Granite 3 and 4 dense", {**TIED, **SCALES}),
    Family("granite4", "granitemoehybrid", "Granite 4.0 350M and 1B, dense", {
        **TIED, **SCALES, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 128, "layer_types": ["attention", "attention"],
        "position_embedding_type": "rope",
    }),
    Family("granite_swa", "granite_swa", "Granite with windows", {**SCALES, **WINDOWED}),
    Family("glm", "glm", "GLM-4 9B", {**_rope(**HALF)}),
    Family("glm4", "glm4", "GLM-4-0414", {**_rope(**HALF)}),
    Family("cohere", "cohere", "Command R, Aya", {"logit_scale": 0.5}),
    Family("cohere2", "cohere2", "Command R7B, Command A", {"logit_scale": 0.5, **WINDOWED}),
    Family("nemotron", "nemotron", "Nemotron-4, Minitron", {**_rope(**HALF)}),
    Family("ernie45", "ernie4_5", "ERNIE 4.5 0.3B"),
    Family("seed_oss", "seed_oss", "Seed-OSS 36B", telling=True),
    Family("arcee", "arcee", "AFM 4.5B"),
    Family("hunyuan", "hunyuan_v1_dense", "Hunyuan 0.5B to 7B", {
        **TIED, **_rope("dynamic", alpha=1000.0, factor=1.0),
    }),
    Family("exaone4", "exaone4", "EXAONE 4.0", {**WINDOWED, **LLAMA3_ROPE}),
    Family("apertus", "apertus", "Apertus 8B and 70B", {**LLAMA3_ROPE}),
    Family("helium", "helium", "Helium 2B"),
    Family("diffllama", "diffllama", "DiffLlama", {"num_key_value_heads": 2}),
    Family("jais2", "jais2", "Jais 2"),
    Family("cwm", "cwm", "Code World Model 32B", {**WINDOWED, **LLAMA3_ROPE, "bos_token_id": 2}),
    Family("hyperclovax", "hyperclovax", "HyperCLOVA X SEED", {**SCALES}),
    Family("bitnet", "bitnet", "BitNet b1.58 (its bf16 weights)", {**TIED}),
    Family("youtu", "youtu", "Youtu-LLM 2B", {
        **MLA, "num_key_value_heads": 2, "embedding_initializer_range": 0.4, "pad_token_id": None,
    }),
    Family("nanochat", "nanochat", "nanochat"),
    Family("doge", "doge", "Doge 20M to 320M"),
    Family("minicpm3", "minicpm3", "MiniCPM3 4B", {
        **MLA, "num_key_value_heads": 2, "scale_emb": 4, "scale_depth": 1.4, "dim_model_base": 32,
    }),
    Family("internlm2", "internlm2", "InternLM 2 and 2.5"),
    # Dense, older than Llama.
    Family("gpt2", "gpt2", "GPT-2, DistilGPT-2", telling=True),
    Family("gpt_neox", "gpt_neox", "Pythia, GPT-NeoX 20B", {
        **_rope(partial_rotary_factor=0.25),
    }, telling=True),
    Family("gptj", "gptj", "GPT-J 6B", {"rotary_dim": 16}),
    Family("gpt_neo", "gpt_neo", "GPT-Neo, TinyStories", {
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
    }),
    Family("gpt_bigcode", "gpt_bigcode", "StarCoder, SantaCoder"),
    Family("codegen", "codegen", "CodeGen", {
        "rotary_dim": 16, "num_attention_heads": 4, "hidden_size": 128,
    }),
    Family("opt", "opt", "OPT", {
        "init_std": INITIALIZER_RANGE, "ffn_dim": 128, "word_embed_proj_dim": 64,
    }, telling=True),
    Family("bloom", "bloom", "BLOOM"),
    Family("falcon", "falcon", "Falcon 7B"),
    Family("falcon40b", "falcon", "Falcon 40B", {
        "new_decoder_architecture": True, "num_kv_heads": 1,
    }),
    Family("mpt", "mpt", "MPT 7B", {"max_seq_len": 512, "no_bias": True}),
    Family("xglm", "xglm", "XGLM", {"init_std": INITIALIZER_RANGE, "ffn_dim": 128}),
    Family("biogpt", "biogpt", "BioGPT"),
    Family("persimmon", "persimmon", "Persimmon 8B", {**_rope(**HALF)}),
    Family("starcoder2", "starcoder2", "StarCoder2", {
        "sliding_window": WINDOW, "attention_dropout": 0.1, "residual_dropout": 0.1,
        "embedding_dropout": 0.1,
    }),
    # Mixtures of experts.
    Family("mixtral", "mixtral", "Mixtral 8x7B", {"num_local_experts": 4}, telling=True),
    Family("qwen2_moe", "qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _moe(
        shared_expert_intermediate_size=64,
    )),
    Family("qwen3_moe", "qwen3_moe", "Qwen3-30B-A3B", _moe(norm_topk_prob=True), telling=True),
    Family("olmoe", "olmoe", "OLMoE 1B-7B", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("flex_olmo", "flex_olmo", "FlexOlmo 7x7B", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("granitemoe", "granitemoe", "Granite 3 MoE", {**TIED, **SCALES, "num_local_experts": 4}),
    Family("granitemoeshared", "granitemoeshared", "Granite MoE with shared experts", {
        **TIED, **SCALES, "num_local_experts": 4, "shared_intermediate_size": 64,
    }),
    Family("phimoe", "phimoe", "Phi-3.5-MoE", {
        "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True,
    }),
    Family("gpt_oss", "gpt_oss", "gpt-oss 20B and 120B (unquantised)", {
        **WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2, **_rope("yarn", 150_000.0,
        factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=256),
    }, telling=True),
    Family("deepseek_v2", "deepseek_v2", "DeepSeek-V2-Lite", {
        **MLA, "q_lora_rank": None, "num_key_value_heads": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    }),
    Family("deepseek_v3", "deepseek_v3", "DeepSeek-V3, DeepSeek-R1", {
        **MLA, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    }),
    Family("glm4_moe", "glm4_moe", "GLM-4.5, GLM-4.6", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "head_dim": 32,
        **_rope(**HALF),
    }),
    Family("dots1", "dots1", "dots.llm1", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    }),
    Family("ernie45_moe", "ernie4_5_moe", "ERNIE 4.5 21B-A3B", {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    }),
    Family("hunyuan_moe", "hunyuan_v1_moe", "Hunyuan-A13B", {
        **TIED, **_rope("dynamic", alpha=1000.0, factor=1.0), "num_experts": 4, "moe_topk": 2,
        "use_qk_norm": True, "moe_intermediate_size": 128, "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
    }),
    Family("minimax_m2", "minimax_m2", "MiniMax-M2", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16,
        "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, **_rope(**HALF),
    }),
    Family("afmoe", "afmoe", "Trinity", {
        **WINDOWED, **_moe(), "num_shared_experts": 1, "num_dense_layers": 1, "mup_enabled": True,
        "n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True,
    }),
    Family("dbrx", "dbrx", "DBRX", {
        "d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 500_000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4,
        "moe_top_k": 2},
    }),
    Family("jetmoe", "jetmoe", "JetMoE 8B", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 32,
        "num_key_value_heads": 1,
    }),
    Family("gemma4_moe", "gemma4_text", "Gemma 4 26B-A4B, text", {
        **WINDOWED, "global_head_dim": 64, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 32, "final_logit_softcapping": 30.0,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    }),
    Family("llama4", "llama4_text", "Llama 4 Scout, text", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
        "intermediate_size": 64, "interleave_moe_layer_step": 1, "attention_chunk_size": 128,
        "no_rope_layers": [1, 0], **LLAMA3_ROPE,
    }),
    Family("exaone_moe", "exaone_moe", "K-EXAONE", {
        **WINDOWED, **_moe(), "num_shared_experts": 1, "first_k_dense_replace": 1,
    }),
    Family("glm4_moe_lite", "glm4_moe_lite", "GLM-4.7-Flash", {
        **MLA, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    }),
    Family("solar_open", "solar_open", "Solar Open 100B", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    }),
    Family("mimo_v2", "mimo_v2_flash", "MiMo-V2-Flash", {
        **WINDOWED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "head_dim": 64, "v_head_dim": 32,
    }),
    # State-space, convolution and linear attention, alone or beside attention.
    Family("mamba", "mamba", "Mamba 130M to 2.8B", {"num_hidden_layers": 2, "state_size": 16}),
    Family("mamba2", "mamba2", "Mamba2, Codestral Mamba", {
        "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16,
    }),
    Family("falcon_mamba", "falcon_mamba", "Falcon Mamba 7B", {"state_size": 16}),
    Family("jamba", "jamba", "Jamba", {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    }),
    Family("bamba", "bamba", "Bamba 9B", {**MAMBA2, "attn_layer_indices": [1]}),
    Family("granitemoehybrid", "granitemoehybrid", "Granite 4.0 H", {
        **TIED, **SCALES, **MAMBA2, "num_local_experts": 4, "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    }),
    Family("falcon_h1", "falcon_h1", "Falcon-H1", {
        **MAMBA2, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0,
        "key_multiplier": 0.5,
    }),
    Family("zamba2", "zamba2", "Zamba2", {
        "n_mamba_heads": 4, "mamba_d_state": 16, "mamba_ngroups": 1, "chunk_size": 16,
        "adapter_rank": 8, "layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 2,
        "head_dim": 64, "use_mamba_kernels": False,
    }),
    Family("nemotron_h", "nemotron_h", "Nemotron-H, Nemotron Nano 2", {
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3,
        "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
        "chunk_size": 16, "use_mamba_kernels": False,
    }),
    Family("lfm2", "lfm2", "LFM2 350M to 2.6B", {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False,
        "conv_dim": 64, "block_dim": 64,
    }),
    Family("lfm2_moe", "lfm2_moe", "LFM2 8B-A1B", {
        **_moe(), "layer_types": ["conv", "full_attention"], "num_dense_layers": 1,
    }),
    Family("kimi_linear", "kimi_linear", "Kimi-Linear 48B-A3B", {
        **MLA, "q_lora_rank": None, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "layer_types": ["linear_attention",
        "full_attention"], "linear_head_dim": 32, "linear_num_heads": 2,
    }),
    Family("qwen3_next", "qwen3_next", "Qwen3-Next-80B-A3B", {
        **_moe(shared_expert_intermediate_size=64), **LINEAR, **_rope(partial_rotary_factor=0.25),
    }),
    Family("qwen3_5", "qwen3_5_text", "Qwen3.5, text", {
        **LINEAR, **_rope(partial_rotary_factor=0.25),
    }, telling=True),
    Family("olmo_hybrid", "olmo_hybrid", "Olmo Hybrid 7B", {**LINEAR}),
    Family("minimax", "minimax", "MiniMax-Text-01", {
        "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    }),
    Family("recurrent_gemma", "recurrent_gemma", "RecurrentGemma", {
        "block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": WINDOW,
        "w_init_variance_scale": 1.0,
    }),
    Family("rwkv", "rwkv", "RWKV-4"),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
assert len(BY_NAME) == len(FAMILIES), "two families of one name"


def make_config(family: Family, pad_id: int, eos_id: int) -> PreTrainedConfig:
    """The tiny configuration.

    Of a family that transformers lacks: Llama's, and `save` gives it the family's name.
    """
    config_class = CONFIG_MAPPING[family.model_type] if family.is_known else LlamaConfig
    own_names = config_class.attribute_map  # a common name -> the family's
    fields = {*config_class.__dataclass_fields__, *own_names}
    sizes = {
        key: value
        for key, value in SIZES.items()
        if key in fields and own_names.get(key) not in family.traits
    }
    # A published trait that transformers leaves out (topk_method of DeepSeek-V3) is for vLLM, which
    # reads the file.
    special = {"pad_token_id": pad_id, "eos_token_id": eos_id}
    return config_class(**sizes | special | family.traits, dtype="float32")


def make_model(family: Family, config: PreTrainedConfig, seed: int) -> torch.nn.Module:
    """Random weights, float32.

    Vectors are no zeros and ones, so that a bias or a scale that somebody drops shows.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point() and tensor.data_ptr() in saved:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def save(family: Family, tokenizer, path: Path, seed: int) -> None:
    """Weights, configuration and tokenizer of a random model of the family, as its published models
    have them.
    """
    config = make_config(family, tokenizer.pad_token_id, tokenizer.eos_token_id)
    make_model(family, config, seed).save_pretrained(path)
    if not family.is_known:
        file = path / "config.json"
        file.write_text(
            file.read_text().replace(
                '"model_type": "llama"', f'"model_type": "{family.model_type}"'
            )
        )
    tokenizer.save_pretrained(path)
