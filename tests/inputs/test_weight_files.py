"""Files of weights that are broken, incomplete, of another model or quantised: one line, before a
weight is loaded.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV4Config,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

from opd.inputs.models import load_tokenizer, read_fact
from opd.inputs.shapes import read_model
from opd.inputs.weight_files import check_weights
from opd.ops.headers import read_headers
from opd.ops.heads import find_head, load_head

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"  # any weight that is neither the first nor the head


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of an untied Qwen3 of two layers, to be damaged."""
    return Path(shutil.copytree(tiny.student, tmp_path / "m"))


@pytest.fixture
def tied(tiny_tied, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_tied, tmp_path / "tied"))


def edit_config(path: Path, **changes) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


def rewrite(path: Path, change) -> None:
    """`change` turns the dictionary of weights into another."""
    weights = change(load_file(path / WHOLE))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / WHOLE)


def renamed(change):
    return lambda path: rewrite(
        path, lambda weights: {change(name): tensor for name, tensor in weights.items()}
    )


def without(*names: str):
    return lambda path: rewrite(
        path, lambda weights: {k: v for k, v in weights.items() if k not in names}
    )


def with_more(**shapes):
    """Further tensors; `__` in a keyword stands for a dot."""
    more = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    return lambda path: rewrite(path, lambda weights: weights | more)


def shard(path: Path, *parts: list[str], listed: dict | None = None) -> None:
    """The weights in one file for each list of names; the last file has what no list names."""
    weights = load_file(path / WHOLE)
    (path / WHOLE).unlink()
    named = [*parts, [name for name in weights if not any(name in part for part in parts)]]
    files = [f"model-{i + 1:05d}-of-{len(named):05d}.safetensors" for i in range(len(named))]
    for file, names in zip(files, named, strict=True):
        save_file({name: weights[name] for name in names}, path / file)
    found = {name: file for file, names in zip(files, named, strict=True) for name in names}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found | (listed or {})}))


def fact_of(path: Path, flag: str = "--student_model", **options):
    return read_fact(flag, str(path), load_tokenizer(str(path)), False, **options)


def refusal(path: Path, flag: str = "--student_model", **options) -> str:
    with pytest.raises(ValueError) as caught:
        fact_of(path, flag, **options)
    message = str(caught.value)
    assert message.startswith(f"{flag} {path}: ") and "\n" not in message, message
    return message


# ---- Files ---------------------------------------------------------------------------------------


def git_lfs_pointer(path: Path) -> None:
    (path / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def empty(path: Path) -> None:
    (path / WHOLE).write_bytes(b"")


def truncated(path: Path) -> None:
    (path / WHOLE).write_bytes((path / WHOLE).read_bytes()[:-100])


def cut_in_the_header(path: Path) -> None:
    (path / WHOLE).write_bytes((path / WHOLE).read_bytes()[:100])


def longer_than_its_header_says(path: Path) -> None:
    (path / WHOLE).write_bytes((path / WHOLE).read_bytes() + b"\0" * 16)


def a_web_page(path: Path) -> None:
    (path / WHOLE).write_text("<!DOCTYPE html><html>login</html>")


def header_that_is_no_json(path: Path) -> None:
    (path / WHOLE).write_bytes((16).to_bytes(8, "little") + b"{" * 16)


def header_of_something_else(path: Path) -> None:
    (path / WHOLE).write_bytes((8).to_bytes(8, "little") + b'{"a": 5}')


def a_directory(path: Path) -> None:
    (path / WHOLE).unlink()
    (path / WHOLE).mkdir()


def lone_shard(path: Path) -> None:
    (path / WHOLE).rename(path / "model-00001-of-00001.safetensors")


def shards_without_an_index(path: Path) -> None:
    shard(path, [UP])
    (path / INDEX).unlink()


def broken_index(path: Path) -> None:
    shard(path, [UP])
    (path / INDEX).write_text("{")


def index_that_is_a_list(path: Path) -> None:
    shard(path, [UP])
    (path / INDEX).write_text("[]")


def index_of_nothing(path: Path) -> None:
    shard(path, [UP])
    (path / INDEX).write_text('{"weight_map": {}}')


def index_that_is_wrong(path: Path) -> None:
    shard(path, [UP], listed={UP: "model-00002-of-00002.safetensors"})


def index_of_more_than_there_is(path: Path) -> None:
    shard(
        path, [UP], listed={"model.layers.7.mlp.up_proj.weight": "model-00001-of-00002.safetensors"}
    )


def missing_shard(path: Path) -> None:
    shard(path, [UP])
    (path / "model-00001-of-00002.safetensors").unlink()


def broken_shard(path: Path) -> None:
    shard(path, [UP])
    truncated_file = path / "model-00002-of-00002.safetensors"
    truncated_file.write_bytes(truncated_file.read_bytes()[:-4])


def tensor_in_two_shards(path: Path) -> None:
    shard(path, [UP])
    save_file({UP: torch.zeros(3)}, path / "a.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "a.safetensors"
    (path / INDEX).write_text(json.dumps(index))


def older_export_beside_shards(path: Path) -> None:
    shutil.copyfile(path / WHOLE, path / "keep")
    shard(path, [UP])
    (path / "keep").rename(path / WHOLE)


def another_file_beside(path: Path) -> None:
    shutil.copyfile(path / WHOLE, path / "consolidated.safetensors")


def only_gguf(path: Path) -> None:
    (path / WHOLE).rename(path / "model-Q4_0.gguf")


def nothing(path: Path) -> None:
    (path / WHOLE).unlink()


FILES = [
    (
        git_lfs_pointer,
        "model.safetensors is a git-lfs pointer, not weights; fetch it with git lfs pull",
    ),
    (empty, "model.safetensors is empty; fetch it again"),
    (truncated, "model.safetensors is not a whole safetensors file"),
    (cut_in_the_header, "model.safetensors is not a whole safetensors file"),
    (longer_than_its_header_says, "model.safetensors is not a whole safetensors file"),
    (a_web_page, "model.safetensors is not a whole safetensors file"),
    (header_that_is_no_json, "model.safetensors is not a whole safetensors file"),
    (header_of_something_else, "model.safetensors is not a whole safetensors file"),
    (a_directory, "no .safetensors weights"),
    (
        lone_shard,
        f"model-00001-of-00001.safetensors, which no {INDEX} names; rename it to model.safetensors",
    ),
    (
        shards_without_an_index,
        f"2 weight files and no {INDEX} that names them, first model-00001-of-00002.safetensors",
    ),
    (broken_index, f"cannot load its {INDEX}"),
    (index_that_is_a_list, f"cannot load its {INDEX}"),
    (index_of_nothing, f"its {INDEX} names no files"),
    (
        index_that_is_wrong,
        f"names 1 tensors that are not where it says, first {UP} in model-00002-of-00002",
    ),
    (
        index_of_more_than_there_is,
        "names 1 tensors that are not where it says, first model.layers.7.mlp.up_proj.weight",
    ),
    (missing_shard, "1 of 2 weight files are missing, first model-00001-of-00002.safetensors"),
    (broken_shard, "model-00002-of-00002.safetensors is not a whole safetensors file"),
    (tensor_in_two_shards, f"{UP} is in a.safetensors and in model-00001-of-00002.safetensors"),
    (older_export_beside_shards, f"holds both model.safetensors and {INDEX}"),
    (
        another_file_beside,
        "consolidated.safetensors lies beside model.safetensors, and vLLM would load both",
    ),
    (
        only_gguf,
        "no .safetensors weights in the directory; give the checkpoint from which the .gguf file "
        "was made",
    ),
    (nothing, "no .safetensors weights in the directory"),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=[damage.__name__ for damage, _ in FILES])
@pytest.mark.parametrize("flag", ["--student_model", "--teacher math"])
def test_broken_files(model, damage, message, flag):
    damage(model)
    assert message in refusal(model, flag)
    # whoever reads a head without a preflight hears it too
    with pytest.raises(ValueError, match=re.escape(str(model))):
        load_head(str(model))


def test_whole_models_pass_in_one_file_and_in_shards(model):
    expected = fact_of(model)
    shard(model, [UP], ["lm_head.weight"])
    assert fact_of(model) == expected
    assert (
        len(read_headers(model)) == len(load_file(model / "model-00003-of-00003.safetensors")) + 2
    )


def test_an_index_of_the_one_file_is_fine(model):
    expected = fact_of(model)
    names = dict.fromkeys(load_file(model / WHOLE), WHOLE)
    (model / INDEX).write_text(json.dumps({"weight_map": names}))
    assert fact_of(model) == expected


# ---- Names and shapes ----------------------------------------------------------------------------


def of_type(dtype: torch.dtype, *names: str):
    def change(weights):
        return {k: v.to(dtype) if not names or k in names else v for k, v in weights.items()}

    return lambda path: rewrite(path, change)


def other_shape(path: Path) -> None:
    edit_config(path, intermediate_size=96)


def other_vocabulary(path: Path) -> None:
    rewrite(path, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"][:-1]})


def unmerged_adapter(path: Path) -> None:
    renamed(lambda n: "base_model.model." + n.replace("q_proj.weight", "q_proj.base_layer.weight"))(
        path
    )


WEIGHTS = {
    "one weight less": (
        without(UP),
        f"1 of 25 weights are not in its files, first {UP}; export the model again",
    ),
    "no head": (
        without("lm_head.weight"),
        "first lm_head.weight; export the model with its lm_head, or set tie_word",
    ),
    "no embedding": (
        without("model.embed_tokens.weight"),
        "first model.embed_tokens.weight; export the model again",
    ),
    "student.": (
        renamed("student.{}".format),
        "25 of 25 weights are not in its files, first model.embed_tokens.weight; names in its "
        "files have `student.` too many",
    ),
    "module.": (renamed("module.{}".format), "`module.` too many"),
    "base_model.model.": (renamed("base_model.model.{}".format), "`base_model.model.` too many"),
    "_orig_mod. inside": (
        renamed(lambda n: n.replace("model.", "model._orig_mod.", 1)),
        "`_orig_mod.` too many",
    ),
    "wrapped layers": (
        renamed(lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module.")),
        "11 of 25 weights are not in its files, first model.layers.1",
    ),
    "unmerged adapter": (unmerged_adapter, "`base_model.model.` too many"),
    "no prefix": (
        renamed(lambda n: n.removeprefix("model.")),
        "24 names in its files lack the prefix `model.`",
    ),
    "some without prefix": (
        renamed(lambda n: n.replace("model.norm", "norm")),
        "1 names in its files lack the prefix",
    ),
    "another family": (
        renamed(lambda n: n.replace("layers", "h")),
        "22 of 25 weights are not in its files",
    ),
    "other shape": (
        other_shape,
        "6 weights have another shape than config.json says, first model.layers.0.mlp.down_proj",
    ),
    "other vocabulary": (
        other_vocabulary,
        "1 weights have another shape than config.json says, first lm_head.weight",
    ),
    "int8": (
        of_type(torch.int8),
        "25 of its weights are no floating-point numbers, first model.embed_tokens.weight; 25 "
        "tensors are of type I8, as quantised weights are; give its bfloat16 checkpoint",
    ),
    "one of fp8": (of_type(torch.float8_e4m3fn, UP), f"first {UP}; 1 tensors are of type F8_E4M3"),
    "int64 norm": (
        of_type(torch.int64, "model.norm.weight"),
        "first model.norm.weight; 1 tensors are of type I64",
    ),
    "packed": (
        lambda path: rewrite(
            path,
            lambda weights: {
                (k.replace("up_proj.weight", "up_proj.qweight")): (v.int() if "up_proj" in k else v)
                for k, v in weights.items()
            },
        ),
        "2 of 25 weights are not in its files, first model.layers.0.mlp.up_proj.weight; 2 tensors "
        "are of type I32",
    ),
    "more layers": (
        lambda path: edit_config(path, num_hidden_layers=1, layer_types=["full_attention"]),
        "11 weights in its files have no place in the Qwen3ForCausalLM of its config.json, first "
        "model.layers.1",
    ),
    "value head": (
        with_more(v_head__summary__weight=(1, 64)),
        "1 weights in its files have no place",
    ),
    "a bias": (
        with_more(model__layers__0__self_attn__q_proj__bias=64),
        "have no place in the Qwen3ForCausalLM",
    ),
    "lora": (
        with_more(model__layers__0__self_attn__q_proj__lora_A__weight=(4, 64)),
        "without adapters",
    ),
    "adapter beside": (
        lambda path: (path / "adapter_config.json").write_text("{}"),
        "a LoRA adapter lies beside",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("flag", ["--student_model", "--teacher math"])
def test_weights_that_are_not_those_of_the_configuration(model, case, flag):
    damage, message = WEIGHTS[case]
    damage(model)
    assert message in refusal(model, flag)


def test_what_may_lie_in_a_checkpoint_beside_its_weights(model):
    """Parts of older versions, of images, and those that predict further tokens."""
    expected = fact_of(model)
    with_more(
        model__layers__0__self_attn__rotary_emb__inv_freq=16,
        mtp__fc__weight=(2, 2),
        visual__patch_embed__weight=3,
        model__embed_positions__version=1,
    )(model)
    assert fact_of(model) == expected


def test_a_buffer_of_integers_is_no_weight(tmp_path):
    """DeepSeek V4's routing tables, which transformers renames besides."""
    config = DeepseekV4Config(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
    )
    AutoModelForCausalLM.from_config(config, dtype="float32").save_pretrained(tmp_path)
    assert any(stored.dtype == "I64" for stored in read_headers(tmp_path).values())
    check_weights(
        "--student_model", "m", tmp_path, read_model("--student_model", str(tmp_path)), vllm=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_of_float_is_a_weight(model, dtype):
    expected = fact_of(model)
    of_type(dtype)(model)
    assert fact_of(model) == expected


def test_names_without_a_prefix_are_fine_for_transformers(model):
    expected = fact_of(model, "--teacher math")
    renamed(lambda name: name.removeprefix("model."))(model)
    assert fact_of(model, "--teacher math", vllm=False) == expected


@pytest.mark.parametrize("config", [GPT2Config, BloomConfig])
def test_families_whose_published_names_have_no_prefix(tmp_path, config):
    small = config(
        vocab_size=40,
        n_embd=32,
        hidden_size=32,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    renamed(lambda name: name.removeprefix("transformer."))(tmp_path)
    check_weights(
        "--student_model", "m", tmp_path, read_model("--student_model", str(tmp_path)), vllm=True
    )


# ---- Experts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A mixture of experts as it is published: a weight for each expert, which transformers 5 holds
    in one tensor.
    """
    path = tmp_path_factory.mktemp("experts")
    config = Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype="float32").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.1.mlp.experts.2.gate_proj.weight",
            "first model.layers.1.mlp.experts.2.gate_proj.weight",
        ),
        (
            "model.layers.0.mlp.experts.3.down_proj.weight",
            "first model.layers.0.mlp.experts.down_proj: (3, 32, 16)",
        ),
        ("model.layers.0.mlp.gate.weight", "first model.layers.0.mlp.gate.weight"),
    ],
)
def test_experts(experts, tmp_path, name, message):
    path = Path(shutil.copytree(experts, tmp_path / "m"))
    assert name in read_headers(path)
    model = read_model("--student_model", str(path))
    check_weights("--student_model", "m", path, model, vllm=True)
    without(name)(path)
    with pytest.raises(ValueError) as caught:
        check_weights("--student_model", "m", path, model, vllm=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- Heads ---------------------------------------------------------------------------------------


def give_head(path: Path, change) -> None:
    rewrite(
        path,
        lambda weights: (
            weights | {"lm_head.weight": change(weights["model.embed_tokens.weight"]).clone()}
        ),
    )


def test_a_tied_checkpoint_with_another_head_is_refused(tied):
    fact_of(tied)
    give_head(tied, lambda embedding: embedding + 0.01)
    message = refusal(tied)
    assert (
        "lm_head.weight is another than its model.embed_tokens.weight; set tie_word_embeddings to "
        "false" in message
    )
    edit_config(tied, tie_word_embeddings=False)
    fact_of(tied)
    assert not torch.equal(
        load_head(str(tied)).weight_VH, load_file(tied / WHOLE)["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_checkpoint_with_a_copy_of_its_embedding_is_fine(tied, dtype):
    give_head(tied, lambda embedding: embedding.to(dtype))
    fact_of(tied)
    head = load_head(str(tied)).weight_VH
    assert torch.equal(head.float(), load_file(tied / WHOLE)["model.embed_tokens.weight"])


def test_one_row_more_is_another_head(tied):
    give_head(tied, lambda embedding: torch.cat([embedding, embedding[:1]]))
    assert "set tie_word_embeddings to false" in refusal(tied)


def test_a_tied_checkpoint_without_its_embedding_is_refused(tied):
    """transformers would take the head for it; vLLM leaves the head of a tied model out."""
    renamed(lambda name: name.replace("model.embed_tokens", "lm_head"))(tied)
    assert "first model.embed_tokens.weight; export the model again" in refusal(tied)


def test_an_untied_checkpoint_has_no_head_but_its_own(model):
    without("lm_head.weight")(model)
    with pytest.raises(ValueError, match=r"no output head under a known name \(lm_head\.weight"):
        find_head(str(model))


@pytest.mark.parametrize(("config", "is_tied"), [(LlamaConfig, False), (GPT2Config, True)])
def test_a_silent_configuration_is_tied_as_its_family_is(tmp_path, config, is_tied):
    small = config(
        vocab_size=40,
        hidden_size=32,
        n_embd=32,
        num_hidden_layers=1,
        n_layer=1,
        num_attention_heads=2,
        n_head=2,
    )
    model = AutoModelForCausalLM.from_config(small)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert ("lm_head.weight" in read_headers(tmp_path)) != is_tied
    assert torch.equal(load_head(str(tmp_path)).weight_VH, model.get_output_embeddings().weight)


# ---- Quantised checkpoints -----------------------------------------------------------------------

QUANTISED = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "no method named": {"quantization_config": {"load_in_8bit": True}},
    "torchao": {"text_config": {"quantization_config": {"quant_method": "torchao"}}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints(model, method):
    edit_config(model, **QUANTISED[method])
    student, teacher = refusal(model), refusal(model, "--teacher math", vllm=False)
    for message in (student, teacher):
        assert "its weights are quantised (" in message
        assert method in message and "give its bfloat16 checkpoint" in message
    assert "serve it with vLLM and give its URL" in teacher and "URL" not in student


@pytest.mark.parametrize(
    "file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
)
def test_quantised_checkpoints_of_older_tools(model, file):
    (model / file).write_text("{}")
    assert f"its weights are quantised ({file} lies beside them)" in refusal(model)


def test_a_configuration_that_says_it_is_not_quantised(model):
    expected = fact_of(model)
    edit_config(model, quantization_config=None)
    assert fact_of(model) == expected
